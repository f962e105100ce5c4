"""Values of the trainer <-> messages of the contract. torch tensors go in and come out, but torch is not needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import json_format

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import Internal, InvalidArgument
from weighting_contract.profile import Profile, joined
from weighting_contract.spec import WeighterSpec, check_checksum
from weighting_contract.tensors import as_array, from_message, to_message

if TYPE_CHECKING:  # of a module that needs torch
    from weighting_contract.ngrams import Row

ROLES = {"learn": pb.ROLE_LEARN, "frozen": pb.ROLE_FROZEN}
ESTIMATORS = {"vjp": pb.ESTIMATOR_VJP, "score_function": pb.ESTIMATOR_SCORE_FUNCTION}


@dataclass(frozen=True)
class Batch:
    """The samples of one batch as the caller gave them; B rows in every part that is present."""

    features: Any = None  # [B, F] floating
    hidden: Any = None  # [B, H] floating
    tokens: Any = None  # [B, T] integer ids, padded on the right
    lengths: Any = None  # [B] integer
    texts: Any = None  # B strings

    def rows(self) -> int | None:
        """B, as far as it can be told from what was given; None: it can't."""
        for part in (self.features, self.hidden, self.tokens, self.lengths, self.texts):
            try:
                return len(part)
            except TypeError:  # absent, or without rows
                continue
        return None

    def like(self, values: np.ndarray | None) -> Any:
        """`values` as a torch tensor on the device of the inputs where these are torch tensors, else as they are."""
        for part in (self.features, self.hidden, self.tokens):
            if values is not None and hasattr(part, "detach"):
                import torch

                return torch.from_numpy(np.array(values)).to(part.device)
        return values

    def message(self) -> pb.Inputs:
        """Raises InvalidArgument where a part can't be sent; whether it fits the spec is the service's check."""
        if self.rows() is None:
            raise InvalidArgument("no inputs were given; give features, hidden, tokens or texts with one row a sample")
        inputs = pb.Inputs()
        for name in ("features", "hidden"):
            if (values := getattr(self, name)) is not None:
                array = as_array(values, name)
                # The service computes in float32: sending more would only cost time.
                getattr(inputs, name).CopyFrom(to_message(_narrowed(array) if array.dtype == np.float64 else array))
        for name in ("tokens", "lengths"):
            if (values := getattr(self, name)) is not None:
                getattr(inputs, name).CopyFrom(to_message(_smallest_integers(as_array(values, name))))
        if self.texts is not None:
            inputs.texts.extend(_checked_texts(self.texts))
        return inputs


def cotangent_message(cotangent: Any) -> pb.Tensor:
    array = as_array(cotangent, "cotangent")
    return to_message(_narrowed(array) if array.dtype == np.float64 else array)


def probes_message(probes: Any, rows: int) -> pb.Tensor:
    """[B] uint8. Raises InvalidArgument for anything but one bool a sample."""
    array = as_array(probes, "probes")
    if array.shape != (rows,) or array.dtype != np.bool_:
        raise InvalidArgument(
            f"probes are {array.dtype.name} of shape {list(array.shape)}, expected bool of [{rows}], one a sample: "
            "True where it was drawn evenly"
        )
    return to_message(array.astype(np.uint8))


def reference_message(name: str, checksum: str, tokenizer_checksum: str) -> pb.JobReference | None:
    """None where nothing is known; a tokenizer may be known without a reference.

    Raises:
        InvalidArgument: no checksums, or one of a reference that is not named.
    """
    check_checksum(checksum, "reference_checksum")
    check_checksum(tokenizer_checksum, "tokenizer_checksum")
    if checksum and not name:
        raise InvalidArgument("reference_checksum is given without a reference; name the one that it belongs to")
    if name or tokenizer_checksum:
        return pb.JobReference(name=name, checksum=checksum, tokenizer_checksum=tokenizer_checksum)
    return None


