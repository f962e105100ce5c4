"""The use cases: what a weighting service does, whoever asks. One facade over the parts; knows no transport.

`hosting` keeps weighters, `jobs` jobs, `references` references; `scoring` and `teaching` are what it is all for. All of
it runs on one event loop, so its tables need no locks. Forward passes run on the engine's thread, learning on the
follower's, log appends on one I/O thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from weighting_contract.errors import Unavailable
from weighting_service.core import Core, ServiceLimits
from weighting_service.domain import RawInputs, Role, Scores, WeighterRecord
from weighting_service.hosting import Weighters
from weighting_service.jobs import Jobs
from weighting_service.metrics import Metrics
from weighting_service.references import ReferenceStore
from weighting_service.scoring import Scoring
from weighting_service.snapshots import SnapshotStore
from weighting_service.teaching import Teaching
from weighting_service.update_log import UpdateLog
from weighting_service.views import (
    JobRequest,
    JobView,
    MetaUpdateRequest,
    ReferenceView,
    Taught,
    TextScores,
    WeighterView,
)

__all__ = ["ServiceLimits", "WeightingService"]


class WeightingService:
    """Hosts weighters. `await start()` before use, `await stop()` after; all methods belong to one event loop.

    Methods raise, beside what they list:
        InvalidArgument: what was sent is wrong; the message names the field.
        NotFound: no such weighter, job or reference.
        Unavailable: the service is loading or draining; nothing else is the matter.
    """

    def __init__(
        self,
        update_log: UpdateLog,
        snapshots: SnapshotStore,
        references: ReferenceStore,
        *,
        device: torch.device,
        models_dir: Path | None = None,
        limits: ServiceLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics or Metrics()
        self._core = Core(update_log, limits or ServiceLimits(), self.metrics, snapshots.size_bytes)
        self._references = references
        self._weighters = Weighters(self._core, snapshots, device=device, models_dir=models_dir)
        self._jobs = Jobs(self._core, self._weighters, references)
        self._weighters.on_records_changed.append(self._jobs.refresh)
        self._scoring = Scoring(self._core, self._weighters, self._jobs, references)
        self._teaching = Teaching(self._core, self._weighters, self._jobs, self._scoring)

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready when every weighter has caught up and every reference that open jobs score by is loaded."""
        engine = self._core.engine
        engine.start()
        self.metrics.observe_queue(lambda: engine.queued_calls)
        await self._references.start(self.metrics, self._jobs.references_in_use)
        await self._weighters.start()
        await self._jobs.load_references()
        await self._weighters.wait_caught_up()
        self._core.started = True
        self._jobs.start()

    def drain(self) -> None:
        """From now on new calls are refused; those under way go on, watchers are told."""
        self._core.draining = True
        self._weighters.wake_all()

    async def stop(self) -> None:
        """Ends the threads and closes the log; every weighter that moved leaves a snapshot."""
        self.drain()
        await self._jobs.stop()
        await self._references.stop()
        await self._core.changes_end()
        await asyncio.to_thread(self._core.engine.stop)
        await self._weighters.stop()
        await self._core.close_log()

    def not_ready_because(self) -> str:
        """Why the service should get no traffic now; empty when it should."""
        return self._core.not_ready_because()

    async def check_alive(self, timeout_s: float = 5.0) -> None:
        """Raises Unavailable where the learning thread has ended, or the engine's does not answer in time."""
        if not self._weighters.learning_alive:
            raise Unavailable("the learning thread has ended")
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._core.engine.ping()), timeout_s)
        except TimeoutError as exc:
            raise Unavailable(f"the engine's thread did not answer in {timeout_s:g} s") from exc

    # ---- For whoever decides what a caller may see ------------------------------------------------------------------

    def weighter_records(self) -> Mapping[str, WeighterRecord]:
        """All weighters by name, also those that are not served. Raises Unavailable while they are being loaded."""
        self._core.check_loaded()
        return self._weighters.records()

    def reference_names(self) -> Mapping[str, bool]:
        """The references known by now; whether one is everybody's, as it comes with the service or its models."""
        return self._references.names()

    async def weighter_of(self, job_id: str) -> WeighterRecord:
        """Of a job, open or not."""
        return await self._jobs.weighter(job_id)

    async def role_of(self, job_id: str) -> Role | None:
        """Of a job, open or not; None where there is none."""
        return await self._jobs.role(job_id)

    # ---- Weighters --------------------------------------------------------------------------------------------------

    async def create_weighter(
        self,
        name: str,
        spec: Mapping[str, Any],
        exist_ok: bool = False,
        initial: str = "",
        files: Mapping[str, bytes] | None = None,
    ) -> WeighterView:
        """A new weighter, durable when this returns; with `exist_ok` an equal one that is there already.

        Args:
            spec: plain values of a `WeighterSpec`; what is left out has its default, or, where `initial` or `files` are
                given and no inputs are, that of the export in question.
            initial: empty for fresh parameters, "pretaught" for those of the weighter that comes with the package.
            files: of an export, in place of `initial`: for its parameters.

        Raises:
            AlreadyExists: the name is taken by another one.
        """
        self._core.check_open()
        return await self._core.to_its_end(self._weighters.create(name, spec, exist_ok, initial, files or {}))

    async def get_weighter(self, name: str) -> WeighterView:
        """A weighter, with the positions that it can be rolled back to."""
        return await self._weighters.get(name)

    async def list_weighters(self) -> list[WeighterView]:
        return self._weighters.views()

    async def delete_weighter(self, name: str) -> None:
        """Removes a weighter with its log, snapshots and jobs."""
        self._core.check_open()
        await self._core.to_its_end(self._delete_weighter(name))

    async def share_weighter(self, name: str, tenants: tuple[str, ...]) -> WeighterView:
        """Says which tenants may use a weighter beside its own; "*" stands for all, none for its own alone."""
        self._core.check_open()
        return await self._core.to_its_end(self._weighters.share(name, tenants))

    async def rollback_weighter(self, name: str, to_position: int, expected_position: int | None = None) -> Taught:
        """Puts the state of the snapshot at `to_position` back, as a new entry of the log; durable when this returns.

        Raises:
            FailedPrecondition: there is no such snapshot, or the log does not end at `expected_position`.
        """
        self._core.check_open()
        return await self._core.to_its_end(self._weighters.rollback(name, to_position, expected_position))

    async def export_weighter(self, name: str) -> dict[str, bytes]:
        """The weighter at its applied position, as files by name."""
        return await self._weighters.export(name)

    def watch_weighter(self, name: str) -> AsyncIterator[WeighterView]:
        """The weighter now, and again whenever its applied position has moved."""
        return self._weighters.watch(name)

    # ---- References -------------------------------------------------------------------------------------------------

    async def put_reference(self, name: str, files: Mapping[str, bytes], exist_ok: bool = False) -> ReferenceView:
        """A new reference, durable when this returns; with `exist_ok` the very same one that is there already.

        Raises:
            AlreadyExists: the name is taken by another one.
        """
        self._core.check_open()
        return await self._references.put(name, files, exist_ok)

    async def get_reference(self, name: str, files: Iterable[str] = ()) -> ReferenceView:
        """A reference, with those of its files that are named."""
        self._core.check_open()
        return await self._references.get(name, files)

    async def list_references(self) -> list[ReferenceView]:
        self._core.check_open()
        await self._references.refresh()
        return self._references.views()

    async def delete_reference(self, name: str) -> None:
        """Removes an upload.

        Raises:
            FailedPrecondition: an open job uses it, or it is none.
        """
        self._core.check_open()
        await self._jobs.delete_reference(name)

    # ---- Jobs -------------------------------------------------------------------------------------------------------

    async def open_job(self, request: JobRequest) -> JobView:
        """A job of a weighter. A known id resumes that job; an empty one gets an id.

        Raises:
            AlreadyExists: the id belongs to a job of another weighter.
            FailedPrecondition: the reference is not fit for the job or the weighter, or the job was another before.
        """
        self._core.check_open()
        return await self._jobs.open(request)

    async def close_job(self, job_id: str) -> JobView:
        """Closes a job; what it taught stays. Closing twice is no error."""
        return await self._core.to_its_end(self._jobs.close(job_id))

    async def heartbeat(self, job_id: str, fallback_steps: int = 0) -> tuple[int, int]:
        """Says that a job is alive; returns the weighter's last and applied position."""
        return await self._jobs.heartbeat(job_id, fallback_steps)

    async def quarantine_job(self, job_id: str, reason: str) -> JobView:
        """Keeps a job from teaching, for a reason that it is told; an empty reason lets it teach again."""
        self._core.check_open()
        return await self._core.to_its_end(self._jobs.quarantine(job_id, reason))

    # ---- Scores and updates -----------------------------------------------------------------------------------------

    async def score(
        self,
        job_id: str,
        raw: RawInputs,
        *,
        min_position: int = 0,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Scores:
        """Weights for a job's batch.

        Args:
            min_position: of the state that scores, at least.
            min_effective_share: in place of the spec's.
            return_statistics: give those that the job's reference made.
        """
        self._core.check_open()
        return await self._scoring.score(job_id, raw, min_position, min_effective_share, return_statistics)

    async def score_once(
        self, weighter: str, raw: RawInputs, column_order: tuple[str, ...] = (), tenant: str = ""
    ) -> Scores:
        """Weights for a batch without a job. Each tenant has its own share of the device."""
        self._core.check_open()
        return await self._scoring.score_once(weighter, raw, column_order, tenant)

    async def score_texts(
        self,
        texts: tuple[str, ...],
        target: tuple[str, ...],
        weighter: str = "",
        reference: str = "",
        tenant: str = "",
    ) -> TextScores:
        """Weights for texts, by how they help towards a target that the example texts are of. Needs no job."""
        self._core.check_open()
        return await self._scoring.score_texts(texts, target, weighter, reference, tenant)

    async def meta_update(self, job_id: str, request: MetaUpdateRequest) -> Taught:
        """Appends a batch and its cotangent to the weighter's log; durable when this returns, applied soon after."""
        self._core.check_open()
        return await self._teaching.meta_update(job_id, request)

    async def _delete_weighter(self, name: str) -> None:
        self._jobs.forget(await self._weighters.delete(name))
