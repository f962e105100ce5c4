"""Checks what callers send against a weighter's spec and turns it into Inputs. Knows no wire format and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weighting_contract.errors import InvalidArgument
from weighting_contract.rows import padded
from weighting_contract.spec import WeighterSpec, check_text
from weighting_service.domain import Inputs, RawInputs

LARGEST_FEATURE = 1e15  # beyond it squares in the weighter's first layers could overflow float32: it tells none apart
LARGEST_COTANGENT = 1e12  # no derivative of a loss by a weight is that large; its square, summed, is far from overflow

_HIDDEN = "spec.features.hidden_size; a pooled hidden state does not travel between model sizes"

Tokenize = Callable[[tuple[str, ...]], list[list[int]]]


@dataclass(frozen=True)
class BatchLimits:
    """Largest batch that one call may send."""

    samples: int = 8192
    tokens: int = 4_194_304  # padded


def check_inputs(
    raw: RawInputs,
    spec: WeighterSpec,
    *,
    limits: BatchLimits,
    vocabulary_size: int | None = None,
    column_order: tuple[str, ...] = (),
    tokenize: Tokenize | None = None,
) -> Inputs:
    """Inputs as the weighter takes them: float32 columns in the spec's order, int64 ids, B rows everywhere.

    Args:
        raw: what the caller sent.
        spec: of the weighter.
        limits: largest batch admitted.
        vocabulary_size: of the token encoder; ids must lie below it.
        column_order: names of the feature columns as the caller sends them; empty: in the spec's order.
        tokenize: turns texts into ids, absent where the weighter has no tokenizer.

    Raises:
        InvalidArgument: names the field, what was given and what is expected.
    """
    features = _floats(raw.features, "features", *_feature_width(spec))
    hidden = _floats(raw.hidden, "hidden", spec.features.hidden_size if spec.features else 0, _HIDDEN)
    tokens, lengths = _token_rows(raw, spec, limits, vocabulary_size, tokenize)
    inputs = Inputs(_reorder(features, spec, column_order), hidden, tokens, lengths)
    rows = {name: len(array) for name, array in inputs.arrays().items()}
    if len(set(rows.values())) > 1:
        raise InvalidArgument(f"every input needs one row a sample, got {rows}")
    if inputs.samples == 0:
        raise InvalidArgument(f"{next(iter(rows))} has no rows; a batch needs at least one sample")
    check_samples(inputs.samples, limits)
    return inputs


def _feature_width(spec: WeighterSpec) -> tuple[int, str]:
    return (len(spec.features.names) if spec.features else 0), "the columns that the weighter's spec names"


def _floats(array: np.ndarray | None, field: str, width: int, source: str) -> np.ndarray | None:
    """`array` as float32 [B, width], or None where the spec has no such input."""
    if width == 0:
        if array is not None:
            raise InvalidArgument(f"{field} were given, but this weighter's spec takes none; leave them out")
        return None
    if array is None:
        raise InvalidArgument(f"{field} are missing; this weighter needs [B, {width}] ({source})")
    if array.dtype.kind not in "fiu":
        raise InvalidArgument(f"{field} has dtype {array.dtype.name}, expected a floating type")
    if array.ndim != 2 or (array.shape[1] != width and array.size):
        raise InvalidArgument(f"{field} has shape {list(array.shape)}, expected [B, {width}] ({source})")
    if len(array) == 0:
        raise InvalidArgument(f"{field} has no rows; a batch needs at least one sample")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    size = np.abs(values)
    if not size.max() <= LARGEST_FEATURE:  # NaN is not
        row, column = (int(i) for i in np.argwhere(~(size <= LARGEST_FEATURE))[0])
        given = f"{field}[{row}, {column}] is {array[row, column]}"
        if not np.isfinite(values[row, column]):
            raise InvalidArgument(f"{given}, expected a finite float32").because("not_finite")
        raise InvalidArgument(f"{given}, expected at most {LARGEST_FEATURE:g} in size").because("absurd")
    return values


def _reorder(features: np.ndarray | None, spec: WeighterSpec, order: tuple[str, ...]) -> np.ndarray | None:
    if features is None or not order or spec.features is None or order == spec.features.names:
        return features
    return np.ascontiguousarray(features[:, [order.index(name) for name in spec.features.names]])


def check_feature_names(names: tuple[str, ...], spec: WeighterSpec) -> None:
    """Raises InvalidArgument where a job's columns are not exactly those of the spec, in any order."""
    if not names:
        return
    expected = spec.features.names if spec.features else ()
    extra = [n for n in names if n not in expected]
    missing = [n for n in expected if n not in names]
    if extra or missing or len(names) != len(expected):
        raise InvalidArgument(
            f"feature_names don't fit the weighter's spec: not in the spec {extra}, missing {missing}; "
            f"expected the names {list(expected)} in any order, each once"
        )


