"""The use case that teaches: a meta-update is checked, made durable in the weighter's log, and applied soon after.

Belongs to the service's event loop.
"""

from __future__ import annotations

import numpy as np

from weighting_contract.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, WeighbridgeError
from weighting_contract.spec import check_text
from weighting_service.core import Core
from weighting_service.domain import JobRecord, MetaUpdate, Role
from weighting_service.guards import the_job
from weighting_service.hosting import Entry, Weighters
from weighting_service.inputs import check_cotangent, check_probes
from weighting_service.jobs import Jobs
from weighting_service.scoring import Scoring
from weighting_service.tracing import TRACER
from weighting_service.views import MetaUpdateRequest, Taught
from weighting_service.weighter.cotangents import centred
from weighting_service.weighter.trust import LEAST_PROBES

MAX_UPDATE_ID = 128  # characters
LARGEST_JUMP = 1e6  # of a cotangent, in its job's running RMS ...
JUDGED_AFTER = 8  # ... which means something after as many updates
OTHER = "other"  # reason in the metrics of a refusal that its code explains


class Teaching:
    """Meta-updates to the weighters of one service."""

    def __init__(self, core: Core, weighters: Weighters, jobs: Jobs, scoring: Scoring) -> None:
        self._core = core
        self._weighters = weighters
        self._jobs = jobs
        self._scoring = scoring

    async def meta_update(self, job_id: str, request: MetaUpdateRequest) -> Taught:
        """Appends a batch and its cotangent to the weighter's log; durable when this returns, applied soon after."""
        with self._core.under_way.one_of(the_job(job_id)):
            job, entry = await self._jobs.get(job_id)
            try:
                return await self._append(job, entry, await self._update(job, entry, request))
            except WeighbridgeError as exc:
                entry.refused += 1
                self._core.metrics.refused.labels(entry.record.name, exc.code, exc.reason or OTHER).inc()
                raise

    async def _update(self, job: JobRecord, entry: Entry, request: MetaUpdateRequest) -> MetaUpdate:
        """The log entry that a request asks for."""
        probes = request.probes
        if job.role is Role.FROZEN and (probes is None or np.count_nonzero(probes) < LEAST_PROBES):
            raise FailedPrecondition(
                f"job {job.job_id!r} is frozen, it scores only: its meta-updates count for trust alone and need "
                f"{LEAST_PROBES} probes or more; send them, or open the job with role learn to teach"
            ).because("frozen")
        if request.step < 0:
            raise InvalidArgument(f"step is {request.step}, expected 0 or more")
        update_id = request.update_id or str(request.step)
        check_text(update_id, "update_id")
        if len(update_id) > MAX_UPDATE_ID:
            raise InvalidArgument(f"update_id has {len(update_id)} characters, expected at most {MAX_UPDATE_ID}")
        if job.reference and (request.raw.tokens is not None or request.raw.texts is not None):
            raise InvalidArgument(
                "a meta-update of a job with a reference carries the statistics that Score gave (return_statistics) as "
                "features, not tokens or texts: what is logged must be the same at every retry and on every replica"
            )
        inputs = await self._scoring.inputs(entry, request.raw, job.feature_names)
        update = MetaUpdate(
            job.job_id,
            update_id,
            request.step,
            inputs,
            check_cotangent(request.cotangent, inputs.samples),
            request.scored_position,
            request.estimator,
            check_probes(probes, inputs.samples),
            request.trust_only or job.role is Role.FROZEN,
        )
        if update.trust_only and update.drawn_evenly.sum() < LEAST_PROBES:
            raise InvalidArgument(f"trust_only needs {LEAST_PROBES} probes or more; without them it changes nothing")
        return update

    async def _append(self, job: JobRecord, entry: Entry, update: MetaUpdate) -> Taught:
        uid, name, metrics = entry.record.uid, entry.record.name, self._core.metrics
        update_log = self._core.log
        if await self._core.run_io(lambda: update_log.find(uid, update)) is None:
            await self._weighters.look_for(entry, update.scored_position)
            self._check_teachable(job, entry, update)
            await self._core.room.check()
        known = entry.head
        with TRACER.span("log append", weighter=name):
            appended = await self._core.run_io(lambda: update_log.append(uid, update))
        if not appended.duplicate:
            self._weighters.check_grown(entry, known, appended.position)
        entry.head = max(entry.head, appended.position)
        metrics.position.labels(name).set(entry.head)
        if appended.duplicate:
            entry.duplicates += 1
            metrics.duplicates.labels(name).inc()
        else:
            metrics.updates.labels(name).inc()
        if appended.position > entry.applied:  # of a duplicate too: the call that appended it may have been cancelled
            self._weighters.log_has_grown(entry)
        return Taught(appended.position, appended.duplicate, entry.applied)

    def _check_teachable(self, job: JobRecord, entry: Entry, update: MetaUpdate) -> None:
        """That a new update may be taken now; one that was taken before is answered whatever has happened since."""
        if job.quarantined:
            raise FailedPrecondition(
                f"job {job.job_id!r} is quarantined and teaches nothing until that is ended: {job.quarantined}"
            ).because("quarantined")
        self._check_position(entry, update.scored_position)
        _check_jump(entry, update)
        pending = entry.head - entry.applied
        if pending >= self._core.limits.pending_updates:
            raise ResourceExhausted(
                f"{pending} updates wait to be applied, as many as may (--max-pending-updates); teach less often, or "
                "wait"
            ).because("pending")

    def _check_position(self, entry: Entry, scored_position: int) -> None:
        if not 0 <= scored_position <= entry.head:
            raise FailedPrecondition(
                f"scored_position is {scored_position}, but the log ends at {entry.head}; "
                "was the service restored from an older state?"
            ).because("ahead")
        bound = entry.record.spec.learning.max_staleness
        if bound and entry.head - scored_position > bound:
            raise FailedPrecondition(
                f"the weights were scored at position {scored_position}, {entry.head - scored_position} positions ago; "
                f"this weighter takes updates of at most {bound} (spec.learning.max_staleness)"
            ).because("stale")


def _check_jump(entry: Entry, update: MetaUpdate) -> None:
    """Raises InvalidArgument for a cotangent that is absurd beside the job's earlier ones: it would drown them all."""
    known = entry.weighter.published.statistics.jobs.get(update.job_id)
    if known is None or known.updates_applied < JUDGED_AFTER:
        return
    largest = float(np.abs(centred(update.cotangent)).max())
    if largest > LARGEST_JUMP * known.cotangent_rms > 0:
        raise InvalidArgument(
            f"cotangent reaches {largest:g} from its mean, but the {known.updates_applied} updates of job "
            f"{update.job_id!r} before had an RMS of {known.cotangent_rms:g}; expected at most {LARGEST_JUMP:g} times "
            "that: look for a loss that exploded, or open another job if its scale was changed"
        ).because("absurd")
