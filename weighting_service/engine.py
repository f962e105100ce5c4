"""The scoring thread: owns the device for forward passes, batches Score calls, refuses overload at once.

Whose turn it is and how much a pass takes is `call_queue`'s to say. The calls of a pass share a reference, whatever
their weighters, or else a weighter. Knows references, weighters and plain data; no I/O, no asyncio.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weighting_contract.columns import batch_columns
from weighting_contract.errors import FailedPrecondition, Unavailable
from weighting_service.call_queue import CallQueue, EngineLimits, QueuedCall
from weighting_service.domain import Inputs, ScoreOptions, Scores
from weighting_service.reference import PackReport, Reference
from weighting_service.tracing import TRACER, record_pass
from weighting_service.weighter import Weighter

__all__ = ["Engine", "EngineLimits", "PassReport", "TokenRows"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRows:
    """The samples of one batch as token ids, for a reference to make the features of that a weighter reads."""

    reference: Reference
    rows: Sequence[np.ndarray]  # B rows of [T_i] int64, from `reference.check_rows`
    names: tuple[str, ...]  # of weighting_contract.columns, in the spec's order
    table: Tensor | None = None  # [buckets] float32, the job's target profile; where one of the names needs it
    tokens: np.ndarray | None = None  # [B, T] int64, the rows padded on the right; goes with the table
    scope: str = ""  # whose samples they are; what is known of one's is not known of another's

    @property
    def samples(self) -> int:
        return len(self.rows)

    @cached_property
    def token_count(self) -> int:
        """Real tokens that the reference reads."""
        return int(np.minimum(self._lengths, self.reference.max_tokens).sum())

    @cached_property
    def _lengths(self) -> np.ndarray:
        """[B] tokens of each row, uncut."""
        return np.array([len(row) for row in self.rows])

    def features(self, raw: Tensor) -> np.ndarray:
        """[B, F] float32 from the reference's raw statistics; the profile's n-grams are those of whole rows, uncut."""
        tokens = mask = None
        if self.tokens is not None:
            tokens = torch.from_numpy(self.tokens)
            mask = torch.from_numpy(np.arange(self.tokens.shape[1]) < self._lengths[:, None])
        columns = batch_columns(raw, self.names, tokens=tokens, mask=mask, table=self.table)
        return columns.numpy()


@dataclass(frozen=True)
class PassReport:
    """One pass, for metrics."""

    calls: int
    samples: int
    tokens: int
    device_s: float  # forward passes of reference and weighters
    longest_wait_s: float
    reference: str = ""  # its name; empty: none was needed
    reference_s: float = 0.0  # its share of device_s
    packing: PackReport | None = None


@dataclass(eq=False, kw_only=True)
class _Call(QueuedCall):
    weighter: Weighter
    batch: Inputs | TokenRows
    options: ScoreOptions
    trace: object | None  # where its caller is in it
    computed: int = 0  # samples that the reference computed for it


def _call(queue: str, weighter: Weighter, batch: Inputs | TokenRows, options: ScoreOptions) -> _Call:
    reference = batch.reference if isinstance(batch, TokenRows) else None
    return _Call(
        queue,
        reference or weighter,
        batch.samples,
        batch.token_count,
        Future(),
        reference.tokens_per_pack if reference else 0,  # less than one pack would leave the device idle
        weighter=weighter,
        batch=batch,
        options=options,
        trace=TRACER.current(),
    )


class Engine:
    """Runs Score calls on one thread. `start` before use; `stop` answers what is queued with Unavailable."""

    def __init__(self, limits: EngineLimits | None = None, on_pass: Callable[[PassReport], None] | None = None):
        self._on_pass = on_pass
        self._queue: CallQueue[_Call] = CallQueue(limits or EngineLimits())
        self._pings: list[Future[None]] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="weighbridge-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def queued_calls(self) -> int:
        return self._queue.calls

    def retry_after_s(self) -> float:
        """When what waits now should be done, by the speed of the last passes."""
        return self._queue.retry_after_s()

    def score(self, queue: str, weighter: Weighter, batch: Inputs | TokenRows, options: ScoreOptions) -> Future[Scores]:
        """The scores of one batch, soon; with the reference's statistics where it came as token rows.

        Cancelling the future drops the call if it has not reached the device. It fails with ResourceExhausted where the
        call had to make room for others, or waited for too long.

        Args:
            queue: whose turn the call waits for, such as a job's id.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: the engine is stopping.
        """
        call = _call(queue, weighter, batch, options)
        with self._changed:
            if self._stopping:
                raise Unavailable("the service is stopping; use another one or try again when it is back")
            self._queue.add(call)
            self._changed.notify()
        return call.future

    def ping(self) -> Future[None]:
        """Resolves when the thread has come round: liveness."""
        future: Future[None] = Future()
        with self._changed:
            if self._stopping:
                raise Unavailable("the service is stopping")
            self._pings.append(future)
            self._changed.notify()
        return future

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._queue.calls or self._pings)
                pings, self._pings = self._pings, []
                if self._stopping:
                    self._queue.refuse_all("the service stopped before the batch was scored")
                calls = self._queue.take()
                stopping = self._stopping
            for ping in pings:
                if ping.set_running_or_notify_cancel():
                    ping.set_result(None)
            if stopping:
                return
            if calls:
                started = time.monotonic()
                self._pass(calls)
                with self._changed:
                    self._queue.finished(calls, time.monotonic() - started)

    def _pass(self, calls: list[_Call]) -> None:
        """Features of all calls that a reference makes them for, then the scores of each weighter's calls."""
        started = time.monotonic()
        reference, reference_s, packing = "", 0.0, None
        key = calls[0].key
        ready = [(call, call.batch) for call in calls if isinstance(call.batch, Inputs)]
        if isinstance(key, Reference):
            ready, packing = _with_features(key, calls)
            reference, reference_s = key.name, time.monotonic() - started
        groups: dict[int, list[tuple[_Call, Inputs]]] = {}
        for call, inputs in ready:
            groups.setdefault(id(call.weighter), []).append((call, inputs))
        device_s = reference_s + sum(_score(group) for group in groups.values())
        samples, tokens = sum(call.samples for call in calls), sum(call.tokens for call in calls)
        record_pass([(call.trace, call.queued_at) for call in calls], started, samples, tokens)
        if self._on_pass:
            self._on_pass(
                PassReport(
                    calls=len(calls),
                    samples=samples,
                    tokens=tokens,
                    device_s=device_s,
                    longest_wait_s=started - min(call.queued_at for call in calls),
                    reference=reference,
                    reference_s=reference_s,
                    packing=packing,
                )
            )