def profile_message(profile: Profile | Sequence[Row]) -> pb.TargetProfile:
    """A finished profile, or the target's documents as they are, one row of token ids each.

    Raises:
        InvalidArgument: log ratios that are no table, or documents that are no rows of token ids.
    """
    finished: Any = profile if hasattr(profile, "log_ratios") else None  # its class is not known without torch
    if finished is not None:
        table = np.asarray(finished.log_ratios)
        if table.ndim != 1 or table.dtype.kind != "f":
            raise InvalidArgument(
                f"profile.log_ratios is {table.dtype.name} of shape {list(table.shape)}, expected floats of [buckets]"
            )
        return pb.TargetProfile(
            log_ratios=to_message(table.astype(np.float16)), documents_checksum=finished.documents_checksum
        )
    if isinstance(profile, str):
        raise InvalidArgument("profile is a string, expected a Profile (load_profile reads one) or rows of token ids")
    documents: Any = profile
    rows = [as_array(row, f"profile[{i}]") for i, row in enumerate(documents)]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise InvalidArgument(
                f"profile[{i}] is {row.dtype.name} of shape {list(row.shape)}, expected a document's token ids, [T]"
            )
    if not rows:
        raise InvalidArgument("profile has no documents, expected the target's, one row of token ids each")
    ids, lengths = joined(rows)
    return pb.TargetProfile(documents=to_message(_smallest_integers(ids)), lengths=to_message(lengths))


def spec_message(spec: WeighterSpec | dict[str, Any]) -> pb.WeighterSpec:
    """The message for `spec`, with every default spelled out. Raises InvalidArgument, naming the field."""
    if isinstance(spec, WeighterSpec):
        spec.check()
    else:
        spec = WeighterSpec.from_dict(spec)
    return pb.WeighterSpec(
        features=None if spec.features is None else pb.FeatureSpec(**dataclasses.asdict(spec.features)),
        tokens=None if spec.tokens is None else pb.TokenSpec(**dataclasses.asdict(spec.tokens)),
        head=pb.HeadSpec(**dataclasses.asdict(spec.head)),
        learning=pb.LearningSpec(**dataclasses.asdict(spec.learning)),
        seed=spec.seed,
    )


def spec_changes(values: dict[str, Any]) -> pb.WeighterSpec:
    """The message for parts of a spec, such as {"learning": {"learning_rate": 1e-4}}; the service has the rest.

    Raises InvalidArgument for what is no part of one.
    """
    try:
        return json_format.ParseDict(values, pb.WeighterSpec())
    except json_format.ParseError as exc:
        raise InvalidArgument(f"spec can't be read: {exc}") from exc


@dataclass(frozen=True)
class Answer:
    """What a ScoreResponse holds for B samples."""

    weights: np.ndarray  # [B] float32
    logits: np.ndarray  # [B] float32
    statistics: np.ndarray | None  # [B, F] float32
    computed_samples: int | None  # that a reference computed for it; None: the service doesn't say


def read_scores(response: pb.ScoreResponse, rows: int) -> Answer:
    """The arrays of an answer that is fit to be trained on.

    Raises:
        Internal: anything but `rows` finite weights of 0 or more with mean 1, or statistics of other samples, or more
            samples computed than there are: a wrong answer must reach neither the loss nor the weighter.
    """
    try:
        weights = from_message(response.weights, "weights")
        logits = from_message(response.logits, "logits")
        statistics = from_message(response.statistics, "statistics") if response.HasField("statistics") else None
    except InvalidArgument as exc:
        raise Internal(f"the service's answer can't be read: {exc.message}") from exc
    if weights.shape != (rows,) or logits.shape != (rows,):
        raise Internal(
            f"the service answered weights of shape {list(weights.shape)} and logits of shape {list(logits.shape)} "
            f"for {rows} samples"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and abs(float(weights.mean()) - 1) < 1e-2):
        raise Internal(f"the service answered weights that are not of mean 1, finite and 0 or more: {weights[:8]}...")
    if statistics is not None:
        if statistics.ndim != 2 or len(statistics) != rows or not np.isfinite(statistics).all():
            raise Internal(
                f"the service answered statistics of shape {list(statistics.shape)}, expected [{rows}, F], all finite"
            )
        statistics = statistics.astype(np.float32)
    computed = response.computed_samples if response.HasField("computed_samples") else None
    if computed is not None and not 0 <= computed <= rows:
        raise Internal(f"the service answered that it computed {computed} of {rows} samples")
    return Answer(weights.astype(np.float32), logits.astype(np.float32), statistics, computed)


def _narrowed(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused by the service, by name
        return array.astype(np.float32)


def _smallest_integers(array: np.ndarray) -> np.ndarray:
    """Token ids as uint16 or int32 where they fit: a quarter or a half of int64 on the wire."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return array
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint16, np.int32):
        limits = np.iinfo(dtype)
        if array.dtype.itemsize > limits.dtype.itemsize and limits.min <= low and high <= limits.max:
            return array.astype(dtype)
    return array


def _checked_texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise InvalidArgument("texts is one string, expected a list with one string a sample")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise InvalidArgument(f"texts[{i}] is a {type(text).__name__}, expected a string")
    return listed
