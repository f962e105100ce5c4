"""The learning thread: follows the update logs of all hosted weighters and applies their entries in order.

Recovery, live learning and following another replica's updates are the same thing: read what comes after the applied
position, apply it, take a snapshot every so often. Knows the log, the snapshots and the weighter; no transport.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from weighting_contract.errors import FailedPrecondition
from weighting_service.domain import WeighterRecord
from weighting_service.snapshots import SnapshotStore
from weighting_service.update_log import UpdateLog
from weighting_service.weighter import Weighter

log = logging.getLogger(__name__)

READ_LIMIT = 64  # entries a turn, so that no weighter keeps the others waiting


@dataclass
class Hosted:
    """A weighter as this process serves it. Only the follower applies updates and takes snapshots."""

    record: WeighterRecord
    weighter: Weighter
    snapshot_position: int = -1
    failure: str = ""  # why its state can't be vouched for; empty: it can
    caught_up: threading.Event = field(default_factory=threading.Event)


class Follower:
    """Applies log entries on one thread and calls `on_applied(hosted)` after each turn that moved a position."""

    def __init__(
        self,
        update_log: UpdateLog,
        snapshots: SnapshotStore,
        *,
        snapshot_every: int,
        on_applied: Callable[[Hosted], None],
    ) -> None:
        self._log = update_log
        self._snapshots = snapshots
        self._snapshot_every = snapshot_every
        self._on_applied = on_applied
        self._hosted: dict[str, Hosted] = {}
        self._behind: set[str] = set()
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="weighbridge-follower", daemon=True)

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
            if not hosted.failure and hosted.weighter.position > hosted.snapshot_position:
                self._snapshot(hosted)

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
            self._behind.add(uid)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._behind)
                if self._stopping:
                    return
                turn = [self._hosted[uid] for uid in self._behind if uid in self._hosted]
                self._behind.clear()
            for hosted in turn:
                self._advance(hosted)

    def _advance(self, hosted: Hosted) -> None:
        uid, weighter = hosted.record.uid, hosted.weighter
        if hosted.failure:
            return
        try:
            entries = self._log.read(uid, after=weighter.position, limit=READ_LIMIT)
            for position, update in entries:
                if position != weighter.position + 1:
                    raise FailedPrecondition(
                        f"the log goes on at position {position}, but the state is at {weighter.position}"
                    )
                weighter.apply(position, update)
                if position - hosted.snapshot_position >= self._snapshot_every:
                    self._snapshot(hosted)
                if self._stopping:
                    return
        except Exception as exc:  # a state that can't be vouched for is never served; what is on disk stays as it is
            if uid in self._hosted:  # else it was deleted meanwhile
                hosted.failure = f"{type(exc).__name__}: {exc}"
                log.exception("weighter %r stops at position %d", hosted.record.name, weighter.position)
            hosted.caught_up.set()
        else:
            if len(entries) == READ_LIMIT:
                self.notify(uid)
            else:
                hosted.caught_up.set()
        self._on_applied(hosted)

    def _snapshot(self, hosted: Hosted) -> None:
        """A snapshot bounds replay; without one nothing is lost, so a failure is reported and learning goes on."""
        weighter = hosted.weighter
        try:
            self._snapshots.save(
                hosted.record.uid, weighter.position, weighter.state_tensors(), weighter.state_metadata()
            )
        except OSError:
            log.exception("no snapshot of weighter %r at position %d", hosted.record.name, weighter.position)
        hosted.snapshot_position = weighter.position
