"""A job for all ranks of a data parallel run: the first one asks for the whole batch, each gets its own rows' weights.

    job = group_job(client.open_job(...) if ranks.is_first else None, ranks)
    scores = job.score(features, step)          # features of this rank's rows, of all its micro-batches
    job.meta_update(cotangent, features, step)

Knows a job and ranks; nothing of models. The batch is the rows of all ranks, in their order.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from trainer_client import wire
from trainer_client.counters import Counters, unexpected
from trainer_client.job import Estimator, Job, Scores
from trainer_client.ranks import Ranks
from weighting_contract.errors import InvalidArgument, WeighbridgeError
from weighting_contract.tensors import as_array

_ARRAYS = ("features", "hidden", "tokens", "lengths")


def group_job(job: Job | None, ranks: Ranks | None = None) -> GroupJob:
    """Shares the first rank's job with all ranks; closing the result closes it.

    Args:
        job: the first rank's; None on the others.
        ranks: None: all that there are.

    Raises:
        InvalidArgument: no job on the first rank, or one on another; as of `Ranks.agree`.
    """
    ranks = ranks or Ranks.current()
    error = None
    if (job is not None) != ranks.is_first:
        error = InvalidArgument(
            "there is no job, expected one on the first rank"
            if job is None
            else "there is a job, expected None on all ranks but the first: they get the first one's answers"
        )
    ranks.agree(error)
    return GroupJob(job, ranks)


class GroupJob:
    """As `Job`, collective: all ranks call the same methods in the same order, `close` and `counters` apart.

    Where the weighter can't be asked, all ranks get uniform weights together. What the ranks have to have in common is
    checked, and raised on all of them whatever `on_failure` says: the first one says what is wrong, the others raise
    `Elsewhere`.
    """

    def __init__(self, job: Job | None, ranks: Ranks) -> None:
        self._job, self.ranks = job, ranks

    def score(
        self,
        features: Any = None,
        step: int = 0,
        *,
        hidden: Any = None,
        tokens: Any = None,
        lengths: Any = None,
        texts: Any = None,
        min_position: int | None = None,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Scores:
        """Weights for the batch of an optimiser step, as of `Job.score`.

        Args:
            features, hidden, tokens, lengths, texts: of this rank's rows, those of all its micro-batches; ranks may
                differ in their number. Rows of tokens may have different lengths on different ranks.

        Returns:
            Weights, logits and statistics of this rank's rows; all else is of the whole batch, whose weights have
            mean 1.

        Raises:
            InvalidArgument: the ranks disagree on the step or on the columns.
            WeighbridgeError: only with `on_failure="raise"`.
        """
        batch = wire.Batch(features, hidden, tokens, lengths, texts)
        settings: dict[str, Any] = {
            "min_position": min_position,
            "min_effective_share": min_effective_share,
            "return_statistics": return_statistics,
        }
        if self.ranks.world == 1:
            return self._own.score(**vars(batch), step=step, **settings)
        whole, rows = self._whole(batch, step)

        def ask() -> dict[str, Any]:
            return vars(self._own.score(**vars(whole), step=step, **settings))

        scores = Scores(**self.ranks.from_first(ask))
        parts = (scores.weights, scores.logits, scores.statistics)
        if len(scores.weights) != rows.total:  # nothing could be made of the inputs
            ones = np.ones(rows.mine, np.float32)
            uniform = {"weights": batch.like(ones), "logits": batch.like(0 * ones)}
            return replace(scores, **uniform, effective_sample_size=float(rows.total))
        weights, logits, statistics = (None if part is None else batch.like(part[rows.slice]) for part in parts)
        return replace(scores, weights=weights, logits=logits, statistics=statistics)

    def meta_update(
        self,
        cotangent: Any,
        features: Any = None,
        step: int = 0,
        *,
        hidden: Any = None,
        tokens: Any = None,
        lengths: Any = None,
        texts: Any = None,
        scored_position: int | None = None,
        estimator: Estimator = "vjp",
        update_id: str | None = None,
        probes: Any = None,
    ) -> None:
        """Teaches the weighter, as `Job.meta_update`, with cotangent, inputs and probes of this rank's rows.

        Raises:
            InvalidArgument: the ranks disagree on the step or on the columns.
            WeighbridgeError: only with `on_failure="raise"`.
        """
        batch = wire.Batch(features, hidden, tokens, lengths, texts)
        settings: dict[str, Any] = {
            "scored_position": scored_position,
            "estimator": estimator,
            "update_id": update_id,
        }
        if self.ranks.world == 1:
            self._own.meta_update(cotangent, **vars(batch), step=step, **settings, probes=probes)
            return
        more = {"cotangent": cotangent} if probes is None else {"cotangent": cotangent, "probes": probes}
        whole, rows = self._whole(batch, step, more)
        self.ranks.from_first(
            lambda: self._own.meta_update(
                rows.more.get("cotangent"), **vars(whole), step=step, **settings, probes=rows.more.get("probes")
            )
        )

    def flush(self, timeout_s: float | None = None) -> bool:
        """As `Job.flush`."""
        return self.ranks.from_first(lambda: self._own.flush(timeout_s))

    def close(self) -> None:
        """As `Job.close`. Not collective: a rank may call it on its way out of an error of its own."""
        if self._job is not None:
            self._job.close()

    def state_dict(self) -> dict[str, Any]:
        """The job's, on all ranks."""
        return self.ranks.from_first(lambda: self._own.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Job.load_state_dict`; the first rank's state counts."""
        self.ranks.from_first(lambda: self._own.load_state_dict(state))

    @property
    def counters(self) -> Counters:
        """The job's on the first rank; nothing on the others. Not collective."""
        return Counters() if self._job is None else self._job.counters

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _own(self) -> Job:
        assert self._job is not None  # by `group_job`: only the first rank comes here
        return self._job

    def _whole(self, batch: wire.Batch, step: int, more: dict[str, Any] | None = None) -> tuple[wire.Batch, _Rows]:
        """The batch of all ranks on the first one, in numpy, and which rows of it are whose.

        What can't be read on some rank leaves the batch empty: the job refuses it, and its policy says what follows.
        """
        try:
            arrays, error = _arrays(batch, more or {}), None
        except WeighbridgeError as exc:
            arrays, error = {}, exc
        except Exception as exc:
            arrays, error = {}, unexpected("reading the inputs", exc)
        columns = {name: _columns(name, array) for name, array in arrays.items()}
        lines = self.ranks.everyone(
            {"step": int(step), "rows": batch.rows() or 0, "error": error and error.message, "columns": columns}
        )
        self._check_common("step", [line["step"] for line in lines])
        rows = _Rows([line["rows"] for line in lines], self.ranks.rank)
        if failed := [f"rank {rank}: {line['error']}" for rank, line in enumerate(lines) if line["error"]]:
            if self._job is not None:
                self._job.tally.warn_once("unreadable inputs", failed[0])
            return wire.Batch(), rows
        self._check_common("the columns of a batch", [line["columns"] for line in lines])
        arrays = _same_width(arrays, [line["columns"] for line in lines], self.ranks)
        gathered = {name: self.ranks.gather_rows(torch.from_numpy(array)) for name, array in arrays.items()}
        texts = None
        if batch.texts is not None:
            texts = [text for part in self.ranks.everyone(list(batch.texts)) for text in part]
        if not self.ranks.is_first:
            return wire.Batch(), rows
        found = {name: tensor.numpy() for name, tensor in gathered.items() if tensor is not None}
        rows.more = {name: found.pop(name) for name in ("cotangent", "probes") if name in found}
        return wire.Batch(**found, texts=texts), rows

    def _check_common(self, what: str, values: list[Any]) -> None:
        shown = [_without_widths(value) for value in values]
        if other := [rank for rank, value in enumerate(shown) if value != shown[0]]:
            raise self.ranks.told(
                InvalidArgument(
                    f"the ranks disagree on {what}: {_said(shown[0])} on rank 0, {_said(shown[other[0]])} on rank "
                    f"{other[0]}; expected the same on all ranks"
                )
            )


class _Rows:
    """Which rows of the whole batch are this rank's."""

    def __init__(self, counts: list[int], rank: int) -> None:
        start = sum(counts[:rank])
        self.mine, self.total = counts[rank], sum(counts)
        self.slice = slice(start, start + self.mine)
        self.more: dict[str, np.ndarray] = {}  # gathered beside the batch, on the first rank


def _arrays(batch: wire.Batch, more: dict[str, Any]) -> dict[str, np.ndarray]:
    given = {name: getattr(batch, name) for name in _ARRAYS if getattr(batch, name) is not None}
    arrays = {name: np.ascontiguousarray(as_array(value, name)) for name, value in {**given, **more}.items()}
    for name, array in arrays.items():
        if len(array) != batch.rows():
            raise InvalidArgument(f"{name} has {len(array)} rows, expected {batch.rows()} as the rest of the batch")
    if batch.texts is not None and (isinstance(batch.texts, str) or not all(isinstance(t, str) for t in batch.texts)):
        raise InvalidArgument("texts must be a list with one string a sample")
    return arrays


def _columns(name: str, array: np.ndarray) -> list[Any]:
    """dtype, shape of a row. Row lengths of tokens may differ, so they come last, apart."""
    if name == "tokens" and array.ndim == 2:
        return [array.dtype.name, [], array.shape[1]]
    return [array.dtype.name, list(array.shape[1:])]


def _without_widths(value: Any) -> Any:
    return {name: kind[:2] for name, kind in value.items()} if isinstance(value, dict) else value


def _said(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {kind[0]} {kind[1]}" for name, kind in value.items()) or "none"


def _same_width(arrays: dict[str, np.ndarray], columns: list[Any], ranks: Ranks) -> dict[str, np.ndarray]:
    """Rows of tokens padded on the right to the longest of all ranks, with their lengths."""
    widths = [line["tokens"][2] for line in columns if len(line.get("tokens", ())) == 3]
    if not widths or min(widths) == max(widths):
        return arrays
    tokens = arrays["tokens"]
    padded = np.zeros((len(tokens), max(widths)), tokens.dtype)
    padded[:, : tokens.shape[1]] = tokens
    lengths = arrays.get("lengths", np.full(len(tokens), tokens.shape[1], np.int64))
    return {**arrays, "tokens": padded, "lengths": lengths}