def _token_rows(
    raw: RawInputs, spec: WeighterSpec, limits: BatchLimits, vocabulary_size: int | None, tokenize: Tokenize | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    given = [name for name, value in (("tokens", raw.tokens), ("texts", raw.texts)) if value is not None]
    if spec.tokens is None:
        if given or raw.lengths is not None:
            raise InvalidArgument(f"{(given or ['lengths'])[0]} were given, but this weighter's spec reads no tokens")
        return None, None
    if len(given) != 1:
        raise InvalidArgument(f"this weighter reads tokens: give either tokens or texts, got {given or 'neither'}")
    if raw.texts is not None:
        if tokenize is None:
            raise InvalidArgument("texts were given, but this weighter's spec names no tokenizer; send token ids")
        tokens, lengths = padded(_from_texts(raw, tokenize, spec.tokens.max_tokens))
    else:
        assert raw.tokens is not None
        if raw.tokens.ndim == 2 and raw.tokens.shape[1] > spec.tokens.max_tokens:
            raise InvalidArgument(
                f"tokens has rows of {raw.tokens.shape[1]}, this weighter's spec takes at most {spec.tokens.max_tokens}"
            )
        tokens, lengths = _from_ids(raw.tokens, raw.lengths)
    check_padded(tokens.size, limits)
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    tokens = np.where(real, tokens, 0)
    outside = (tokens < 0) | (tokens >= vocabulary_size) if vocabulary_size is not None else tokens < 0
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise InvalidArgument(
            f"tokens[{row}, {column}] is {tokens[row, column]}, expected an id from 0 to {(vocabulary_size or 0) - 1}"
        )
    return tokens, lengths


def check_token_rows(raw: RawInputs, *, limits: BatchLimits, tokenize: Tokenize) -> tuple[list[np.ndarray], str]:
    """The samples of a batch as [T_i] rows of token ids, for a reference, and the field that they came in.

    The ids themselves are left to the reference's `check_rows`.

    Raises:
        InvalidArgument: names the field, what was given and what is expected.
    """
    given = [name for name in ("tokens", "texts", "features", "hidden") if getattr(raw, name) is not None]
    if given not in (["tokens"], ["texts"]):
        raise InvalidArgument(
            f"this job has a reference: give tokens, texts or the features that it had before, got "
            f"{' and '.join(given) or 'nothing'}"
        )
    if raw.texts is not None:
        check_samples(len(raw.texts), limits)
        rows = [np.array(ids, np.int64) for ids in _from_texts(raw, tokenize)]
        check_padded(len(rows) * max(map(len, rows)), limits)
        return rows, "texts"
    assert raw.tokens is not None
    tokens, lengths = _from_ids(raw.tokens, raw.lengths)
    check_samples(len(tokens), limits)
    check_padded(tokens.size, limits)
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)], "tokens"


def check_samples(samples: int, limits: BatchLimits) -> None:
    """Raises InvalidArgument for a batch of more samples than one call may send."""
    if samples > limits.samples:
        raise InvalidArgument(f"the batch has {samples} samples, this service takes at most {limits.samples}")


def check_padded(tokens: int, limits: BatchLimits) -> None:
    """Raises InvalidArgument for a batch of more padded tokens than one call may send."""
    if tokens > limits.tokens:
        raise InvalidArgument(f"the batch has {tokens} padded tokens, this service takes at most {limits.tokens}")


