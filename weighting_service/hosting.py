"""The weighters that a service hosts: created, restored, followed, watched, deleted. Knows no job's inputs.

Belongs to the service's event loop; learning runs on the follower's thread, log appends on the I/O thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WeighbridgeError,
)
from weighting_contract.spec import WeighterSpec, check_name
from weighting_service import pretaught
from weighting_service.core import Core
from weighting_service.domain import Inputs, JobRecord, JobStatistics, WeighterRecord
from weighting_service.follower import Follower, Hosted
from weighting_service.inputs import Tokenize
from weighting_service.snapshots import SnapshotStore
from weighting_service.texts import load_tokenizer
from weighting_service.views import WeighterView
from weighting_service.weighter import Weighter, load_parameters, load_weighter, weighter_files

log = logging.getLogger(__name__)


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

    @property
    def record(self) -> WeighterRecord:
        return self.hosted.record

    @property
    def weighter(self) -> Weighter:
        return self.hosted.weighter

    @property
    def applied(self) -> int:
        return self.hosted.weighter.published.position


class Weighters:
    """All weighters of one service, by name. `await start()` before use."""

    def __init__(self, core: Core, snapshots: SnapshotStore, *, device: torch.device, models_dir: Path | None) -> None:
        self._core = core
        self._snapshots = snapshots
        self._device = device
        self._models_dir = models_dir
        self._follower = Follower(
            core.log, snapshots, snapshot_every=core.limits.snapshot_every, on_applied=self._on_applied
        )
        self._entries: dict[str, Entry] = {}  # by name
        self._by_uid: dict[str, Entry] = {}
        self._failed: dict[str, str] = {}  # weighters that could not be brought up, and why
        self._creation = asyncio.Lock()  # one at a time: jobs that start together ask for the same weighter
        self._packaged: Weighter | None = None

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings up every weighter of the log: newest snapshot, then replay from here on; see `wait_caught_up`."""
        self._loop = asyncio.get_running_loop()
        self._follower.start()
        for record in await self._core.run_io(self._core.log.weighters):
            try:
                weighter, position = await asyncio.to_thread(self._restore, record)
                await self._host(record, weighter, position)
            except (WeighbridgeError, OSError) as exc:
                self._failed[record.name] = str(exc)
                log.error("weighter %r is not served: %s", record.name, exc)

    async def wait_caught_up(self) -> None:
        """Until every weighter has applied what its log held, and is warm."""
        for entry in self._entries.values():
            await asyncio.to_thread(entry.hosted.caught_up.wait)
            await asyncio.to_thread(_warm_up, entry.weighter)
        self.count()

    def wake_all(self) -> None:
        """Tells everyone who waits for a position to look again."""
        for entry in self._entries.values():
            self._wake(entry)

    async def stop(self) -> None:
        """Ends the learning thread; every weighter that moved leaves a snapshot."""
        await asyncio.to_thread(self._follower.stop)

    @property
    def learning_alive(self) -> bool:
        return self._follower.alive

    # ---- Use cases --------------------------------------------------------------------------------------------------

    async def create(self, name: str, spec: Mapping[str, Any], exist_ok: bool, initial: str) -> WeighterView:
        """A new weighter, durable when this returns; with `exist_ok` an equal one that is there already.

        Args:
            spec: plain values; what is left out has its default, or with `initial` that of the pretaught weighter.
        """
        check_name(name, "name")
        checked = await self._checked_spec(spec, initial)
        async with self._creation:
            if existing := self._entries.get(name):
                return self._existing(existing, checked, initial, exist_ok)
            return await self._create(name, checked, initial)

    async def _checked_spec(self, spec: Mapping[str, Any], initial: str) -> WeighterSpec:
        if initial not in ("", pretaught.NAME):
            raise InvalidArgument(
                f"initial is {initial!r}, expected {pretaught.NAME!r}, or nothing for fresh parameters"
            )
        if initial and not (spec.get("features") or spec.get("tokens")):
            spec = _over((await self.packaged()).spec.to_dict(), spec)
        return WeighterSpec.from_dict(dict(spec))

    async def _create(self, name: str, spec: WeighterSpec, initial: str) -> WeighterView:
        if name in self._failed:
            raise AlreadyExists(f"weighter {name!r} exists, but is not served: {self._failed[name]}")
        record = WeighterRecord(name, uuid.uuid4().hex, spec, time.time_ns() // 1_000_000, initial)
        weighter = await asyncio.to_thread(self._build, record)
        await self._core.run_io(lambda: self._core.log.create_weighter(record))
        entry = await self._host(record, weighter, 0)
        self.count()
        return view(entry)

    def _existing(self, entry: Entry, spec: WeighterSpec, initial: str, exist_ok: bool) -> WeighterView:
        record = entry.record
        if not exist_ok:
            raise AlreadyExists(f"weighter {record.name!r} exists; choose another name or set exist_ok")
        if record.spec != spec:
            raise AlreadyExists(
                f"weighter {record.name!r} exists with another spec {record.spec.to_dict()}, "
                f"asked for {spec.to_dict()}; choose another name or use the existing spec"
            )
        if record.initial != initial:
            raise AlreadyExists(
                f"weighter {record.name!r} exists and started from {record.initial or 'fresh parameters'}, asked for "
                f"{initial or 'fresh parameters'}; choose another name or ask for the same"
            )
        return view(entry)

    def views(self) -> list[WeighterView]:
        return [view(self._entries[name]) for name in sorted(self._entries)]

    async def delete(self, name: str) -> str:
        """Removes a weighter with its log, snapshots and jobs; returns its uid."""
        entry = self.entry(name)
        uid = entry.record.uid
        del self._entries[name], self._by_uid[uid]
        entry.deleted = True
        self._wake(entry)
        self._follower.drop(uid)
        await self._core.run_io(lambda: self._core.log.delete_weighter(uid))
        await self._core.run_io(lambda: self._snapshots.delete(uid))
        self._core.metrics.forget_weighter(name)
        self.count()
        return uid

    async def export(self, name: str) -> dict[str, bytes]:
        """The weighter at its applied position, as files by name."""
        return await asyncio.to_thread(weighter_files, self.entry(name).weighter)

    async def watch(self, name: str) -> AsyncIterator[WeighterView]:
        """The weighter now, and again whenever its applied position has moved."""
        entry = self.entry(name)
        sent = -1
        while not self._core.draining:
            if entry.deleted:
                raise NotFound(f"weighter {name!r} was deleted")
            moved = entry.moved
            if entry.applied != sent:
                sent = entry.applied
                yield view(entry)
            else:
                await moved.wait()
        raise Unavailable("the service is draining; watch again when it is back")

    # ---- For the other use cases ------------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """The weighter of that name. Raises NotFound, or Unavailable where it can't be served."""
        entry = self._entries.get(name)
        if entry is None:
            self._core.check_loaded()
            if name in self._failed:
                raise Unavailable(f"weighter {name!r} is not served: {self._failed[name]}")
            known = ", ".join(sorted(self._entries)[:10]) or "none yet"
            raise NotFound(f"there is no weighter {name!r}; this service has: {known}")
        if entry.hosted.failure:
            raise Unavailable(
                f"weighter {name!r} stopped at position {entry.applied} and is not served: {entry.hosted.failure}"
            )
        return entry

    def by_uid(self, uid: str) -> Entry | None:
        return self._by_uid.get(uid)

    def open_jobs(self) -> Iterator[JobRecord]:
        for entry in self._entries.values():
            yield from entry.open_jobs.values()

    async def wait_for(self, entry: Entry, position: int) -> None:
        """Until the state has applied `position`. The caller's deadline ends the wait."""
        if position > entry.head:
            raise FailedPrecondition(
                f"min_position is {position}, but the log ends at {entry.head}; "
                "was the service restored from an older state?"
            )
        while entry.applied < position:
            self._core.check_open()
            self.entry(entry.record.name)  # raises when it was deleted or has failed
            moved = entry.moved
            if entry.applied < position:
                await moved.wait()

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
        metrics.weighters_failed.set(len(self._failed) + sum(bool(e.hosted.failure) for e in self._entries.values()))
        metrics.jobs_open.set(sum(len(e.open_jobs) for e in self._entries.values()))

    async def packaged(self) -> Weighter:
        """The weighter that comes with the package, as it was taught. Raises FailedPrecondition without one."""
        if self._packaged is None:
            self._packaged = await asyncio.to_thread(_load_packaged, self._device)
        return self._packaged

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _build(self, record: WeighterRecord) -> Weighter:
        """A fresh weighter and its snapshot at position 0: later versions of torch may initialise otherwise."""
        weighter = self._initial(record)
        if record.spec.tokens and record.spec.tokens.tokenizer:
            load_tokenizer(record.spec.tokens.tokenizer, self._models_dir, weighter.vocabulary_size)
        _warm_up(weighter)
        try:
            self._snapshots.save(record.uid, 0, weighter.state_tensors(), weighter.state_metadata())
        except OSError as exc:
            raise Unavailable(
                f"weighter {record.name!r} was not created: its snapshot can't be written ({exc})"
            ) from exc
        return weighter

    def _initial(self, record: WeighterRecord) -> Weighter:
        weighter = Weighter(record.spec, device=self._device, models_dir=self._models_dir)
        if record.initial:
            load_parameters(weighter, weighter_files(_load_packaged(self._device)))
        return weighter

    def _restore(self, record: WeighterRecord) -> tuple[Weighter, int]:
        snapshot = self._snapshots.load_latest(record.uid)
        if snapshot is None and record.initial:
            raise FailedPrecondition(
                f"no snapshot of weighter {record.name!r} can be read, and its log alone is not enough: it began as "
                f"the {record.initial} weighter of the version that made it; restore its snapshots from a back-up"
            )
        if snapshot is None:
            log.warning("weighter %r has no readable snapshot; replaying its log from the start", record.name)
            return self._initial(record), -1
        weighter = Weighter(record.spec, device=self._device, models_dir=self._models_dir)
        weighter.load_state(snapshot.tensors, snapshot.metadata)
        return weighter, snapshot.position

    async def _host(self, record: WeighterRecord, weighter: Weighter, snapshot_position: int) -> Entry:
        uid, tokens, update_log = record.uid, record.spec.tokens, self._core.log
        jobs = await self._core.run_io(lambda: update_log.jobs(uid))
        entry = Entry(
            Hosted(record, weighter, snapshot_position),
            head=await self._core.run_io(lambda: update_log.head(uid)),
            tokenize=load_tokenizer(tokens.tokenizer, self._models_dir) if tokens and tokens.tokenizer else None,
            open_jobs={job.job_id: job for job in jobs if job.open},
        )
        if weighter.position > entry.head:
            raise FailedPrecondition(
                f"the snapshot of weighter {record.name!r} is at position {weighter.position}, but its log ends at "
                f"{entry.head}: the log has lost updates; restore it from a back-up"
            )
        self._entries[record.name] = self._by_uid[uid] = entry
        self._show_trust(entry)
        self._follower.host(entry.hosted)
        return entry

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


def view(entry: Entry) -> WeighterView:
    published = entry.weighter.published
    return WeighterView(
        entry.record,
        entry.head,
        published.position,
        entry.weighter.parameter_count,
        len(entry.open_jobs),
        published.statistics,
        entry.duplicates,
        entry.refused,
    )


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` where it says something, else `base`; parts that are objects in both field by field."""
    parts = {
        name: {**base[name], **value} if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in given.items()
    }
    return {**base, **parts}


def _load_packaged(device: torch.device) -> Weighter:
    try:
        return load_weighter(pretaught.weighter_folder(), device=device)
    except InvalidArgument as exc:
        raise FailedPrecondition(f"this installation has no pretaught weighter: {exc}") from exc


def _warm_up(weighter: Weighter) -> None:
    """One forward pass, so that the first caller doesn't pay for lazy initialisation."""
    spec = weighter.spec
    names, hidden = (len(spec.features.names), spec.features.hidden_size) if spec.features else (0, 0)
    weighter.score(
        [
            Inputs(
                features=np.zeros((2, names), np.float32) if names else None,
                hidden=np.zeros((2, hidden), np.float32) if hidden else None,
                tokens=np.zeros((2, 1), np.int64) if spec.tokens else None,
                lengths=np.ones(2, np.int64) if spec.tokens else None,
            )
        ]
    )
