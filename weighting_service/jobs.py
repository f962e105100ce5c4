"""The jobs of a service: opened with what they score by, closed, heard of. Keeps target profiles to their jobs.

Belongs to the service's event loop. A job's target profile goes into the log and into the job's own statistics, and
nowhere else: no use case returns it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import replace

from torch import Tensor

from weighting_contract.columns import needs_profile, unknown_columns
from weighting_contract.errors import (
    JOB_CLOSED,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    WeighbridgeError,
)
from weighting_contract.ngrams import profile_table
from weighting_contract.profile import Profile
from weighting_contract.reference import ReferenceInfo
from weighting_contract.spec import WeighterSpec, check_checksum, check_name, check_text
from weighting_service.calls import is_of_job
from weighting_service.core import Core, check_room, own_name
from weighting_service.domain import JobRecord, Role, WeighterRecord
from weighting_service.hosting import Entry, Weighters
from weighting_service.inputs import check_feature_names
from weighting_service.leases import Leases
from weighting_service.profiles import read_profile
from weighting_service.reference import Reference
from weighting_service.references import Known, ReferenceStore, short
from weighting_service.views import JobRequest, JobView

log = logging.getLogger(__name__)

MAX_REASON = 500  # characters


class Jobs:
    """All jobs of one service, by id."""

    def __init__(self, core: Core, weighters: Weighters, references: ReferenceStore) -> None:
        self._core = core
        self._weighters = weighters
        self._references = references
        self._jobs: dict[str, JobRecord] = {}
        self._changes = 0  # of records by other services, as far as they are known here
        self._tables: dict[str, tuple[str, Tensor]] = {}  # target profiles of open jobs, with their documents' checksum
        self._fallback_steps: dict[str, int] = {}
        self._changing = asyncio.Lock()  # of records; no reference is deleted while a job that needs it is being opened
        self._leases = Leases(core, lambda: [job.job_id for job in weighters.open_jobs()], self._expire)

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def load_references(self) -> None:
        """Loads what open jobs score by. What can't be loaded is said in the log, and to those jobs when they score."""
        needed = {(job.reference, job.reference_checksum): job for job in self._weighters.open_jobs() if job.reference}
        for (name, checksum), job in needed.items():
            try:
                await self._references.load(await self._references.find_checksum(name, checksum))
            except WeighbridgeError as exc:
                log.error("job %r can't score: %s", job.job_id, exc)

    def references_in_use(self) -> set[str]:
        """Checksums of the references that open jobs score by: they stay loaded."""
        return {job.reference_checksum for job in self._weighters.open_jobs()}

    def start(self) -> None:
        """Begins the leases of open jobs; from now on their calls are taken."""
        self._leases.start()

    async def stop(self) -> None:
        await self._leases.stop()

    # ---- Use cases --------------------------------------------------------------------------------------------------

    async def open(self, request: JobRequest) -> JobView:
        """A job of a weighter. A known id resumes that job; an empty one gets an id."""
        is_of_job(request.role)  # whatever the job was before
        entry = await self._weighters.find(request.weighter)
        job_id = request.job_id or uuid.uuid4().hex
        check_name(own_name(job_id), "job_id")
        reference = await self._reference(request, entry.record.spec)
        profile = None
        if reference and request.profile:
            profile = await asyncio.to_thread(read_profile, request.profile, reference)
        return await self._core.to_its_end(self._open(request, job_id, entry, reference, profile))

    async def _open(
        self, request: JobRequest, job_id: str, entry: Entry, reference: Reference | None, profile: Profile | None
    ) -> JobView:
        async with self._changing:
            self._weighters.entry(request.weighter)  # it may have been deleted meanwhile
            known = await self._stored(job_id)
            job = self._record(request, job_id, entry, reference, profile, known)
            if not (known and known.open):
                self._check_room(job_id)
            if job != known or profile:  # a known profile is stored again: the one that is there may be damaged
                table = profile.log_ratios if profile else None
                await self._core.run_io(lambda: self._core.log.put_job(job, table))
                self._tables.pop(job_id, None)
            self._jobs[job_id] = job
            self._weighters.job_changed(entry, job)
            self._leases.heard(job_id)
        return await self._view(job, resumed=known is not None)

    async def close(self, job_id: str) -> JobView:
        """Closes a job; what it taught stays. Closing twice is no error."""
        async with self._changing:
            await self._stored(job_id)
            job, _ = await self.get(job_id, must_be_open=False)
            return await self._view(await self._close(job), resumed=True)

    async def quarantine(self, job_id: str, reason: str) -> JobView:
        """Keeps a job, open or not, from teaching, for a reason that it is told; an empty one lets it teach again."""
        check_text(reason, "reason")
        if len(reason) > MAX_REASON:
            raise InvalidArgument(f"reason has {len(reason)} characters, expected at most {MAX_REASON}")
        async with self._changing:
            await self._stored(job_id)
            job, entry = await self.get(job_id, must_be_open=False)
            if job.quarantined != reason:
                job = await self._put(replace(job, quarantined=reason))
                self._weighters.job_changed(entry, job)
                log.warning("job %r %s", job_id, f"is quarantined: {reason!r}" if reason else "may teach again")
        return await self._view(job, resumed=True)

    async def heartbeat(self, job_id: str, fallback_steps: int) -> tuple[int, int]:
        """Says that a job is alive; returns the weighter's last and applied position."""
        _, entry = await self.get(job_id)
        self._fallback_steps[job_id] = fallback_steps
        self._count_fallback_steps()
        return entry.head, entry.applied

    async def delete_reference(self, name: str) -> None:
        """Deletes an uploaded reference that no open job uses."""
        async with self._changing:
            users = [job.job_id for job in self._weighters.open_jobs() if job.reference == name]
            everybodys = self._references.names().get(name)  # stays anyway, and its users are other tenants' jobs too
            if users and not everybodys:
                raise FailedPrecondition(f"reference {name!r} is in use by job {users[0]!r}; close it first")
            await self._references.delete(name)

    # ---- For the other use cases ------------------------------------------------------------------------------------

    async def get(self, job_id: str, must_be_open: bool = True) -> tuple[JobRecord, Entry]:
        """The job and its weighter. Raises NotFound, FailedPrecondition where it is closed, Unavailable
        where its weighter is not served."""
        job = await self._find(job_id)
        entry = await self._weighters.find_uid(job.weighter_uid) if job else None
        if job is None or entry is None:
            self._core.check_loaded()
            raise NotFound(f"there is no job {job_id!r}; open it first")
        if must_be_open:
            if not job.open:
                job = await self._stored(job_id) or job  # another service may have opened it again
            if not job.open:
                raise FailedPrecondition(f"job {job_id!r} {JOB_CLOSED}")
            self._leases.heard(job_id)
        return job, self._weighters.entry(entry.record.name)

    async def role(self, job_id: str) -> Role | None:
        """Of a job, open or not; None where there is none."""
        job = await self._find(job_id)
        return job.role if job else None

    async def weighter(self, job_id: str) -> WeighterRecord:
        """The weighter of a job, open or not; also one that is not served. Raises NotFound."""
        job = await self._find(job_id)
        record = await self._weighters.record(job.weighter_uid) if job else None
        if record is None:
            self._core.check_loaded()
            raise NotFound(f"there is no job {job_id!r}; open it first")
        return record

    async def reference(self, job: JobRecord) -> Reference:
        """The loaded reference of a job that has one. Raises FailedPrecondition or Unavailable without it."""
        return self._references.ready(await self._references.find_checksum(job.reference, job.reference_checksum))

    async def table(self, job: JobRecord) -> Tensor:
        """The job's target profile, [buckets] float32."""
        checksum, table = self._tables.get(job.job_id, ("", None))
        if table is None or checksum != job.documents_checksum:
            stored = await self._core.run_io(lambda: self._core.log.profile(job.job_id))
            if stored is None:
                raise FailedPrecondition(f"job {job.job_id!r} has no target profile; open it with one")
            table = profile_table(stored)
            self._tables[job.job_id] = job.documents_checksum, table
        return table

    def refresh(self) -> None:
        """Forgets what another service may have changed in the log. The weighters know their open jobs by then."""
        self._changes += 1
        self._jobs = {job.job_id: job for job in self._weighters.open_jobs()}  # they score on while the log is away
        for job_id in {*self._tables, *self._fallback_steps} - self._jobs.keys():
            self._drop(job_id)

    def forget(self, weighter_uid: str) -> None:
        """Drops the jobs of a deleted weighter."""
        for job_id in [j for j, job in self._jobs.items() if job.weighter_uid == weighter_uid]:
            del self._jobs[job_id]
            self._drop(job_id)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _drop(self, job_id: str) -> None:
        """What is kept for open jobs only."""
        self._leases.forget(job_id)
        self._tables.pop(job_id, None)
        self._fallback_steps.pop(job_id, None)
        self._count_fallback_steps()

    def _count_fallback_steps(self) -> None:
        self._core.metrics.fallback_steps.set(sum(self._fallback_steps.values()))

    async def _reference(self, request: JobRequest, spec: WeighterSpec) -> Reference | None:
        """The reference that a job asks for, loaded and fit for the weighter and the job's tokenizer."""
        check_checksum(request.reference_checksum, "reference.checksum")
        check_checksum(request.tokenizer_checksum, "reference.tokenizer_checksum")
        if not request.reference:
            _check_without_reference(request, spec)
            return None
        known = await self._references.find(request.reference)
        _check_asked_for(request, known)
        check_fits(spec, known.info, known.name, request.weighter)
        return await self._references.load(known, self._core.limits.loading_wait_s)

    def _record(
        self,
        request: JobRequest,
        job_id: str,
        entry: Entry,
        reference: Reference | None,
        profile: Profile | None,
        known: JobRecord | None,
    ) -> JobRecord:
        """The job's record, once it is sure that a known job goes on as what it was."""
        if known and known.weighter_uid != entry.record.uid:
            raise AlreadyExists(
                f"job {job_id!r} belongs to another weighter than {request.weighter!r}; choose another job_id"
            )
        if reference:
            self._references.of_checksum(request.reference, reference.checksum)  # it may have been deleted meanwhile
        checksum = reference.checksum if reference else ""
        if known and known.reference_checksum != checksum:
            raise FailedPrecondition(
                f"job {job_id!r} was opened with the reference {_named(known.reference, known.reference_checksum)}, "
                f"not with {_named(request.reference, checksum)}; open it as before, or choose another job_id"
            )
        documents = profile.documents_checksum if profile else known.documents_checksum if known else ""
        if known and known.documents_checksum not in ("", documents):
            raise FailedPrecondition(
                f"job {job_id!r} was opened with a profile of the documents {short(known.documents_checksum)}, not of "
                f"{short(documents)}; give it those of before, or choose another job_id"
            )
        spec = entry.record.spec
        if reference and spec.features and needs_profile(spec.features.names) and not documents:
            raise InvalidArgument(
                f"profile is missing: weighter {request.weighter!r} reads statistics against the job's target; open "
                "the job with its validation documents"
            )
        return JobRecord(
            job_id,
            entry.record.uid,
            request.role,
            request.feature_names,
            reference=request.reference,
            reference_checksum=checksum,
            documents_checksum=documents,
            quarantined=known.quarantined if known else "",
        )

    def _check_room(self, job_id: str) -> None:
        """Raises ResourceExhausted where the job's tenant has as many open jobs as it may have."""
        most = self._core.limits.jobs_per_tenant
        full = (
            f"{most} jobs are open, as many as a tenant may have (--max-jobs-per-tenant); close some, or wait: one "
            f"without a trainer is closed {self._core.limits.job_idle_s:g} s after its last call"
        )
        check_room(job_id, (job.job_id for job in self._weighters.open_jobs()), most, full)

    async def _expire(self, job_id: str) -> None:
        """Closes a job that nobody hears of, unless it was closed elsewhere or calls by now."""
        async with self._changing:
            job = await self._stored(job_id)
            if job and job.open and self._leases.silent(job_id):
                await self._close(job)
                self._core.metrics.jobs_expired.inc()
                idle_s = self._core.limits.job_idle_s
                log.info(
                    "job %r is closed: no call for %g s (--job-idle-s); its trainer opens it again", job_id, idle_s
                )

    async def _close(self, job: JobRecord) -> JobRecord:
        if job.open:
            job = await self._put(replace(job, open=False))
        if entry := self._weighters.by_uid(job.weighter_uid):
            self._weighters.job_changed(entry, job)
        self._drop(job.job_id)
        return job

    async def _put(self, job: JobRecord) -> JobRecord:
        await self._core.run_io(lambda: self._core.log.put_job(job))
        self._jobs[job.job_id] = job
        return job

    async def _stored(self, job_id: str) -> JobRecord | None:
        """The record as it is in the log, whatever was known: what is changed must be what is there."""
        self._jobs.pop(job_id, None)
        return await self._find(job_id)

    async def _find(self, job_id: str) -> JobRecord | None:
        job = self._jobs.get(job_id)
        if job is None:
            changes = self._changes
            job = await self._core.run_io(lambda: self._core.log.job(job_id))
            if job and changes == self._changes:  # else what was read may be what has changed
                self._jobs[job_id] = job
        if job:
            is_of_job(job.role)
        return job

    async def _view(self, job: JobRecord, resumed: bool) -> JobView:
        entry = self._weighters.by_uid(job.weighter_uid)
        if entry is None:
            raise NotFound(f"the weighter of job {job.job_id!r} was deleted")
        step, position = await self._core.run_io(lambda: self._core.log.last_taught(job.job_id))
        return JobView(job, entry.record.name, entry.record.spec, resumed, entry.head, step, position)


