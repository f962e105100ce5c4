"""The background thread of a job: delivers meta-updates in order, sends heartbeats, finds a lost service again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.breaker import Backoff, jittered
from trainer_client.counters import Tally, unexpected
from trainer_client.kept import KeptUpdates
from trainer_client.link import JobLink, lasting
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable, WeighbridgeError

FIRST_RETRY_S = 0.2
LAST_RETRY_S = 10.0
QUIET_S = 0.25  # since the last answer, in which a service can't have been stopped, restored and started
ATTEMPTS_UNREAD = 3  # of an update whose answers can't be read: it may have been taken


@dataclass
class _Pending:
    request: pb.MetaUpdateRequest
    since: float = field(default_factory=time.monotonic)
    again: bool = False  # acknowledged before, by a service that has lost it
    unread: int = 0  # answers to it that could not be read


class Sender:
    """Owns the queue of meta-updates and the thread that empties it.

    One update is under way at a time, so the weighter learns in the order of training. A failed delivery is tried again
    with the same update id, which the service's log makes exactly-once. When the queue is full the oldest update goes:
    it is the one that would be refused as stale first. Acknowledged ones that an older service lacks are sent again
    before all others. The same thread makes the breaker's trial calls (a heartbeat)
    and attaches a job that is not attached, so that the training loop waits for neither.
    """

    def __init__(self, link: JobLink, timeouts: Timeouts, limits: Limits, tally: Tally) -> None:
        self._link = link
        self._timeouts = timeouts
        self._limits = limits
        self._tally = tally
        self._changed = threading.Condition()
        self._queue: deque[_Pending] = deque()
        self._again: deque[_Pending] = deque()  # goes before the queue
        self._kept = KeptUpdates(limits.kept_updates)
        self._under_way = False
        self._stopping = False
        self._abandoned = False  # what is under way has been counted as dropped
        self._error: WeighbridgeError | None = None
        self._rewinds = 0  # of the link's, as far as they were looked at
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

    def kept(self) -> list[str]:
        """The acknowledged updates that are kept, as JSON values."""
        with self._changed:
            return self._kept.state()

    def keep(self, state: Any) -> None:
        """Keeps those of a checkpoint in place of one's own. Raises InvalidArgument where these are none."""
        with self._changed:
            self._kept.load(state)
            self._again.clear()

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
            self._again.clear()
            self._abandoned = True

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and (delay_s := self._idle_s()) > 0:
                    self._changed.wait(delay_s)
                if self._stopping:
                    return
            try:
                self._work()
            except Exception as exc:  # whatever it is, the updates to come are to be delivered
                self._tally.warn_once("thread", "delivering in the background failed", unexpected("delivery", exc))
                with self._changed:
                    self._changed.wait(0 if self._stopping else self._retry.next_s())
            with self._changed:
                self._changed.notify_all()

    def _idle_s(self) -> float:
        """Seconds until there is something to do."""
        now = time.monotonic()
        if self._link.stopped:
            return 0 if self._queue else LAST_RETRY_S
        trial_in_s = self._link.breaker.trial_in_s()
        if trial_in_s is not None:
            return trial_in_s
        if not self._link.attached:
            return self._attach_at - now
        waiting = self._queue or self._again or self._link.rewinds != self._rewinds
        return min(self._retry_at, self._beat_at) - now if waiting else self._beat_at - now

    def _work(self) -> None:
        if self._link.stopped:
            self._drop_all("the job has stopped")
        elif not self._link.attached:
            self._attach()
        elif self._link.breaker.is_open or time.monotonic() >= min(self._beat_at, self._link.answered_at + QUIET_S):
            self._beat()
        else:
            self._deliver()

    def _attach(self) -> None:
        try:
            self._link.attach(self._timeouts.admin_s, trial=True)
            self._attach_backoff.reset()
        except WeighbridgeError as exc:
            if not self._link.stopped:
                message = f"the job can't be attached, uniform weights: {exc.message}"
                self._tally.warn_once(f"attach {exc.code}", message)
        self._attach_at = time.monotonic() + self._attach_backoff.next_s()

    def _beat(self) -> None:
        request = pb.HeartbeatRequest(job_id=self._link.job_id, fallback_steps=self._tally.snapshot().failed_steps)
        was_away = self._link.away
        try:
            answer = self._link.call("Heartbeat", request, self._timeouts.score_s, trial=True)
            self._link.heard(answer.applied_position)
            if was_away or answer.position < self._link.last_position:
                self._link.attach(self._timeouts.admin_s)  # it may have been restored: opening the job shows it
        except WeighbridgeError as exc:
            self._tally.warn_once(f"heartbeat {exc.code}", f"a heartbeat failed: {exc.message}")
        self._beat_at = time.monotonic() + jittered(self._limits.heartbeat_s)

    def _deliver(self) -> None:
        with self._changed:
            self._look_for_lost()
            queue = self._again or self._queue
            if not queue:
                return
            pending = queue.popleft()
            if time.monotonic() - pending.since > self._limits.update_age_s:
                step = pending.request.step
                self._give_up(pending, Unavailable(f"the update of step {step} could not be delivered in time"))
                return
            self._under_way = True
        outcome = self._outcome(pending)
        with self._changed:
            self._under_way = False
            if not self._abandoned:
                self._settle(pending, outcome)

    def _look_for_lost(self) -> None:
        """Puts what an older service may have lost before everything else; what it has is a duplicate."""
        if self._rewinds != self._link.rewinds:
            self._rewinds = self._link.rewinds
            self._again = deque(_Pending(update, again=True) for update in self._kept.all())

    def _outcome(self, pending: _Pending) -> pb.MetaUpdateResponse | WeighbridgeError:
        if self._rewinds:  # positions of the state that was lost mean nothing in the one that there is
            pending.request.scored_position = min(pending.request.scored_position, self._link.position)
        try:
            known, timeout_s = self._link.last_position, self._timeouts.meta_update_s
            response: pb.MetaUpdateResponse = self._link.call("MetaUpdate", pending.request, timeout_s)
            if response.position <= known and not response.duplicate:
                self._link.attach(self._timeouts.admin_s)  # a log that shrank
            return response
        except WeighbridgeError as exc:
            return exc
        except Exception as exc:
            return unexpected("delivery", exc)

    def _settle(self, pending: _Pending, outcome: pb.MetaUpdateResponse | WeighbridgeError) -> None:
        request = pending.request
        if isinstance(outcome, WeighbridgeError):
            if self._passing(pending, outcome) or not self._link.attached:
                self._put_back(pending, outcome)
            else:
                self._refuse(pending, outcome)
            return
        self._retry.reset()
        self._link.acknowledged(request.step, outcome.position)
        self._kept.add(request)
        if pending.again:
            self._tally.add("updates_resent", 0 if outcome.duplicate else 1)
            return
        self._tally.add("updates_acknowledged")
        if outcome.duplicate:
            self._tally.add("updates_duplicate")

    def _passing(self, pending: _Pending, exc: WeighbridgeError) -> bool:
        """Whether the update is worth another attempt."""
        if isinstance(exc, Internal):
            pending.unread += 1
            return pending.unread < ATTEMPTS_UNREAD
        return isinstance(exc, Unavailable | DeadlineExceeded | ResourceExhausted) and not lasting(exc)

    def _put_back(self, pending: _Pending, exc: WeighbridgeError) -> None:
        self._tally.warn_once(f"retry {exc.code}", f"a meta-update will be sent again: {exc.message}")
        self._retry_at = time.monotonic() + self._retry.next_s()
        if pending.again:
            self._again.appendleft(pending)
        elif self._stopping:
            self._drop(1, "the job was closed before they were delivered")
        elif len(self._queue) >= self._limits.pending_updates:
            self._drop(1, self._too_many())
        else:
            self._queue.appendleft(pending)

    # ---- Endings of an update ---------------------------------------------------------------------------------------

    def _refuse(self, pending: _Pending, exc: WeighbridgeError) -> None:
        if not pending.again:  # else it was counted when it was acknowledged
            self._tally.add("updates_refused")
        self._tally.warn_once(
            f"refused {exc.code}", f"the meta-update of step {pending.request.step} was refused: {exc.message}"
        )
        self._remember(exc)

    def _give_up(self, pending: _Pending, exc: WeighbridgeError) -> None:
        self._drop(0 if pending.again else 1, exc.message)
        self._remember(exc)

    def _drop_all(self, reason: str) -> None:
        with self._changed:
            self._drop(len(self._queue), reason)
            self._queue.clear()
            self._again.clear()

    def _remember(self, exc: WeighbridgeError) -> None:
        with self._changed:
            self._error = self._error or exc

    def _drop(self, count: int, reason: str) -> None:
        self._tally.add("updates_dropped", count)
        self._tally.warn_once("dropped", f"{count} meta-updates were dropped: {reason}")

    def _too_many(self) -> str:
        return f"more than {self._limits.pending_updates} wait for delivery, the oldest goes"

    def _busy(self) -> bool:
        return bool(self._queue or self._again) or self._under_way or self._link.rewinds != self._rewinds
