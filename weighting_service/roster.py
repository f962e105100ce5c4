"""The weighters that a service has: brought up, followed, found by name, kept in step with a shared log.

Belongs to the service's event loop; learning runs on the follower's thread, log calls on the I/O thread. What other
services do to a shared log shows here as if it had been done here. Use cases are in hosting.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weighting_contract.errors import FailedPrecondition, NotFound, Unavailable, WeighbridgeError
from weighting_service.core import Core
from weighting_service.domain import JobRecord, JobStatistics, WeighterRecord
from weighting_service.follower import PASSING, Follower
from weighting_service.inputs import Tokenize
from weighting_service.log_watch import LogWatch
from weighting_service.snapshots import SnapshotStore
from weighting_service.states import Hosted, States
from weighting_service.texts import load_tokenizer
from weighting_service.weighter import Weighter

log = logging.getLogger(__name__)

RETRY_S = 5.0  # between two attempts to bring up a weighter whose snapshots could not be read


@dataclass
class Entry:
    """A hosted weighter with what the loop keeps about it."""

    hosted: Hosted
    head: int
    tokenize: Tokenize | None = None
    open_jobs: dict[str, JobRecord] = field(default_factory=dict)
    duplicates: int = 0
    refused: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: bool = False
    lost: bool = False  # the log forgot it without a deletion

    @property
    def record(self) -> WeighterRecord:
        return self.hosted.record

    @property
    def weighter(self) -> Weighter:
        return self.hosted.weighter

    @property
    def applied(self) -> int:
        return self.hosted.weighter.published.position


@dataclass(frozen=True)
class Failed:
    """A weighter that could not be brought up."""

    record: WeighterRecord
    reason: str
    passing: bool  # it may be possible later

    @property
    def uid(self) -> str:
        return self.record.uid


class Roster:
    """All weighters of one service, by name. `await start()` before use.

    Attributes:
        on_records_changed: called when another service changed records of weighters or jobs, with all seen here.
    """

    def __init__(self, core: Core, snapshots: SnapshotStore, *, device: torch.device, models_dir: Path | None) -> None:
        self._core = core
        self._snapshots = snapshots
        self._models_dir = models_dir
        self._states = States(core.log, snapshots, device=device, models_dir=models_dir)
        self._follower = Follower(
            core.log,
            self._states,
            snapshot_every=core.limits.snapshot_every,
            updates_kept=core.limits.updates_kept,
            on_applied=self._on_applied,
        )
        self._watch = LogWatch(core, self._heads, self._saw_heads, self._records_changed, self._retry_is_due)
        self.on_records_changed: list[Callable[[], None]] = []
        self._entries: dict[str, Entry] = {}  # by name
        self._by_uid: dict[str, Entry] = {}
        self._failed: dict[str, Failed] = {}  # by name
        self._retry_at = 0.0
        self._changing = asyncio.Lock()  # of records: jobs that start together ask for the same weighter

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings up every weighter of the log: newest snapshot, then replay from here on; see `wait_caught_up`."""
        self._loop = asyncio.get_running_loop()
        await self._check_log_is_theirs()
        self._follower.start()
        await self._records_changed(went_back=False)
        self._watch.start()

    async def wait_caught_up(self) -> None:
        """Until every weighter has applied what its log held."""
        for entry in list(self._entries.values()):
            await asyncio.to_thread(entry.hosted.caught_up.wait)
        self.count()

    def wake_all(self) -> None:
        """Tells everyone who waits for a position to look again."""
        for entry in self._entries.values():
            self._wake(entry)

    async def stop(self) -> None:
        """Ends the learning thread; every weighter that moved leaves a snapshot."""
        await self._watch.stop()
        await asyncio.to_thread(self._follower.stop)

    @property
    def learning_alive(self) -> bool:
        return self._follower.alive

    # ---- Finding ----------------------------------------------------------------------------------------------------

    async def find(self, name: str) -> Entry:
        """The weighter of that name, also where another service has just made it. Raises as `entry`."""
        if name not in self._entries and self._core.started:
            await self._watch.look()
        return self.entry(name)

    async def find_uid(self, uid: str) -> Entry | None:
        """The weighter of that uid, also where another service has just made it; None where there is none.

        Raises Unavailable where it could not be brought up.
        """
        if uid not in self._by_uid and self._core.started:
            await self._watch.look()
        for name, failed in self._failed.items():
            if failed.uid == uid:
                raise _not_served(name, failed)
        return self._by_uid.get(uid)

    async def record(self, uid: str) -> WeighterRecord | None:
        """As `find_uid`, but also of a weighter that is not served."""
        if uid not in self._by_uid and self._core.started:
            await self._watch.look()
        if entry := self._by_uid.get(uid):
            return entry.record
        return next((failed.record for failed in self._failed.values() if failed.uid == uid), None)

    def records(self) -> dict[str, WeighterRecord]:
        """All weighters by name, as far as is known; also those that are not served."""
        failed = {name: failed.record for name, failed in self._failed.items()}
        return failed | {name: entry.record for name, entry in self._entries.items()}

    async def look_for(self, entry: Entry, position: int) -> None:
        """Sees what other services appended, where a caller names a position that is not known here."""
        if position > entry.head:
            await self._watch.look()

    def entry(self, name: str) -> Entry:
        """The weighter of that name as far as is known. Raises NotFound, or Unavailable where it can't be served."""
        entry = self._entries.get(name)
        if entry is None:
            self._core.check_loaded()
            if failed := self._failed.get(name):
                raise _not_served(name, failed)
            known = ", ".join(sorted(self._entries)[:10]) or "none yet"
            raise NotFound(f"there is no weighter {name!r}; this service has: {known}")
        self._check_served(entry)
        return entry

    @staticmethod
    def _check_served(entry: Entry) -> None:
        if reason := entry.hosted.out_of_service:
            raise Unavailable(
                f"weighter {entry.record.name!r} stopped at position {entry.applied} and is not served: {reason}"
            )

    def by_uid(self, uid: str) -> Entry | None:
        return self._by_uid.get(uid)

    def open_jobs(self) -> Iterator[JobRecord]:
        for entry in self._entries.values():
            yield from entry.open_jobs.values()

    async def wait_for(self, entry: Entry, position: int) -> None:
        """Until the state has applied `position`. The caller's deadline ends the wait."""
        await self.look_for(entry, position)
        if position > entry.head:
            raise FailedPrecondition(
                f"min_position is {position}, but the log ends at {entry.head}; "
                "was the service restored from an older state?"
            )
        while entry.applied < position:
            self._core.check_open()
            if entry.deleted:
                raise NotFound(f"weighter {entry.record.name!r} was deleted")
            self._check_served(entry)
            moved = entry.moved
            if entry.applied < position:
                await moved.wait()

    def check_grown(self, entry: Entry, known: int, position: int) -> None:
        """Raises Unavailable where a new entry went to a `position` at which the log, by its `known` head, had one."""
        if position <= known:
            self._lost_updates(entry, known, position)
            self._check_served(entry)

    def log_has_grown(self, entry: Entry) -> None:
        self._follower.notify(entry.record.uid)

    def job_changed(self, entry: Entry, job: JobRecord) -> None:
        """Keeps the weighter's open jobs and their metrics."""
        if job.open:
            entry.open_jobs[job.job_id] = job
            self._show_trust(entry)
        else:
            entry.open_jobs.pop(job.job_id, None)
            self._core.metrics.forget_job(entry.record.name, job.job_id)
        self.count()

    def count(self) -> None:
        metrics = self._core.metrics
        metrics.weighters.set(len(self._entries))
        metrics.weighters_failed.set(
            len(self._failed) + sum(bool(e.hosted.out_of_service) for e in self._entries.values())
        )
        metrics.jobs_open.set(sum(len(e.open_jobs) for e in self._entries.values()))

    # ---- Inside -----------------------------------------------------------------------------------------------------

    async def _check_log_is_theirs(self) -> None:
        """Raises FailedPrecondition where the log is new, but there are snapshots of weighters that were taught."""
        heads = await self._core.run_io(self._core.log.heads)
        if heads.version > 0 or heads.positions:
            return
        try:
            taught = await asyncio.to_thread(self._snapshots.taught)
        except OSError as exc:
            raise Unavailable(f"the snapshots can't be listed: {exc}") from exc
        if taught:
            raise FailedPrecondition(
                f"the update log is empty, but there are snapshots of {len(taught)} weighters that were taught (uid "
                f"{', '.join(taught[:5])}): the log is lost, or another one; put the right one back, or move the "
                "snapshots away to begin anew. Nothing was changed"
            )

    async def _host(self, hosted: Hosted) -> Entry:
        """Takes a weighter into service. Raises FailedPrecondition where its state is beyond the log."""
        record, update_log = hosted.record, self._core.log
        uid, tokens = record.uid, record.spec.tokens
        jobs = await self._core.run_io(lambda: update_log.open_jobs(uid))
        entry = Entry(
            hosted,
            head=await self._core.run_io(lambda: update_log.head(uid)),
            tokenize=load_tokenizer(tokens.tokenizer, self._models_dir) if tokens and tokens.tokenizer else None,
            open_jobs=_by_id(jobs),
        )
        if hosted.weighter.position > entry.head:
            raise FailedPrecondition(
                f"the snapshot of weighter {record.name!r} is at position {hosted.weighter.position}, but its log ends "
                f"at {entry.head}: the log has lost updates; restore it from a back-up, or move the snapshots beyond "
                f"{entry.head} away to go on without those updates"
            )
        self._entries[record.name] = self._by_uid[uid] = entry
        self._core.metrics.position.labels(record.name).set(entry.head)
        self._show_trust(entry)
        self._follower.host(hosted)
        return entry

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.record.name], self._by_uid[entry.record.uid]
        entry.deleted = True
        self._wake(entry)
        self._follower.drop(entry.record.uid)
        self._core.metrics.forget_weighter(entry.record.name)
        self.count()

    # ---- What other services do to a shared log ---------------------------------------------------------------------

    def _heads(self) -> dict[str, int]:
        return {uid: entry.head for uid, entry in self._by_uid.items()}

    def _saw_heads(self, before: Mapping[str, int], heads: Mapping[str, int]) -> None:
        for uid, entry in list(self._by_uid.items()):
            head, known = heads.get(uid), before.get(uid, 0)
            if entry.hosted.failure:
                continue
            if head is not None and head < known:
                self._lost_updates(entry, known, head)
            elif head is not None and head > entry.head:
                self._head_is(entry, head)

    def _lost_updates(self, entry: Entry, known: int, head: int) -> None:
        self._out_of_service(
            entry,
            f"its log ended at position {known} and ends at {head} now, so the log has lost updates or is an "
            f"older copy; the state here is at {entry.hosted.weighter.position}, and nothing was overwritten: "
            "put the right log back and start the service again",
        )

    def _head_is(self, entry: Entry, position: int) -> None:
        entry.head = max(entry.head, position)
        self._core.metrics.position.labels(entry.record.name).set(entry.head)
        self.log_has_grown(entry)

    def _retry_is_due(self) -> bool:
        return time.monotonic() >= self._retry_at and any(failed.passing for failed in self._failed.values())

    async def _records_changed(self, went_back: bool) -> None:
        """Sees all records anew; `went_back`: the log has forgotten changes."""
        update_log = self._core.log
        async with self._changing:
            records = await self._core.run_io(update_log.weighters)
            self._drop_missing({record.uid for record in records}, went_back)
            retry = self._retry_is_due()
            for record in records:
                if entry := self._by_uid.get(record.uid):
                    await self._see_again(entry, record)
                elif record.name not in self._failed or (retry and self._failed[record.name].passing):
                    await self._bring_up(record)
        self.count()
        for listener in self.on_records_changed:
            listener()

    def _drop_missing(self, uids: set[str], went_back: bool) -> None:
        self._failed = {name: failed for name, failed in self._failed.items() if failed.uid in uids}
        for entry in [entry for uid, entry in self._by_uid.items() if uid not in uids]:
            if went_back:
                entry.lost = True
                self._out_of_service(
                    entry,
                    "the log has no record of it any more, without a deletion: the log is empty or an older copy; the "
                    f"state here is at position {entry.hosted.weighter.position}, and nothing was overwritten",
                )
            elif not entry.lost:
                log.info("weighter %r was deleted by another service", entry.record.name)
                self._forget(entry)

    async def _see_again(self, entry: Entry, record: WeighterRecord) -> None:
        try:
            jobs = await self._core.run_io(lambda: self._core.log.open_jobs(record.uid))
        except NotFound:  # deleted meanwhile, which the next look sees
            return
        entry.hosted.record = record
        before, entry.open_jobs = entry.open_jobs, _by_id(jobs)
        for job_id in before.keys() - entry.open_jobs.keys():
            self._core.metrics.forget_job(record.name, job_id)
        self._show_trust(entry)

    async def _bring_up(self, record: WeighterRecord) -> None:
        """Restores a weighter and takes it into service; one that can't be is kept in mind with the reason."""
        try:
            await self._host(await asyncio.to_thread(self._states.restore, record))
            self._failed.pop(record.name, None)
        except (WeighbridgeError, OSError) as exc:
            self._failed[record.name] = Failed(record, str(exc), isinstance(exc, PASSING))
            self._retry_at = time.monotonic() + RETRY_S
            log.error("weighter %r is not served: %s", record.name, exc)

    def _out_of_service(self, entry: Entry, reason: str) -> None:
        self._follower.fail(entry.hosted, reason)
        self._wake(entry)
        self.count()

    def _on_applied(self, hosted: Hosted) -> None:
        """Called on the follower's thread."""
        self._loop.call_soon_threadsafe(self._moved, hosted.record.uid)

    def _moved(self, uid: str) -> None:
        if entry := self._by_uid.get(uid):
            self._core.metrics.applied.labels(entry.record.name).set(entry.applied)
            self._show_trust(entry)
            self._wake(entry)
            self.count()

    def _show_trust(self, entry: Entry) -> None:
        statistics = entry.weighter.published.statistics.jobs
        for job_id in entry.open_jobs:
            trust = statistics.get(job_id, JobStatistics()).trust
            self._core.metrics.job_trust.labels(entry.record.name, job_id).set(trust)

    @staticmethod
    def _wake(entry: Entry) -> None:
        moved, entry.moved = entry.moved, asyncio.Event()
        moved.set()


def _not_served(name: str, failed: Failed) -> Unavailable:
    return Unavailable(f"weighter {name!r} is not served: {failed.reason}")


def _by_id(jobs: list[JobRecord]) -> dict[str, JobRecord]:
    return {job.job_id: job for job in jobs}