def _with_features(reference: Reference, calls: list[_Call]) -> tuple[list[tuple[_Call, Inputs]], PackReport | None]:
    """The calls with the features that the reference gives them; those that get none have their answer already."""
    batches = [(call, call.batch) for call in calls if isinstance(call.batch, TokenRows)]
    try:
        scopes = [batch.scope for _, batch in batches]
        raws = reference.raw_statistics_of([batch.rows for _, batch in batches], scopes)
    except Exception as exc:  # whatever the model raises must reach the callers, and the thread must live on
        _fail(calls, exc)
        return [], None
    ready = []
    for (call, batch), raw, computed in zip(batches, raws, reference.last_report.computed_samples, strict=True):
        call.computed = computed
        try:
            features = batch.features(raw)
        except Exception as exc:
            _fail([call], exc)
            continue
        finite = np.isfinite(features).all(1)
        if finite.all():
            ready.append((call, Inputs(features=features)))
        else:
            call.future.set_exception(
                FailedPrecondition(
                    f"the reference {reference.name!r} gives losses that are not finite for sample "
                    f"{int(np.argmin(finite))}; use another reference, or make it again"
                )
            )
    return ready, reference.last_report


def _score(group: list[tuple[_Call, Inputs]]) -> float:
    """Answers calls of one weighter; returns the seconds that its forward pass took."""
    calls, inputs = zip(*group, strict=True)
    started = time.monotonic()
    try:
        results = calls[0].weighter.score(inputs, [call.options for call in calls])
        elapsed = time.monotonic() - started
    except Exception as exc:
        _fail(calls, exc)
        return 0.0
    for call, given, scores in zip(calls, inputs, results, strict=True):
        statistics = given.features if isinstance(call.batch, TokenRows) else None
        call.future.set_result(replace(scores, statistics=statistics, computed_samples=call.computed))
    return elapsed


def _fail(calls: Sequence[_Call], exc: Exception) -> None:
    log.error("scoring %d calls failed", len(calls), exc_info=exc)
    for call in calls:
        call.future.set_exception(exc)
