"""The scoring thread: owns the device for forward passes, batches Score calls, refuses overload at once.

Calls wait in one queue a job and are taken from the jobs in turn, so that a noisy job waits behind its own calls, not
in front of everybody's. One forward pass takes calls of one weighter up to a budget of samples and tokens. Knows
weighters and plain data; no I/O, no asyncio.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from weighting_contract.errors import ResourceExhausted, Unavailable
from weighting_service.domain import Inputs, Scores
from weighting_service.weighter import Weighter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the queue and of one forward pass."""

    queued_calls: int = 256
    queued_samples: int = 262_144
    samples_per_pass: int = 8192
    tokens_per_pass: int = 65_536  # padded; a single call that is larger still runs, alone


@dataclass(frozen=True)
class PassReport:
    """One forward pass, for metrics."""

    calls: int
    samples: int
    tokens: int
    device_s: float
    longest_wait_s: float


@dataclass
class _Call:
    weighter: Weighter
    inputs: Inputs
    future: Future[Scores]
    queued_at: float


class Engine:
    """Runs Score calls on one thread. `start` before use; `stop` answers what is queued with Unavailable."""

    def __init__(self, limits: EngineLimits = EngineLimits(), on_pass: Callable[[PassReport], None] | None = None):
        self._limits = limits
        self._on_pass = on_pass
        self._queues: OrderedDict[str, deque[_Call]] = OrderedDict()
        self._pings: list[Future[None]] = []
        self._calls = 0
        self._samples = 0
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
        return self._calls

    def score(self, job_id: str, weighter: Weighter, inputs: Inputs) -> Future[Scores]:
        """The scores of one batch, soon. Cancelling the future drops the call if it has not reached the device.

        Raises ResourceExhausted when the queue is full, Unavailable when the engine is stopping.
        """
        future: Future[Scores] = Future()
        with self._changed:
            if self._stopping:
                raise Unavailable("the service is stopping; use another one or try again when it is back")
            if self._calls >= self._limits.queued_calls or (
                self._calls and self._samples + inputs.samples > self._limits.queued_samples
            ):
                raise ResourceExhausted(
                    f"{self._calls} calls with {self._samples} samples are waiting to be scored, as many as this "
                    "service queues; try again shortly or add a service",
                    retry_after_s=1.0,
                )
            self._queues.setdefault(job_id, deque()).append(_Call(weighter, inputs, future, time.monotonic()))
            self._calls += 1
            self._samples += inputs.samples
            self._changed.notify()
        return future

    def ping(self) -> Future[None]:
        """Resolves when the thread has come round: liveness."""
        future: Future[None] = Future()
        with self._changed:
            if self._stopping:
                raise Unavailable("the service is stopping")
            self._pings.append(future)
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._calls or self._pings)
                pings, self._pings = self._pings, []
                if self._stopping:
                    self._refuse_all()
                batch = self._take()
                stopping = self._stopping
            for ping in pings:
                if ping.set_running_or_notify_cancel():
                    ping.set_result(None)
            if stopping:
                return
            if batch:
                self._score(batch)

    def _take(self) -> list[_Call]:
        """Calls for one forward pass: one weighter's, from the jobs in turn, within the budget; no cancelled ones."""
        batch: list[_Call] = []
        samples = tokens = 0
        skipped: set[str] = set()
        while len(skipped) < len(self._queues):
            job_id = next(iter(self._queues))
            queue = self._queues[job_id]
            call = queue[0]
            if call.future.cancelled():
                self._drop_first(job_id)
                continue
            self._queues.move_to_end(job_id)
            fits = (
                samples + call.inputs.samples <= self._limits.samples_per_pass
                and tokens + call.inputs.token_count <= self._limits.tokens_per_pass
            )
            if job_id in skipped or (batch and (call.weighter is not batch[0].weighter or not fits)):
                skipped.add(job_id)
                continue
            self._drop_first(job_id)
            if call.future.set_running_or_notify_cancel():
                batch.append(call)
                samples += call.inputs.samples
                tokens += call.inputs.token_count
        return batch

    def _drop_first(self, job_id: str) -> None:
        call = self._queues[job_id].popleft()
        self._calls -= 1
        self._samples -= call.inputs.samples
        if not self._queues[job_id]:
            del self._queues[job_id]

    def _refuse_all(self) -> None:
        for queue in self._queues.values():
            for call in queue:
                if call.future.set_running_or_notify_cancel():
                    call.future.set_exception(Unavailable("the service stopped before the batch was scored"))
        self._queues.clear()
        self._calls = self._samples = 0

    def _score(self, batch: list[_Call]) -> None:
        started = time.monotonic()
        try:
            scores = batch[0].weighter.score([call.inputs for call in batch])
            device_s = time.monotonic() - started
        except Exception as exc:  # whatever the model raises must reach the callers, and the thread must live on
            log.exception("scoring %d calls failed", len(batch))
            for call in batch:
                call.future.set_exception(exc)
            return
        for call, result in zip(batch, scores, strict=True):
            call.future.set_result(result)
        if self._on_pass:
            self._on_pass(
                PassReport(
                    calls=len(batch),
                    samples=sum(c.inputs.samples for c in batch),
                    tokens=sum(c.inputs.token_count for c in batch),
                    device_s=device_s,
                    longest_wait_s=started - min(c.queued_at for c in batch),
                )
            )
