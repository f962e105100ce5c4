"""The learning thread: follows the update logs of all hosted weighters and applies their entries in order.

Recovery, live learning and following another replica's updates are the same thing: read what comes after the applied
position, apply it, keep a snapshot at every so many positions, trim the log behind it. Knows the log and the states; no
transport.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from weighting_contract.errors import FailedPrecondition, ResourceExhausted, Unavailable, WeighbridgeError
from weighting_service import failpoints
from weighting_service.domain import Rollback
from weighting_service.states import Hosted, States
from weighting_service.update_log import LogEntry, Trimmed, UpdateLog

log = logging.getLogger(__name__)

READ_LIMIT = 64  # entries a turn, so that no weighter keeps the others waiting
PUBLISHED_EVERY = 8  # entries of a turn: a state that scores costs a tenth of an update
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 5.0
PASSING = (Unavailable, ResourceExhausted, OSError)  # of log and storage: tried again, however long it takes


class Follower:
    """Applies log entries on one thread and calls `on_applied(hosted)` after each change that callers can see.

    Args:
        update_log: what is followed.
        states: makes, keeps and vouches for states.
        snapshot_every: positions; snapshots lie at its multiples, so that replicas can compare them.
        updates_kept: positions that the log keeps behind the oldest snapshot.
        on_applied: called on the follower's thread.
    """

    def __init__(
        self,
        update_log: UpdateLog,
        states: States,
        *,
        snapshot_every: int,
        updates_kept: int,
        on_applied: Callable[[Hosted], None],
    ) -> None:
        self._log = update_log
        self._states = states
        self._snapshot_every = snapshot_every
        self._updates_kept = updates_kept
        self._on_applied = on_applied
        self._hosted: dict[str, Hosted] = {}
        self._due: dict[str, float] = {}  # weighters that may be behind: from when on to look, monotonic
        self._retry_s: dict[str, float] = {}  # those whose log or storage does not answer: how long was waited last
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="weighbridge-follower", daemon=True)

    # ---- For the service --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the update in hand and leaves a snapshot of every weighter that moved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        for hosted in self._hosted.values():
            hosted.caught_up.set()
            vouched = not (hosted.out_of_service or hosted.checksum_due)
            if vouched and hosted.weighter.position > hosted.snapshot_position:
                self._save(hosted)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def host(self, hosted: Hosted) -> None:
        """Begins to follow a weighter's log; `hosted.caught_up` is set once it has applied what was there."""
        with self._changed:
            self._hosted[hosted.record.uid] = hosted
        self.notify(hosted.record.uid)

    def drop(self, uid: str) -> None:
        with self._changed:
            self._hosted.pop(uid, None)

    def notify(self, uid: str) -> None:
        """Says that the log of a weighter has grown."""
        with self._changed:
            self._due.setdefault(uid, 0.0)  # while storage is away, not before the next try
            self._changed.notify()

    def fail(self, hosted: Hosted, reason: str) -> None:
        """Takes a weighter out of service for good; what is stored stays as it is."""
        if not hosted.failure:
            hosted.failure = reason
            hosted.weighter.withdraw(f"weighter {hosted.record.name!r} is not served: {reason}")
            log.error(
                "weighter %r stops at position %d and is not served: %s",
                hosted.record.name,
                hosted.weighter.position,
                reason,
            )
        hosted.caught_up.set()

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            for hosted in self._next_turns():
                self._advance(hosted)

    def _next_turns(self) -> Sequence[Hosted]:
        """Waits for weighters that may be behind; none when the follower stops, or what waited was dropped."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                ready = [uid for uid, at in self._due.items() if at <= now]
                if ready:
                    for uid in ready:
                        del self._due[uid]
                    return [self._hosted[uid] for uid in ready if uid in self._hosted]
                self._changed.wait(min(self._due.values()) - now if self._due else None)
        return ()

    def _advance(self, hosted: Hosted) -> None:
        """One turn of a weighter; whatever happens in it is its own matter."""
        uid = hosted.record.uid
        if self._stopping or hosted.failure:
            return
        try:
            more = self._turn(hosted)
        except PASSING as exc:
            self._retry(hosted, exc)
        except Exception as exc:  # a state that can't be vouched for is never served; what is stored stays as it is
            if uid in self._hosted:  # else it was deleted meanwhile
                if not isinstance(exc, WeighbridgeError):
                    log.exception("weighter %r", hosted.record.name)
                self.fail(hosted, str(exc) if isinstance(exc, WeighbridgeError) else f"{type(exc).__name__}: {exc}")
            hosted.caught_up.set()
        else:
            self._is_over(hosted)
            if more:
                self.notify(uid)
            else:
                hosted.caught_up.set()
        self._on_applied(hosted)

    def _turn(self, hosted: Hosted) -> bool:
        """Applies the next entries. Whether there are more."""
        if hosted.diverged_at and not hosted.reloaded:
            self._reload(hosted)
        if hosted.checksum_due and not self._keep(hosted):
            return True
        try:
            entries = self._log.read(
                hosted.record.uid, after=hosted.weighter.position, limit=READ_LIMIT, chain=hosted.chain
            )
        except Trimmed as exc:
            self._skip_trimmed(hosted, exc)
            return True
        try:
            for number, entry in enumerate(entries, start=1):
                if self._stopping or hosted.failure:
                    return False
                failpoints.hit("during_apply")
                self._apply(hosted, entry)
                if entry.position % self._snapshot_every == 0 and not self._keep(hosted):
                    return True
                if number % PUBLISHED_EVERY == 0:
                    self._publish(hosted)
        finally:
            self._publish(hosted)
        return bool(entries)

    def _apply(self, hosted: Hosted, entry: LogEntry) -> None:
        if isinstance(entry.content, Rollback):
            self._states.put_back(hosted, entry.position, entry.content)
            log.info(
                "weighter %r is back in the state of position %d, at position %d",
                hosted.record.name,
                entry.content.to_position,
                entry.position,
            )
        else:
            hosted.weighter.apply(entry.position, entry.content, publish=False)
        hosted.chain = entry.chain

    def _publish(self, hosted: Hosted) -> None:
        if hosted.weighter.published.position != hosted.weighter.position:
            hosted.weighter.publish()
            self._on_applied(hosted)

    # ---- Snapshots --------------------------------------------------------------------------------------------------

    def _keep(self, hosted: Hosted) -> bool:
        """Compares the state with those of other replicas, keeps it, and trims the log behind the oldest that is kept.

        False where it is not the one that holds: then it is not kept, and the weighter is out of service.

        Raises:
            FailedPrecondition: that is so once more, after a reload.
        """
        hosted.checksum_due = True  # until the log has answered
        if not self._states.holds(hosted):
            self._diverged(hosted)
            return False
        hosted.checksum_due = False
        if hosted.diverged_at and hosted.weighter.position >= hosted.diverged_at:
            hosted.diverged_at, hosted.reloaded = 0, False
            hosted.weighter.withdraw("")
            log.warning("weighter %r is served again, at position %d", hosted.record.name, hosted.weighter.position)
        if not hosted.failure and self._save(hosted):
            self._trim(hosted)
        return True

    def _save(self, hosted: Hosted) -> bool:
        """A snapshot bounds replay; without one nothing is lost, so a failure is reported and learning goes on."""
        try:
            self._states.save(hosted)
        except OSError as exc:
            log.error(
                "no snapshot of weighter %r at position %d: %s", hosted.record.name, hosted.weighter.position, exc
            )
            return False
        return True

    def _trim(self, hosted: Hosted) -> None:
        """What fails here is done behind the next snapshot."""
        uid = hosted.record.uid
        try:
            failpoints.hit("after_snapshot")
            oldest = self._states.snapshots.oldest_verified(uid)
            up_to = min(hosted.weighter.position, oldest or 0) - self._updates_kept
            if up_to > 0 and up_to > self._log.trimmed(uid):
                self._log.trim(uid, up_to)
        except PASSING as exc:
            log.warning("the log of weighter %r is not trimmed for now: %s", hosted.record.name, exc)

    # ---- When something is wrong ------------------------------------------------------------------------------------

    def _diverged(self, hosted: Hosted) -> None:
        position, name = hosted.weighter.position, hosted.record.name
        if hosted.diverged_at:
            raise FailedPrecondition(
                f"the state at position {position} is not the one that holds, although it was made anew after it had "
                f"differed at {hosted.diverged_at}; look for a machine that miscalculates, and start the service again"
            )
        hosted.diverged_at = position
        hosted.weighter.withdraw(f"weighter {name!r} is not served: {hosted.out_of_service}")
        log.error(
            "the state of weighter %r at position %d is not the one that holds (%s): it is out of service until it is "
            "made anew from a snapshot",
            name,
            position,
            hosted.environment,
        )

    def _reload(self, hosted: Hosted) -> None:
        """Makes a state that diverged anew, from the newest snapshot that the log vouches for."""
        fresh = self._states.restore_vouched(hosted.record, before=hosted.diverged_at, every=self._snapshot_every)
        hosted.take_over(fresh)
        hosted.weighter.withdraw(f"weighter {hosted.record.name!r} is not served: {hosted.out_of_service}")
        hosted.reloaded = True
        log.warning("weighter %r is replayed from position %d", hosted.record.name, hosted.weighter.position)

    def _skip_trimmed(self, hosted: Hosted, exc: Trimmed) -> None:
        """Goes on from a snapshot of a faster replica, which has trimmed what comes next here."""
        newest = self._states.restore(hosted.record)
        if newest.weighter.position <= hosted.weighter.position:
            raise FailedPrecondition(
                f"{exc.message}; but no snapshot behind position {hosted.weighter.position} can be read: restore the "
                "snapshots, or the log, from a back-up"
            )
        log.warning(
            "weighter %r was at position %d, but the log is trimmed there: it goes on from the snapshot at %d",
            hosted.record.name,
            hosted.weighter.position,
            newest.weighter.position,
        )
        hosted.take_over(newest)

    def _retry(self, hosted: Hosted, exc: Exception) -> None:
        """Looks again after a while, ever longer; said once, not for each weighter and try."""
        uid = hosted.record.uid
        if not self._retry_s:
            log.warning("updates wait, and scores go on from the states that are there: %s", exc)
        wait_s = min(2 * self._retry_s.get(uid, FIRST_RETRY_S / 2), LONGEST_RETRY_S)
        self._retry_s[uid] = wait_s
        with self._changed:
            self._due[uid] = time.monotonic() + wait_s

    def _is_over(self, hosted: Hosted) -> None:
        if self._retry_s.pop(hosted.record.uid, None) is not None and not self._retry_s:
            log.warning("updates are applied again")
