"""The background thread of a job: delivers meta-updates in order, sends heartbeats, finds a lost service again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.breaker import Backoff, jittered
from trainer_client.counters import Tally
from trainer_client.link import JobLink, lasting
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import DeadlineExceeded, ResourceExhausted, Unavailable, WeighbridgeError

FIRST_RETRY_S = 0.2
LAST_RETRY_S = 10.0


@dataclass
class _Pending:
    request: pb.MetaUpdateRequest
    since: float = field(default_factory=time.monotonic)


class Sender:
    """Owns the queue of meta-updates and the thread that empties it.

    One update is under way at a time, so the weighter learns in the order of training. A failed delivery is tried again
    with the same update id, which the service's log makes exactly-once. When the queue is full the oldest update goes:
    it is the one that would be refused as stale first. The same thread makes the breaker's trial calls (a heartbeat)
    and attaches a job that is not attached, so that the training loop waits for neither.
    """

    def __init__(self, link: JobLink, timeouts: Timeouts, limits: Limits, tally: Tally) -> None:
        self._link = link
        self._timeouts = timeouts
        self._limits = limits
        self._tally = tally
        self._changed = threading.Condition()
        self._queue: deque[_Pending] = deque()
        self._under_way = False
        self._stopping = False
        self._abandoned = False  # what is under way has been counted as dropped
        self._error: WeighbridgeError | None = None
        self._retry = Backoff(FIRST_RETRY_S, LAST_RETRY_S)
        self._retry_at = 0.0
        self._attach_backoff = Backoff(limits.breaker_period_s, limits.breaker_max_period_s)
        self._attach_at = time.monotonic() + self._attach_backoff.next_s()
        self._beat_at = time.monotonic() + jittered(limits.heartbeat_s)
        self._thread = threading.Thread(target=self._run, name=f"weighbridge-job-{link.job_id}", daemon=True)
        self._thread.start()

    def put(self, request: pb.MetaUpdateRequest) -> None:
        """Takes an update for delivery; returns at once."""
        with self._changed:
            if self._stopping:
                self._drop(1, "the job is closed")
                return
            if len(self._queue) >= self._limits.pending_updates:
                self._queue.popleft()
                self._drop(1, self._too_many())
            self._queue.append(_Pending(request))
            self._changed.notify_all()

    def wait(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether every update was delivered or given up within `timeout_s`; `until` ends the wait early."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy() or until(), timeout_s)
            return not self._busy()

    def wake(self) -> None:
        """Has the thread look again at what there is to do."""
        with self._changed:
            self._changed.notify_all()

    def take_error(self) -> WeighbridgeError | None:
        """The first update that was given up since the last time this was asked."""
        with self._changed:
            error, self._error = self._error, None
            return error

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; what is not delivered is dropped. A call under way ends by its own deadline."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            undelivered = len(self._queue) + self._under_way
            if undelivered:
                self._drop(undelivered, "the job was closed before they were delivered")
            self._queue.clear()
            self._abandoned = True

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and (delay_s := self._idle_s()) > 0:
                    self._changed.wait(delay_s)
                if self._stopping:
                    return
            self._work()
            with self._changed:
                self._changed.notify_all()

    def _idle_s(self) -> float:
        """Seconds until there is something to do."""
        now = time.monotonic()
        trial_in_s = self._link.breaker.trial_in_s()
        if trial_in_s is not None:
            return trial_in_s
        if not self._link.attached:
            return self._attach_at - now
        return min(self._retry_at, self._beat_at) - now if self._queue else self._beat_at - now

    def _work(self) -> None:
        if not self._link.attached:
            self._attach()
        elif self._link.breaker.is_open or time.monotonic() >= self._beat_at:
            self._beat()
        else:
            self._deliver()

    def _attach(self) -> None:
        try:
            self._link.attach(self._timeouts.admin_s, trial=True)
            self._attach_backoff.reset()
        except WeighbridgeError as exc:
            self._tally.warn_once(f"attach {exc.code}", f"the job can't be attached, uniform weights: {exc.message}")
        self._attach_at = time.monotonic() + self._attach_backoff.next_s()

    def _beat(self) -> None:
        request = pb.HeartbeatRequest(job_id=self._link.job_id, fallback_steps=self._tally.snapshot().failed_steps)
        try:
            answer = self._link.call("Heartbeat", request, self._timeouts.score_s, trial=True)
            self._link.heard(answer.applied_position)
        except WeighbridgeError as exc:
            self._tally.warn_once(f"heartbeat {exc.code}", f"a heartbeat failed: {exc.message}")
        self._beat_at = time.monotonic() + jittered(self._limits.heartbeat_s)

    def _deliver(self) -> None:
        with self._changed:
            if not self._queue:
                return
            pending = self._queue.popleft()
            if time.monotonic() - pending.since > self._limits.update_age_s:
                step = pending.request.step
                self._give_up(Unavailable(f"the update of step {step} could not be delivered in time"))
                return
            self._under_way = True
        outcome = self._outcome(pending)
        with self._changed:
            self._under_way = False
            if not self._abandoned:
                self._settle(pending, outcome)

    def _outcome(self, pending: _Pending) -> pb.MetaUpdateResponse | WeighbridgeError:
        try:
            response: pb.MetaUpdateResponse = self._link.call(
                "MetaUpdate", pending.request, self._timeouts.meta_update_s
            )
            return response
        except WeighbridgeError as exc:
            return exc

    def _settle(self, pending: _Pending, outcome: pb.MetaUpdateResponse | WeighbridgeError) -> None:
        request = pending.request
        if isinstance(outcome, WeighbridgeError):
            passing = isinstance(outcome, Unavailable | DeadlineExceeded | ResourceExhausted) and not lasting(outcome)
            if passing or not self._link.attached:
                self._put_back(pending, outcome)
            else:
                self._refuse(request, outcome)
            return
        self._retry.reset()
        self._link.acknowledged(request.step, outcome.position)
        self._tally.add("updates_acknowledged")
        if outcome.duplicate:
            self._tally.add("updates_duplicate")

    def _put_back(self, pending: _Pending, exc: WeighbridgeError) -> None:
        self._tally.warn_once(f"retry {exc.code}", f"a meta-update will be sent again: {exc.message}")
        self._retry_at = time.monotonic() + self._retry.next_s()
        if self._stopping:
            self._drop(1, "the job was closed before they were delivered")
        elif len(self._queue) >= self._limits.pending_updates:
            self._drop(1, self._too_many())
        else:
            self._queue.appendleft(pending)

    # ---- Endings of an update ---------------------------------------------------------------------------------------

    def _refuse(self, request: pb.MetaUpdateRequest, exc: WeighbridgeError) -> None:
        self._tally.add("updates_refused")
        self._tally.warn_once(
            f"refused {exc.code}", f"the meta-update of step {request.step} was refused: {exc.message}"
        )
        self._keep(exc)

    def _give_up(self, exc: WeighbridgeError) -> None:
        self._drop(1, exc.message)
        self._keep(exc)

    def _keep(self, exc: WeighbridgeError) -> None:
        with self._changed:
            self._error = self._error or exc

    def _drop(self, count: int, reason: str) -> None:
        self._tally.add("updates_dropped", count)
        self._tally.warn_once("dropped", f"{count} meta-updates were dropped: {reason}")

    def _too_many(self) -> str:
        return f"more than {self._limits.pending_updates} wait for delivery, the oldest goes"

    def _busy(self) -> bool:
        return bool(self._queue) or self._under_way