def _from_texts(raw: RawInputs, tokenize: Tokenize, max_tokens: int | None = None) -> list[list[int]]:
    if raw.lengths is not None:
        raise InvalidArgument("lengths go with tokens, not with texts; leave them out")
    assert raw.texts is not None
    return text_rows(raw.texts, "texts", tokenize, max_tokens)


def text_rows(texts: tuple[str, ...], field: str, tokenize: Tokenize, max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of each text, cut to `max_tokens`. Raises InvalidArgument for no texts, or texts without tokens."""
    if not texts:
        raise InvalidArgument(f"{field} has no rows; a batch needs at least one sample")
    for i, text in enumerate(texts):
        check_text(text, f"{field}[{i}]")
    rows = [ids[:max_tokens] for ids in tokenize(texts)]
    for i, row in enumerate(rows):
        if not row:
            raise InvalidArgument(f"{field}[{i}] has no tokens, expected a text that is not empty")
    return rows


def _from_ids(tokens: np.ndarray, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if tokens.dtype.kind not in "iu":
        raise InvalidArgument(f"tokens has dtype {tokens.dtype.name}, expected an integer type")
    if tokens.ndim == 2 and len(tokens) == 0:
        raise InvalidArgument("tokens has no rows; a batch needs at least one sample")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InvalidArgument(f"tokens has shape {list(tokens.shape)}, expected [B, T] with T of at least 1")
    if lengths is None:
        lengths = np.full(len(tokens), tokens.shape[1])
    if lengths.dtype.kind not in "iu" or lengths.shape != (len(tokens),):
        raise InvalidArgument(
            f"lengths is {lengths.dtype.name} of shape {list(lengths.shape)}, expected integers of [{len(tokens)}]"
        )
    wrong = (lengths < 1) | (lengths > tokens.shape[1])
    if wrong.any():
        i = int(np.argmax(wrong))
        raise InvalidArgument(f"lengths[{i}] is {lengths[i]}, expected a value from 1 to {tokens.shape[1]}")
    return tokens.astype(np.int64), lengths.astype(np.int64)


def check_cotangent(cotangent: np.ndarray, samples: int) -> np.ndarray:
    """The cotangent as float32 [B].

    Raises:
        InvalidArgument: it can't teach: wrong shape, not finite, absurdly large, or constant.
    """
    if cotangent.dtype.kind != "f" or cotangent.shape != (samples,):
        raise InvalidArgument(
            f"cotangent is {cotangent.dtype.name} of shape {list(cotangent.shape)}, expected floats of [{samples}], "
            f"one a sample of the inputs"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(cotangent, dtype=np.float32)
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values)))
        raise InvalidArgument(f"cotangent[{i}] is {cotangent[i]}, expected finite numbers").because("not_finite")
    if (largest := np.abs(values).max(initial=0.0)) > LARGEST_COTANGENT:
        raise InvalidArgument(
            f"cotangent reaches {largest:g} in size, expected at most {LARGEST_COTANGENT:g}; is a loss scale in it?"
        ).because("absurd")
    if samples < 2 or (values == values[0]).all():
        raise InvalidArgument(
            f"cotangent is the same for all {samples} samples ({values[0]:g}), so there is nothing to learn from it; "
            "check that the losses depend on the parameters and that the batch has at least two samples"
        ).because("constant")
    return values


def check_probes(probes: np.ndarray | None, samples: int) -> np.ndarray | None:
    """Probes as [B] bool. Raises InvalidArgument for another shape, or values that are neither 0 nor 1."""
    if probes is None:
        return None
    if probes.dtype.kind not in "bui" or probes.shape != (samples,):
        raise InvalidArgument(
            f"probes is {probes.dtype.name} of shape {list(probes.shape)}, expected 0 or 1 (uint8) of [{samples}], "
            "one a sample of the inputs"
        )
    wrong = (probes != 0) & (probes != 1)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise InvalidArgument(f"probes[{i}] is {probes[i]}, expected 1 for a sample that was drawn evenly, else 0")
    return probes.astype(np.bool_)
