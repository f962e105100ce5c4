"""The use cases: what a weighting service does, whoever asks. Validates, looks up, dispatches; knows no transport.

Everything here runs on one event loop, so its own tables need no locks. Forward passes run on the engine's thread,
learning on the follower's, log appends on one I/O thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)
from weighting_contract.spec import WeighterSpec, check_name, check_text
from weighting_service.domain import (
    Estimator,
    Inputs,
    JobRecord,
    LearningStatistics,
    MetaUpdate,
    RawInputs,
    Role,
    Scores,
    WeighterRecord,
)
from weighting_service.engine import Engine, EngineLimits
from weighting_service.follower import Follower, Hosted
from weighting_service.inputs import BatchLimits, Tokenize, check_cotangent, check_feature_names, check_inputs
from weighting_service.metrics import Metrics
from weighting_service.snapshots import SnapshotStore
from weighting_service.texts import load_tokenizer
from weighting_service.update_log import UpdateLog
from weighting_service.weighter import Weighter, weighter_files

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of what one service takes on."""

    batch: BatchLimits = field(default_factory=BatchLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    pending_updates: int = 1000  # in a weighter's log, not yet applied
    snapshot_every: int = 200  # positions


@dataclass(frozen=True)
class WeighterView:
    """A weighter as callers see it."""

    record: WeighterRecord
    position: int
    applied_position: int
    parameters: int
    jobs_open: int
    learning: LearningStatistics
    duplicates: int
    refused: int


@dataclass(frozen=True)
class JobView:
    record: JobRecord
    weighter: str
    spec: WeighterSpec
    resumed: bool
    position: int
    last_step: int
    last_position: int


@dataclass(frozen=True)
class Taught:
    """The answer to a meta-update: durable at `position` from now on."""

    position: int
    duplicate: bool
    applied_position: int


@dataclass
class _Entry:
    """A hosted weighter with what the loop keeps about it."""

    hosted: Hosted
    head: int
    tokenize: Tokenize | None = None
    jobs_open: set[str] = field(default_factory=set)
    duplicates: int = 0
    refused: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: bool = False

    @property
    def applied(self) -> int:
        return self.hosted.weighter.published.position


class WeightingService:
    """Hosts weighters. `await start()` before use, `await stop()` after; all methods belong to one event loop."""

    def __init__(
        self,
        update_log: UpdateLog,
        snapshots: SnapshotStore,
        *,
        device: torch.device,
        models_dir: Path | None = None,
        limits: ServiceLimits = ServiceLimits(),
        metrics: Metrics | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = metrics or Metrics()
        self._log = update_log
        self._snapshots = snapshots
        self._device = device
        self._models_dir = models_dir
        self._engine = Engine(limits.engine, self.metrics.observe_pass)
        self._follower = Follower(
            update_log, snapshots, snapshot_every=limits.snapshot_every, on_applied=self._on_applied
        )
        self._io = ThreadPoolExecutor(1, "weighbridge-log")
        self._entries: dict[str, _Entry] = {}  # by name
        self._by_uid: dict[str, _Entry] = {}
        self._failed: dict[str, str] = {}  # weighters that could not be brought up, and why
        self._creation = asyncio.Lock()  # one at a time: jobs that start together ask for the same weighter
        self._jobs: dict[str, JobRecord] = {}
        self._fallback_steps: dict[str, int] = {}
        self._started = False
        self._draining = False

    # ---- Life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings up every weighter of the log: newest snapshot, then replay. Ready once all have caught up."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        self._follower.start()
        self.metrics.observe_queue(lambda: self._engine.queued_calls)
        for record in await self._run_io(self._log.weighters):
            try:
                weighter, position = await asyncio.to_thread(self._restore, record)
                await self._host(record, weighter, position)
            except (WeighbridgeError, OSError) as exc:
                self._failed[record.name] = str(exc)
                log.error("weighter %r is not served: %s", record.name, exc)
        for entry in self._entries.values():
            await asyncio.to_thread(entry.hosted.caught_up.wait)
            await asyncio.to_thread(self._warm_up, entry.hosted.weighter)
        self._count()
        self._started = True

    def drain(self) -> None:
        """From now on new calls are refused; those under way go on, watchers are told."""
        self._draining = True
        for entry in self._entries.values():
            self._wake(entry)

    async def stop(self) -> None:
        """Ends the threads and closes the log; every weighter that moved leaves a snapshot."""
        self.drain()
        await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(self._follower.stop)
        await self._run_io(self._log.close)
        self._io.shutdown()

    def not_ready_because(self) -> str:
        """Why the service should get no traffic now; empty when it should."""
        if self._draining:
            return "the service is draining"
        return "" if self._started else "the service is loading its weighters"

    async def check_alive(self, timeout_s: float = 5.0) -> None:
        """Raises Unavailable when the engine's or the follower's thread does not answer in time."""
        if not self._follower.alive:
            raise Unavailable("the learning thread has ended")
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._engine.ping()), timeout_s)
        except TimeoutError as exc:
            raise Unavailable(f"the engine's thread did not answer in {timeout_s:g} s") from exc

    # ---- Weighters ----------------------------------------------------------------------------------------------

    async def create_weighter(self, name: str, spec: WeighterSpec, exist_ok: bool = False) -> WeighterView:
        """A new weighter, durable when this returns; with `exist_ok` an equal one that is there already."""
        self._check_open()
        check_name(name, "name")
        spec.check()
        async with self._creation:
            if existing := self._entries.get(name):
                return self._existing(existing, spec, exist_ok)
            return await self._create(name, spec)

    async def _create(self, name: str, spec: WeighterSpec) -> WeighterView:
        if name in self._failed:
            raise AlreadyExists(f"weighter {name!r} exists, but is not served: {self._failed[name]}")
        record = WeighterRecord(name, uuid.uuid4().hex, spec, time.time_ns() // 1_000_000)
        weighter = await asyncio.to_thread(self._build, record)
        await self._run_io(lambda: self._log.create_weighter(record))
        entry = await self._host(record, weighter, 0)
        self._count()
        return self._view(entry)

    def _existing(self, entry: _Entry, spec: WeighterSpec, exist_ok: bool) -> WeighterView:
        name = entry.hosted.record.name
        if not exist_ok:
            raise AlreadyExists(f"weighter {name!r} exists; choose another name or set exist_ok")
        if entry.hosted.record.spec != spec:
            raise AlreadyExists(
                f"weighter {name!r} exists with another spec {entry.hosted.record.spec.to_dict()}, "
                f"asked for {spec.to_dict()}; choose another name or use the existing spec"
            )
        return self._view(entry)

    async def get_weighter(self, name: str) -> WeighterView:
        return self._view(self._entry(name))

    async def list_weighters(self) -> list[WeighterView]:
        return [self._view(self._entries[name]) for name in sorted(self._entries)]

    async def delete_weighter(self, name: str) -> None:
        """Removes a weighter with its log, snapshots and jobs."""
        self._check_open()
        entry = self._entry(name)
        uid = entry.hosted.record.uid
        del self._entries[name], self._by_uid[uid]
        entry.deleted = True
        self._wake(entry)
        self._follower.drop(uid)
        for job_id in [j for j, job in self._jobs.items() if job.weighter_uid == uid]:
            del self._jobs[job_id]
            self._fallback_steps.pop(job_id, None)
        await self._run_io(lambda: self._log.delete_weighter(uid))
        await self._run_io(lambda: self._snapshots.delete(uid))
        self.metrics.forget(name)
        self._count()

    async def export_weighter(self, name: str) -> dict[str, bytes]:
        """The weighter at its applied position, as files by name."""
        weighter = self._entry(name).hosted.weighter
        return await asyncio.to_thread(weighter_files, weighter)

    async def watch_weighter(self, name: str) -> AsyncIterator[WeighterView]:
        """The weighter now, and again whenever its applied position has moved."""
        entry = self._entry(name)
        sent = -1
        while not self._draining:
            if entry.deleted:
                raise NotFound(f"weighter {name!r} was deleted")
            moved = entry.moved
            if entry.applied != sent:
                sent = entry.applied
                yield self._view(entry)
            else:
                await moved.wait()
        raise Unavailable("the service is draining; watch again when it is back")

    # ---- Jobs ---------------------------------------------------------------------------------------------------

    async def open_job(
        self, weighter: str, job_id: str = "", role: Role = Role.LEARN, feature_names: tuple[str, ...] = ()
    ) -> JobView:
        """A job of a weighter. A known id resumes that job; an empty one gets an id."""
        self._check_open()
        entry = self._entry(weighter)
        check_feature_names(feature_names, entry.hosted.record.spec)
        job_id = job_id or uuid.uuid4().hex
        check_name(job_id, "job_id")
        known = await self._find_job(job_id)
        uid = entry.hosted.record.uid
        if known and known.weighter_uid != uid:
            raise AlreadyExists(f"job {job_id!r} belongs to another weighter than {weighter!r}; choose another job_id")
        job = JobRecord(job_id, uid, role, feature_names)
        if job != known:
            await self._run_io(lambda: self._log.put_job(job))
        self._jobs[job_id] = job
        entry.jobs_open.add(job_id)
        self._count()
        return await self._job_view(job, resumed=known is not None)

    async def close_job(self, job_id: str) -> JobView:
        """Closes a job; what it taught stays. Closing twice is no error."""
        job, entry = await self._job(job_id, must_be_open=False)
        if job.open:
            job = replace(job, open=False)
            await self._run_io(lambda: self._log.put_job(job))
            self._jobs[job_id] = job
        entry.jobs_open.discard(job_id)
        self._fallback_steps.pop(job_id, None)
        self._count()
        return await self._job_view(job, resumed=True)

    async def heartbeat(self, job_id: str, fallback_steps: int = 0) -> tuple[int, int]:
        """Says that a job is alive; returns the weighter's last and applied position."""
        _, entry = await self._job(job_id)
        self._fallback_steps[job_id] = fallback_steps
        self.metrics.fallback_steps.set(sum(self._fallback_steps.values()))
        return entry.head, entry.applied

    # ---- Scores and updates -------------------------------------------------------------------------------------

    async def score(self, job_id: str, raw: RawInputs, min_position: int = 0) -> Scores:
        """Weights for a job's batch, from a state of `min_position` or later."""
        self._check_open()
        job, entry = await self._job(job_id)
        return await self._score(entry, job.job_id, raw, job.feature_names, min_position)

    async def score_once(self, weighter: str, raw: RawInputs, column_order: tuple[str, ...] = ()) -> Scores:
        """Weights for a batch without a job."""
        self._check_open()
        entry = self._entry(weighter)
        check_feature_names(column_order, entry.hosted.record.spec)
        return await self._score(entry, f"weighter/{weighter}", raw, column_order, 0)

    async def _score(
        self, entry: _Entry, queue: str, raw: RawInputs, column_order: tuple[str, ...], min_position: int
    ) -> Scores:
        inputs = await self._check_inputs(entry, raw, column_order)
        await self._wait_for(entry, min_position)
        return await asyncio.wrap_future(self._engine.score(queue, entry.hosted.weighter, inputs))

    async def meta_update(
        self,
        job_id: str,
        step: int,
        raw: RawInputs,
        cotangent: np.ndarray,
        *,
        update_id: str = "",
        scored_position: int = 0,
        estimator: Estimator = Estimator.VJP,
    ) -> Taught:
        """Appends a batch and its cotangent to the weighter's log; durable when this returns, applied soon after."""
        self._check_open()
        job, entry = await self._job(job_id)
        try:
            return await self._teach(job, entry, step, raw, cotangent, update_id, scored_position, estimator)
        except WeighbridgeError as exc:
            entry.refused += 1
            self.metrics.refused.labels(entry.hosted.record.name, exc.code).inc()
            raise

    async def _teach(
        self,
        job: JobRecord,
        entry: _Entry,
        step: int,
        raw: RawInputs,
        cotangent: np.ndarray,
        update_id: str,
        scored_position: int,
        estimator: Estimator,
    ) -> Taught:
        if job.role is Role.FROZEN:
            raise FailedPrecondition(f"job {job.job_id!r} is frozen, it scores only; open it with role learn to teach")
        if step < 0:
            raise InvalidArgument(f"step is {step}, expected 0 or more")
        update_id = update_id or str(step)
        check_text(update_id, "update_id")
        if len(update_id) > 128:
            raise InvalidArgument(f"update_id has {len(update_id)} characters, expected at most 128")
        inputs = await self._check_inputs(entry, raw, job.feature_names)
        update = MetaUpdate(
            job.job_id,
            update_id,
            step,
            inputs,
            check_cotangent(cotangent, inputs.samples),
            scored_position,
            estimator,
        )
        uid, name = entry.hosted.record.uid, entry.hosted.record.name
        if await self._run_io(lambda: self._log.find(uid, update)) is None:
            self._check_teachable(entry, scored_position)
        appended = await self._run_io(lambda: self._log.append(uid, update))
        entry.head = max(entry.head, appended.position)
        self.metrics.position.labels(name).set(entry.head)
        if appended.duplicate:
            entry.duplicates += 1
            self.metrics.duplicates.labels(name).inc()
        else:
            self.metrics.updates.labels(name).inc()
            self._follower.notify(uid)
        return Taught(appended.position, appended.duplicate, entry.applied)

    def _check_teachable(self, entry: _Entry, scored_position: int) -> None:
        if not 0 <= scored_position <= entry.head:
            raise FailedPrecondition(
                f"scored_position is {scored_position}, but the log ends at {entry.head}; "
                "was the service restored from an older state?"
            )
        bound = entry.hosted.record.spec.learning.max_staleness
        if bound and entry.head - scored_position > bound:
            raise FailedPrecondition(
                f"the weights were scored at position {scored_position}, {entry.head - scored_position} positions ago; "
                f"this weighter takes updates of at most {bound} (spec.learning.max_staleness)"
            )
        pending = entry.head - entry.applied
        if pending >= self.limits.pending_updates:
            raise ResourceExhausted(
                f"{pending} updates wait to be applied; teach less often or wait", retry_after_s=1.0
            )

    # ---- Inside -------------------------------------------------------------------------------------------------

    async def _run_io(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, work)

    def _check_open(self) -> None:
        if reason := self.not_ready_because():
            raise Unavailable(f"{reason}; use another one or try again shortly")

    def _check_loaded(self) -> None:
        """What is not found while weighters are being loaded may be there soon."""
        if not self._started:
            raise Unavailable("the service is loading its weighters; try again shortly")

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            self._check_loaded()
            if name in self._failed:
                raise Unavailable(f"weighter {name!r} is not served: {self._failed[name]}")
            known = ", ".join(sorted(self._entries)[:10]) or "none yet"
            raise NotFound(f"there is no weighter {name!r}; this service has: {known}")
        if entry.hosted.failure:
            raise Unavailable(
                f"weighter {name!r} stopped at position {entry.applied} and is not served: {entry.hosted.failure}"
            )
        return entry

    async def _find_job(self, job_id: str) -> JobRecord | None:
        return self._jobs.get(job_id) or await self._run_io(lambda: self._log.job(job_id))

    async def _job(self, job_id: str, must_be_open: bool = True) -> tuple[JobRecord, _Entry]:
        job = await self._find_job(job_id)
        entry = self._by_uid.get(job.weighter_uid) if job else None
        if job is None or entry is None:
            self._check_loaded()
            raise NotFound(f"there is no job {job_id!r}; open it first")
        if must_be_open and not job.open:
            raise FailedPrecondition(f"job {job_id!r} is closed; open it again to go on")
        self._jobs[job_id] = job
        return job, self._entry(entry.hosted.record.name)

    async def _check_inputs(self, entry: _Entry, raw: RawInputs, column_order: tuple[str, ...]) -> Inputs:
        weighter = entry.hosted.weighter

        def check() -> Inputs:
            return check_inputs(
                raw,
                entry.hosted.record.spec,
                limits=self.limits.batch,
                vocabulary_size=weighter.vocabulary_size,
                column_order=column_order,
                tokenize=entry.tokenize,
            )

        return check() if raw.texts is None else await asyncio.to_thread(check)

    async def _wait_for(self, entry: _Entry, position: int) -> None:
        """Until the state has applied `position`. The caller's deadline ends the wait."""
        if position > entry.head:
            raise FailedPrecondition(
                f"min_position is {position}, but the log ends at {entry.head}; "
                "was the service restored from an older state?"
            )
        while entry.applied < position:
            self._check_open()
            self._entry(entry.hosted.record.name)  # raises when it was deleted or has failed
            moved = entry.moved
            if entry.applied < position:
                await moved.wait()

    def _build(self, record: WeighterRecord) -> Weighter:
        """A fresh weighter and its snapshot at position 0: later versions of torch may initialise otherwise."""
        weighter = Weighter(record.spec, device=self._device, models_dir=self._models_dir)
        if record.spec.tokens and record.spec.tokens.tokenizer:
            load_tokenizer(record.spec.tokens.tokenizer, self._models_dir, weighter.vocabulary_size)
        self._warm_up(weighter)
        try:
            self._snapshots.save(record.uid, 0, weighter.state_tensors(), weighter.state_metadata())
        except OSError as exc:
            raise Unavailable(
                f"weighter {record.name!r} was not created: its snapshot can't be written ({exc})"
            ) from exc
        return weighter

    def _restore(self, record: WeighterRecord) -> tuple[Weighter, int]:
        weighter = Weighter(record.spec, device=self._device, models_dir=self._models_dir)
        snapshot = self._snapshots.load_latest(record.uid)
        if snapshot is None:
            log.warning("weighter %r has no readable snapshot; replaying its log from the start", record.name)
            return weighter, -1
        weighter.load_state(snapshot.tensors, snapshot.metadata)
        return weighter, snapshot.position

    def _warm_up(self, weighter: Weighter) -> None:
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

    async def _host(self, record: WeighterRecord, weighter: Weighter, snapshot_position: int) -> _Entry:
        uid, tokens = record.uid, record.spec.tokens
        entry = _Entry(
            Hosted(record, weighter, snapshot_position),
            head=await self._run_io(lambda: self._log.head(uid)),
            tokenize=load_tokenizer(tokens.tokenizer, self._models_dir) if tokens and tokens.tokenizer else None,
            jobs_open={job.job_id for job in await self._run_io(lambda: self._log.jobs(uid)) if job.open},
        )
        if weighter.position > entry.head:
            raise FailedPrecondition(
                f"the snapshot of weighter {record.name!r} is at position {weighter.position}, but its log ends at "
                f"{entry.head}: the log has lost updates; restore it from a back-up"
            )
        self._entries[record.name] = self._by_uid[uid] = entry
        self._follower.host(entry.hosted)
        return entry

    def _on_applied(self, hosted: Hosted) -> None:
        """Called on the follower's thread."""
        self._loop.call_soon_threadsafe(self._moved, hosted.record.uid)

    def _moved(self, uid: str) -> None:
        if entry := self._by_uid.get(uid):
            self.metrics.applied.labels(entry.hosted.record.name).set(entry.applied)
            self._wake(entry)
            self._count()

    @staticmethod
    def _wake(entry: _Entry) -> None:
        moved, entry.moved = entry.moved, asyncio.Event()
        moved.set()

    def _count(self) -> None:
        failed = len(self._failed) + sum(bool(e.hosted.failure) for e in self._entries.values())
        self.metrics.weighters.set(len(self._entries))
        self.metrics.weighters_failed.set(failed)
        self.metrics.jobs_open.set(sum(len(e.jobs_open) for e in self._entries.values()))

    def _view(self, entry: _Entry) -> WeighterView:
        published = entry.hosted.weighter.published
        return WeighterView(
            entry.hosted.record,
            entry.head,
            published.position,
            entry.hosted.weighter.parameter_count,
            len(entry.jobs_open),
            published.statistics,
            entry.duplicates,
            entry.refused,
        )

    async def _job_view(self, job: JobRecord, resumed: bool) -> JobView:
        entry = self._by_uid[job.weighter_uid]
        step, position = await self._run_io(lambda: self._log.last_taught(job.job_id))
        record = entry.hosted.record
        return JobView(job, record.name, record.spec, resumed, entry.head, step, position)
