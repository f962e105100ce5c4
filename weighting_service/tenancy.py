"""What a caller may see and do: the use cases with roles checked and names mapped. The only place that knows tenants.

Inside the service a weighter, reference or job of tenant T is called "T/name", one of the default tenant just "name".
The caller calls its own things by their bare names, and another tenant's weighter that is shared with it "owner/name"
("/name": the default tenant's). What it may not see is NotFound, in the words for what does not exist.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from weighting_contract.errors import InvalidArgument, NotFound, PermissionDenied, WeighbridgeError
from weighting_contract.spec import check_name
from weighting_service.auth import Caller
from weighting_service.core import tenant_of
from weighting_service.domain import EVERYONE, RawInputs, Role, Scores, WeighterRecord
from weighting_service.service import WeightingService
from weighting_service.views import (
    JobRequest,
    JobView,
    MetaUpdateRequest,
    ReferenceView,
    Taught,
    TextScores,
    WeighterView,
)

# The role that each call needs: the RPCs of the contract, and what REST has beside them.
ROLE_OF = {
    "CreateWeighter": "teach",
    "GetWeighter": "score",
    "ListWeighters": "score",
    "WatchWeighter": "score",
    "ExportWeighter": "teach",
    "DeleteWeighter": "admin",
    "ShareWeighter": "admin",
    "RollbackWeighter": "admin",
    "PutReference": "teach",
    "GetReference": "score",
    "ListReferences": "score",
    "DeleteReference": "admin",
    "OpenJob": "score",  # of a frozen job; a learning one needs "teach"
    "CloseJob": "score",
    "Heartbeat": "score",
    "QuarantineJob": "admin",
    "Score": "score",
    "StreamScore": "score",
    "MetaUpdate": "teach",
    "StreamMetaUpdate": "teach",
    "ScoreOnce": "score",
    "ScoreTexts": "score",
    "GET /metrics": "operate",
}


class TenantService:
    """`WeightingService` as one caller sees it, with the same methods; made anew for each call.

    Methods raise, beside what those of `WeightingService` do:
        PermissionDenied: the caller lacks the role, or a weighter that is shared with it is not its own to change.
    """

    def __init__(self, service: WeightingService, caller: Caller) -> None:
        self._service = service
        self._caller = caller
        self._tenant = caller.tenant

    def allow(self, method: str) -> None:
        """Raises PermissionDenied where the caller lacks the role that `method` needs."""
        self._caller.require(ROLE_OF[method], method)

    # ---- Weighters --------------------------------------------------------------------------------------------------

    async def create_weighter(
        self,
        name: str,
        spec: Mapping[str, Any],
        exist_ok: bool = False,
        initial: str = "",
        files: Mapping[str, bytes] | None = None,
    ) -> WeighterView:
        self.allow("CreateWeighter")
        if "/" in name:
            raise InvalidArgument(
                f"name is {name!r}: weighters are made under their maker's own tenant, by a name without a slash; to "
                "use one that is shared with you, open a job without a spec"
            )
        check_name(name, "name")
        with self._worded(lambda: self._no_weighter(name)):
            return self._weighter_view(
                await self._service.create_weighter(self._inside(name), spec, exist_ok, initial, files)
            )

    async def get_weighter(self, name: str) -> WeighterView:
        self.allow("GetWeighter")
        with self._worded(lambda: self._no_weighter(name)):
            return self._weighter_view(await self._service.get_weighter(self._weighter(name)))

    async def list_weighters(self) -> list[WeighterView]:
        self.allow("ListWeighters")
        views = await self._service.list_weighters()
        visible = [self._weighter_view(view) for view in views if self._sees(view.record)]
        return sorted(visible, key=lambda view: view.record.name)

    async def delete_weighter(self, name: str) -> None:
        self.allow("DeleteWeighter")
        with self._worded(lambda: self._no_weighter(name)):
            await self._service.delete_weighter(self._own_weighter(name, "delete"))

    async def share_weighter(self, name: str, tenants: tuple[str, ...]) -> WeighterView:
        self.allow("ShareWeighter")
        for tenant in tenants:
            if tenant != EVERYONE:
                check_name(tenant, "tenants")
        with self._worded(lambda: self._no_weighter(name)):
            return self._weighter_view(
                await self._service.share_weighter(self._own_weighter(name, "share"), tuple(dict.fromkeys(tenants)))
            )

    async def rollback_weighter(self, name: str, to_position: int, expected_position: int | None = None) -> Taught:
        self.allow("RollbackWeighter")
        with self._worded(lambda: self._no_weighter(name)):
            internal = self._own_weighter(name, "roll back")
            return await self._service.rollback_weighter(internal, to_position, expected_position)

    async def export_weighter(self, name: str) -> dict[str, bytes]:
        self.allow("ExportWeighter")
        with self._worded(lambda: self._no_weighter(name)):
            return await self._service.export_weighter(self._weighter(name))

    async def watch_weighter(self, name: str) -> AsyncIterator[WeighterView]:
        self.allow("WatchWeighter")
        with self._worded(lambda: self._no_weighter(name)):
            async for view in self._service.watch_weighter(self._weighter(name)):
                if not self._sees(view.record):  # no longer
                    raise self._no_weighter(name)
                yield self._weighter_view(view)

    # ---- References -------------------------------------------------------------------------------------------------

    async def put_reference(self, name: str, files: Mapping[str, bytes], exist_ok: bool = False) -> ReferenceView:
        self.allow("PutReference")
        check_name(name, "name")
        with self._worded(lambda: self._no_reference(name)):
            return self._reference_view(await self._service.put_reference(self._reference(name), files, exist_ok))

    async def get_reference(self, name: str, files: Iterable[str] = ()) -> ReferenceView:
        self.allow("GetReference")
        with self._worded(lambda: self._no_reference(name)):
            return self._reference_view(await self._service.get_reference(self._reference(name), files))

    async def list_references(self) -> list[ReferenceView]:
        self.allow("ListReferences")
        views = await self._service.list_references()
        visible = self._references()
        return sorted((self._reference_view(view) for view in views if view.name in visible), key=lambda v: v.name)

    async def delete_reference(self, name: str) -> None:
        self.allow("DeleteReference")
        with self._worded(lambda: self._no_reference(name)):
            await self._service.delete_reference(self._reference(name))

    # ---- Jobs -------------------------------------------------------------------------------------------------------

    async def open_job(self, request: JobRequest) -> JobView:
        self.allow("OpenJob")
        if request.role is Role.LEARN:
            self._caller.require("teach", "OpenJob of a learning job")
        job_id = request.job_id or uuid.uuid4().hex
        check_name(job_id, "job_id")
        if await self._service.role_of(self._inside(job_id)) is Role.LEARN:  # it would be changed
            self._caller.require("teach", f"OpenJob of {job_id!r}, which is a learning job,")
        weighter = self._weighter(request.weighter)
        known = weighter in self._service.weighter_records()

        def missing() -> NotFound:
            return self._no_reference(request.reference) if known else self._no_weighter(request.weighter)

        with self._worded(missing):
            internal = replace(
                request,
                weighter=weighter,
                job_id=self._inside(job_id),
                reference=self._reference(request.reference) if request.reference else "",
            )
            return self._job_view(await self._service.open_job(internal))

    async def close_job(self, job_id: str) -> JobView:
        self.allow("CloseJob")
        with self._worded(lambda: _no_job(job_id)):
            return self._job_view(await self._service.close_job(await self._job(job_id)))

    async def heartbeat(self, job_id: str, fallback_steps: int = 0) -> tuple[int, int]:
        self.allow("Heartbeat")
        with self._worded(lambda: _no_job(job_id)):
            return await self._service.heartbeat(await self._job(job_id), fallback_steps)

    async def quarantine_job(self, job_id: str, reason: str) -> JobView:
        """The weighter's owner decides, whoever's job it is."""
        self.allow("QuarantineJob")
        with self._worded(lambda: _no_job(job_id)):
            internal = self._inside(job_id)
            weighter = await self._service.weighter_of(internal)
            if tenant_of(weighter.name) != self._tenant:
                if tenant_of(internal) != self._tenant or not self._sees(weighter):
                    raise _no_job(job_id)
                raise PermissionDenied(
                    f"job {job_id!r} teaches {self._outside(weighter.name)!r}, which is another tenant's weighter: its "
                    "admins decide about that; close the job to end its teaching"
                )
            return self._job_view(await self._service.quarantine_job(internal, reason))

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
        self.allow("Score")
        with self._worded(lambda: _no_job(job_id)):
            return await self._service.score(
                await self._job(job_id),
                raw,
                min_position=min_position,
                min_effective_share=min_effective_share,
                return_statistics=return_statistics,
            )

    async def score_once(self, weighter: str, raw: RawInputs, column_order: tuple[str, ...] = ()) -> Scores:
        self.allow("ScoreOnce")
        with self._worded(lambda: self._no_weighter(weighter)):
            return await self._service.score_once(self._weighter(weighter), raw, column_order, self._tenant)

    async def score_texts(
        self, texts: tuple[str, ...], target: tuple[str, ...], weighter: str = "", reference: str = ""
    ) -> TextScores:
        self.allow("ScoreTexts")
        hosted = self._weighter(weighter) if weighter else ""
        known = not hosted or hosted in self._service.weighter_records()
        with self._worded(lambda: self._no_reference(reference) if known else self._no_weighter(weighter)):
            return await self._service.score_texts(
                texts, target, hosted, self._reference(reference) if reference else "", self._tenant
            )

    async def meta_update(self, job_id: str, request: MetaUpdateRequest) -> Taught:
        self.allow("MetaUpdate")
        with self._worded(lambda: _no_job(job_id)):
            return await self._service.meta_update(await self._job(job_id), request)

    # ---- Names ------------------------------------------------------------------------------------------------------

    def _inside(self, name: str) -> str:
        """The internal name of what the caller calls `name`."""
        owner, slash, rest = name.partition("/")
        return _internal(owner, rest) if slash else _internal(self._tenant, name)

    def _outside(self, internal: str) -> str:
        """What the caller calls it."""
        owner = tenant_of(internal)
        bare = internal.removeprefix(f"{owner}/")
        return bare if owner == self._tenant else f"{owner}/{bare}"

    def _sees(self, record: WeighterRecord) -> bool:
        shared = self._tenant in record.shared_with or EVERYONE in record.shared_with
        return shared or tenant_of(record.name) == self._tenant

    def _weighter(self, name: str) -> str:
        """The internal name of a weighter that the caller may use, or might make. Raises NotFound for others."""
        internal = self._inside(name)
        record = self._service.weighter_records().get(internal)
        if tenant_of(internal) != self._tenant and (record is None or not self._sees(record)):
            raise self._no_weighter(name)
        return internal

    def _own_weighter(self, name: str, what: str) -> str:
        """The internal name of a weighter that the caller may change. Raises NotFound or PermissionDenied."""
        internal = self._weighter(name)
        if tenant_of(internal) != self._tenant:
            raise PermissionDenied(f"weighter {name!r} is shared with you, but only its owner can {what} it")
        return internal

    async def _job(self, job_id: str) -> str:
        """The internal id of a job of the caller's, on a weighter that it may (still) use. Raises NotFound."""
        internal = self._inside(job_id)
        if tenant_of(internal) != self._tenant or not self._sees(await self._service.weighter_of(internal)):
            raise _no_job(job_id)
        return internal

    def _references(self) -> dict[str, str]:
        """Those that the caller may use, its own and everybody's: what it calls them, by internal name."""
        return {
            internal: internal if everybodys else self._outside(internal)
            for internal, everybodys in self._service.reference_names().items()
            if everybodys or tenant_of(internal) == self._tenant
        }

    def _reference(self, name: str) -> str:
        """The internal name: of everybody's reference where there is one of that name, else of one of the caller's."""
        if "/" in name:
            raise self._no_reference(name)
        return name if self._service.reference_names().get(name) else _internal(self._tenant, name)

    # ---- Answers ----------------------------------------------------------------------------------------------------

    def _weighter_view(self, view: WeighterView) -> WeighterView:
        """A weighter's owner sees all that teach it, others see themselves."""
        record, jobs = view.record, view.learning.jobs
        shared_with = record.shared_with
        if tenant_of(record.name) != self._tenant:
            shared_with = tuple(tenant for tenant in shared_with if tenant in (self._tenant, EVERYONE))
            jobs = {job_id: job for job_id, job in jobs.items() if tenant_of(job_id) == self._tenant}
        return replace(
            view,
            record=replace(record, name=self._outside(record.name), shared_with=shared_with),
            learning=replace(view.learning, jobs={self._outside(job_id): job for job_id, job in jobs.items()}),
        )

    def _reference_view(self, view: ReferenceView) -> ReferenceView:
        return replace(view, name=self._references().get(view.name, view.name))

    def _job_view(self, view: JobView) -> JobView:
        reference = view.record.reference.removeprefix(f"{self._tenant}/")
        record = replace(view.record, job_id=self._outside(view.record.job_id), reference=reference)
        return replace(view, record=record, weighter=self._outside(view.weighter))

    def _no_weighter(self, name: str) -> NotFound:
        visible = sorted(self._outside(r.name) for r in self._service.weighter_records().values() if self._sees(r))
        return NotFound(f"there is no weighter {name!r}; this service has: {_listed(visible) or 'none yet'}")

    def _no_reference(self, name: str) -> NotFound:
        visible = sorted(self._references().values())
        return NotFound(f"there is no reference {name!r}; this service has: {_listed(visible) or 'none'}")

    @contextmanager
    def _worded(self, missing: Callable[[], NotFound]) -> Iterator[None]:
        """Errors leave in the caller's names; what is not found, in words that tell nothing of other tenants."""
        try:
            yield
        except NotFound as exc:
            raise missing() from exc
        except WeighbridgeError as exc:
            exc.message = self._text(exc.message)
            exc.args = (exc.message,)
            raise

    def _text(self, message: str) -> str:
        own = message.replace(f"'{self._tenant}/", "'") if self._tenant else message
        return _OTHERS_REFERENCE.sub("the reference", own)  # equal ones share one that is loaded, whoever's it is


_OTHERS_REFERENCE = re.compile(r"reference '[^'/]+/[^']*'")


def _internal(tenant: str, name: str) -> str:
    return f"{tenant}/{name}" if tenant else name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10])


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id!r}; open it first")