def check_fits(spec: WeighterSpec, info: ReferenceInfo, reference: str, weighter: str) -> None:
    """Raises FailedPrecondition where a reference can't give what a weighter reads; names all that is wrong with it."""
    if spec.features is None or spec.tokens is not None or spec.features.hidden_size:
        read = "tokens" if spec.tokens else "a hidden state"
        raise FailedPrecondition(
            f"weighter {weighter!r} reads {read}, but a reference gives statistics only; use a weighter whose spec has "
            "features by name and nothing else"
        )
    if unknown := unknown_columns(spec.features.names):
        raise FailedPrecondition(
            f"weighter {weighter!r} reads {', '.join(map(repr, unknown))}, which a reference doesn't give; use a "
            "weighter of the columns that it gives, or send the features yourself"
        )
    expected = spec.features.tokenizer_checksum
    if expected and expected != info.tokenizer_checksum:
        raise FailedPrecondition(
            f"weighter {weighter!r} takes samples of the tokenizer {short(expected)} "
            f"(spec.features.tokenizer_checksum), but the reference {reference!r} has {short(info.tokenizer_checksum)}"
        )


def _check_asked_for(request: JobRequest, known: Known) -> None:
    """That the reference of a name is the one that the job means, and reads the job's tokens."""
    if request.feature_names:
        raise InvalidArgument(
            "feature_names were given together with a reference, whose columns are in the spec's order; leave them out"
        )
    if request.reference_checksum not in ("", known.info.checksum):
        raise FailedPrecondition(
            f"reference {known.name!r} has the checksum {short(known.info.checksum)}, expected "
            f"{short(request.reference_checksum)}; upload yours under another name"
        )
    if request.tokenizer_checksum not in ("", known.info.tokenizer_checksum):
        raise FailedPrecondition(
            f"the job's tokenizer has the checksum {short(request.tokenizer_checksum)}, but the reference "
            f"{known.name!r} has {short(known.info.tokenizer_checksum)}: their token ids mean different texts"
        )


def _check_without_reference(request: JobRequest, spec: WeighterSpec) -> None:
    if request.reference_checksum:
        raise InvalidArgument("reference.checksum is given, but no reference.name; name the reference too")
    if request.profile:
        raise InvalidArgument("profile is given, but no reference to use it with; name one, or leave it out")
    expected = spec.features.tokenizer_checksum if spec.features else ""
    given = request.tokenizer_checksum
    if expected and given != expected:
        theirs = f"has {short(given)}" if given else "does not name its own"
        raise FailedPrecondition(
            f"weighter {request.weighter!r} takes samples of the tokenizer {short(expected)} "
            f"(spec.features.tokenizer_checksum), but the job {theirs}"
        )
    check_feature_names(request.feature_names, spec)


def _named(reference: str, checksum: str) -> str:
    return f"{reference!r} ({short(checksum)})" if reference else "none"
