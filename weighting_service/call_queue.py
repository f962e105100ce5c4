"""The calls that wait for the device: one queue a job, bounded, so that no job keeps the others waiting for long.

Who was served longest ago is first; a pass takes calls from the jobs in turn, and no more than it gets done in a few
milliseconds, for whoever comes meanwhile waits for its end. Where the queue is full, the newest calls of the jobs that
wait with most make room. Knows sizes and futures; neither model nor thread: the engine's lock is held around every
method.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from weighting_contract.errors import ResourceExhausted, Unavailable

SPEED_MEMORY = 0.9  # decay a pass of the measured seconds a sample
LEAST_RETRY_S, MOST_RETRY_S = 0.05, 10.0
REMEMBERED_QUEUES = 4096  # of which it is known when they were served


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the queue and of one pass. A single call that is larger than a bound runs all the same, alone."""

    queued_calls: int = 256
    queued_samples: int = 262_144
    queued_tokens: int = 16_777_216
    queue_wait_s: float = 30.0  # longest that a call waits for the device
    samples_per_pass: int = 8192
    tokens_per_pass: int = 65_536
    pass_s: float = 0.005  # what a pass of several calls aims at


@dataclass(eq=False)
class QueuedCall:
    """What the queue knows of a call."""

    queue: str  # whose turn it waits for, such as a job's id
    key: object  # what does the work: calls of one pass agree in it
    samples: int
    tokens: int
    future: Future[Any]
    least_budget: int = 0  # tokens that a pass of this key may take, whatever `tokens_per_pass` says
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> int:
        """What it costs, roughly in proportion."""
        return self.samples + self.tokens


C = TypeVar("C", bound=QueuedCall)


class CallQueue(Generic[C]):
    """Calls by queue, first come first served within each."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._queues: dict[str, deque[C]] = {}
        self._served: dict[str, int] = {}  # queue -> number of its last turn
        self._turns = itertools.count(1)
        self._budgets: WeakKeyDictionary[object, float] = WeakKeyDictionary()  # work that a pass of a key gets done
        self._held_back = False  # whether the budget kept calls out of the last pass
        self._seconds_per_sample = 0.0
        self.calls = self.samples = self.tokens = 0

    def add(self, call: C) -> None:
        """Queues a call, if need be in place of others.

        Raises:
            ResourceExhausted: the queue is full, and none waits with more than this call's own queue.
        """
        if self._full_with(call):
            self._drop_cancelled()
        while full := self._full_with(call):
            self._make_room(call, *full)
        self._queues.setdefault(call.queue, deque()).append(call)
        self._count(call, 1)

    def take(self) -> list[C]:
        """Calls for one pass: of one key, from the queues in turn, within the budget; no cancelled or expired ones."""
        self._refuse_expired()
        taken: list[C] = []
        served: set[str] = set()  # queues with a call in the pass
        samples = tokens = 0
        self._held_back = False
        turns = deque(sorted(self._queues, key=lambda queue: self._served.get(queue, 0)))
        while turns:
            queue = turns.popleft()
            call = self._queues[queue][0]
            if taken and not call.future.cancelled():
                if call.key is not taken[0].key:
                    continue
                if not self._fits(samples + call.samples, tokens + call.tokens, call, queue not in served):
                    self._held_back = True
                    continue
            self._drop_first(queue)
            if queue in self._queues:
                turns.append(queue)
            if call.future.set_running_or_notify_cancel():
                self._served[queue] = next(self._turns)
                taken.append(call)
                served.add(queue)
                samples += call.samples
                tokens += call.tokens
        if len(self._served) > REMEMBERED_QUEUES:
            self._served = {queue: turn for queue, turn in self._served.items() if queue in self._queues}
        return taken

    def _fits(self, samples: int, tokens: int, call: C, first: bool) -> bool:
        """Whether a pass may hold as many with `call`, which is not its first, but maybe its queue's first in it.

        One small call of each queue, up to what the device takes at once, is packed however long that takes: one large
        call takes as long, and apart from each other they would take longer still.
        """
        limits = self._limits
        small = first and 0 < tokens <= call.least_budget
        return (
            samples <= limits.samples_per_pass
            and tokens <= max(limits.tokens_per_pass, call.least_budget)
            and (small or samples + tokens <= self._budgets.get(call.key, math.inf))
        )

    def finished(self, calls: list[C], took_s: float) -> None:
        """Learns from a pass what the next one of its key may hold."""
        key, work, samples = calls[0].key, sum(c.work for c in calls), sum(c.samples for c in calls)
        fit = self._limits.pass_s / max(took_s, 1e-9)
        if fit < 1:
            self._budgets[key] = work * fit
        elif self._held_back and key in self._budgets:  # more would have come along: a larger pass may do as well
            self._budgets[key] = max(self._budgets[key], work * min(fit, 2.0))
        memory = SPEED_MEMORY if self._seconds_per_sample else 0.0
        self._seconds_per_sample = memory * self._seconds_per_sample + (1 - memory) * took_s / samples

    def retry_after_s(self) -> float:
        """When what waits now should be done, by the speed of the last passes."""
        return min(max(self.samples * self._seconds_per_sample, LEAST_RETRY_S), MOST_RETRY_S)

    def refuse_all(self, reason: str) -> None:
        for call in list(self._waiting()):
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(Unavailable(reason))
        self._queues.clear()
        self.calls = self.samples = self.tokens = 0

    # ---- Room -------------------------------------------------------------------------------------------------------

    def _full_with(self, call: C) -> tuple[Callable[[C], int], str] | None:
        """What there would be too much of with one more call, as its measure and the words for it."""
        limits = self._limits
        if self.calls + 1 > limits.queued_calls:
            return _one, f"{self.calls} calls (--max-queued-calls)"
        if self.calls and self.samples + call.samples > limits.queued_samples:
            return _samples, f"{self.samples} samples (32 batches of --max-batch-samples)"
        if self.calls and self.tokens + call.tokens > limits.queued_tokens:
            return _tokens, f"{self.tokens} tokens (4 batches of --max-batch-tokens)"
        return None

    def _make_room(self, call: C, measure: Callable[[C], int], words: str) -> None:
        """Refuses the newest call of the queue that waits with most, or, where that would be the caller's, the call."""

        def load(queue: str) -> int:
            return sum(map(measure, self._queues.get(queue, ())))

        refusal = ResourceExhausted(
            f"{words} are waiting to be scored, as many as this service queues; try again shortly or add a service",
            self.retry_after_s(),
        )
        fullest = max(self._queues, key=load)
        if load(fullest) <= load(call.queue) + measure(call):
            raise refusal
        victim = self._queues[fullest][-1]
        self._remove(victim)
        if victim.future.set_running_or_notify_cancel():
            victim.future.set_exception(refusal)

    def _refuse_expired(self) -> None:
        before = time.monotonic() - self._limits.queue_wait_s
        for queue in list(self._queues):
            while queue in self._queues and self._queues[queue][0].queued_at < before:
                call = self._drop_first(queue)
                if call.future.set_running_or_notify_cancel():
                    call.future.set_exception(
                        ResourceExhausted(
                            f"the batch waited for the device for {self._limits.queue_wait_s:g} s "
                            "(--max-queue-wait-s) and was not scored; score less often or add a service",
                            self.retry_after_s(),
                        )
                    )

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._waiting() if call.future.cancelled()]:
            self._remove(call)

    # ---- Bookkeeping ------------------------------------------------------------------------------------------------

    def _waiting(self) -> Iterator[C]:
        return itertools.chain.from_iterable(self._queues.values())

    def _drop_first(self, queue: str) -> C:
        call = self._queues[queue][0]
        self._remove(call)
        return call

    def _remove(self, call: C) -> None:
        waiting = self._queues[call.queue]
        if waiting[0] is call:
            waiting.popleft()
        else:
            waiting.remove(call)
        if not waiting:
            del self._queues[call.queue]
        self._count(call, -1)

    def _count(self, call: C, sign: int) -> None:
        self.calls += sign
        self.samples += sign * call.samples
        self.tokens += sign * call.tokens


def _one(_: QueuedCall) -> int:
    return 1


def _samples(call: QueuedCall) -> int:
    return call.samples


def _tokens(call: QueuedCall) -> int:
    return call.tokens
