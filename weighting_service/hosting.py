"""The use cases of weighters: created, looked at, shared, rolled back, exported, watched, deleted.

Belongs to the service's event loop. Knows no job's inputs; which weighters there are is the roster's to know.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from weighting_contract.export import check_export
from weighting_contract.spec import WeighterSpec, check_name
from weighting_service import pretaught
from weighting_service.core import Core, check_room, own_name
from weighting_service.domain import EVERYONE, Rollback, WeighterRecord
from weighting_service.roster import Entry, Roster
from weighting_service.snapshots import SnapshotStore
from weighting_service.views import Taught, WeighterView
from weighting_service.weighter import Weighter, count_parameters, weighter_files

__all__ = ["Entry", "Weighters"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Beginning:
    """What a weighter is made of."""

    spec: WeighterSpec
    initial: str = ""  # as of its record
    files: Mapping[str, bytes] | None = None  # of the export that it starts from
    given: Mapping[str, Any] | None = None  # what was asked for of the spec, where the rest is the export's


class Weighters(Roster):
    """All weighters of one service, and what can be done with them. `await start()` before use."""

    def __init__(self, core: Core, snapshots: SnapshotStore, *, device: torch.device, models_dir: Path | None) -> None:
        super().__init__(core, snapshots, device=device, models_dir=models_dir)
        self._packaged: Weighter | None = None

    async def create(
        self, name: str, spec: Mapping[str, Any], exist_ok: bool, initial: str, files: Mapping[str, bytes]
    ) -> WeighterView:
        """A new weighter, durable when this returns; with `exist_ok` an equal one that is there already.

        Args:
            spec: plain values; what is left out has its default, or with `initial` or `files` that of the export.
            files: of an export to start from, in place of `initial`; empty: none.
        """
        check_name(own_name(name), "name")
        begun = await asyncio.to_thread(self._begun, spec, initial, files)
        if name not in self._entries:
            await self._watch.look()
        async with self._changing:
            if existing := self._entries.get(name):
                return self._existing(existing, begun, exist_ok)
            self._check_room(name)
            if entry := await self._create(name, begun):
                return view(entry)
        return self._existing(await self.find(name), begun, exist_ok)

    def _begun(self, spec: Mapping[str, Any], initial: str, files: Mapping[str, bytes]) -> _Beginning:
        """What is asked for, checked. Reads files."""
        if initial not in ("", pretaught.NAME):
            raise InvalidArgument(
                f"initial is {initial!r}, expected {pretaught.NAME!r}, or nothing for fresh parameters or for files"
            )
        if initial and files:
            raise InvalidArgument(f"initial is {initial!r}, but files of an export are given too; leave one out")
        if not initial and not files:
            return _Beginning(WeighterSpec.from_dict(dict(spec)))
        export = self._states.packaged_files() if initial else dict(files)
        info = check_export(export, "the export")
        given = None if spec.get("features") or spec.get("tokens") else spec
        whole = spec if given is None else _over(info.spec.to_dict(), given)
        return _Beginning(WeighterSpec.from_dict(dict(whole)), initial or info.initial, export, given)

    def _check_room(self, name: str) -> None:
        """Raises where the name is that of a weighter that is not served, or its tenant has all that it may have."""
        if failed := self._failed.get(name):
            kind = Unavailable if failed.passing else AlreadyExists  # the first is worth another try
            raise kind(f"weighter {name!r} exists, but is not served: {failed.reason}")
        most = self._core.limits.weighters_per_tenant
        full = f"there are {most} weighters, as many as a tenant may have (--max-weighters-per-tenant); delete one"
        check_room(name, (*self._entries, *self._failed), most, full)

    async def _create(self, name: str, begun: _Beginning) -> Entry | None:
        """None where another service has just taken the name."""
        await asyncio.to_thread(self._check_size, begun.spec)
        record = WeighterRecord(name, uuid.uuid4().hex, begun.spec, time.time_ns() // 1_000_000, begun.initial)
        hosted = await asyncio.to_thread(self._states.create, record, begun.files)
        try:
            await self._core.run_io(lambda: self._core.log.create_weighter(record))
        except AlreadyExists:
            if not self._core.log.shared:
                raise
            await self._delete_snapshots(record)
            return None
        entry = await self._host(hosted)
        self.count()
        return entry

    def _check_size(self, spec: WeighterSpec) -> None:
        """Before memory is taken for it."""
        most = self._core.limits.weighter_parameters
        if (parameters := count_parameters(spec, self._models_dir)) > most:
            raise InvalidArgument(
                f"spec asks for {parameters:,} parameters, but a weighter may have {most:,} "
                "(--max-weighter-parameters); choose a smaller encoder or head"
            )

    def _existing(self, entry: Entry, begun: _Beginning, exist_ok: bool) -> WeighterView:
        record, spec = entry.record, begun.spec
        if begun.given is not None:  # a release may bring the packaged weighter with other settings
            spec = WeighterSpec.from_dict(_over(record.spec.to_dict(), begun.given))
        if not exist_ok:
            raise AlreadyExists(f"weighter {record.name!r} exists; choose another name or set exist_ok")
        if record.spec != spec:
            raise AlreadyExists(
                f"weighter {record.name!r} exists with another spec {record.spec.to_dict()}, "
                f"asked for {spec.to_dict()}; choose another name or use the existing spec"
            )
        if record.initial != begun.initial:
            raise AlreadyExists(
                f"weighter {record.name!r} exists and started from {record.initial or 'fresh parameters'}, asked for "
                f"{begun.initial or 'fresh parameters'}; choose another name or ask for the same"
            )
        return view(entry)

    def views(self) -> list[WeighterView]:
        return [view(self._entries[name]) for name in sorted(self._entries)]

    async def get(self, name: str) -> WeighterView:
        """A weighter, with the positions that it can be rolled back to."""
        entry = await self.find(name)
        return replace(view(entry), snapshot_positions=await self._snapshot_positions(entry))

    async def share(self, name: str, tenants: tuple[str, ...]) -> WeighterView:
        """Says which tenants may use a weighter beside its own."""
        for tenant in tenants:
            if tenant != EVERYONE:
                check_name(tenant, "tenants")
        entry = await self.find(name)
        async with self._changing:
            record = replace(entry.record, shared_with=tenants)
            await self._core.run_io(lambda: self._core.log.put_weighter(record))
            entry.hosted.record = record
        return view(entry)

    async def rollback(self, name: str, to_position: int, expected_position: int | None = None) -> Taught:
        """Puts the state of the snapshot at `to_position` back, as a new entry of the log."""
        if to_position < 0:
            raise InvalidArgument(f"to_position is {to_position}, expected 0 or more")
        entry = await self.find(name)
        await self.look_for(entry, to_position)
        state = await self._snapshot_file(entry, to_position)
        uid, update_log = entry.record.uid, self._core.log
        rollback, known = Rollback(to_position, state), entry.head
        position = await self._core.run_io(lambda: update_log.append_rollback(uid, rollback, expected_position))
        self.check_grown(entry, known, position)
        self._head_is(entry, position)
        return Taught(position, False, entry.applied)

    async def delete(self, name: str) -> str:
        """Removes a weighter with its log, snapshots and jobs; returns its uid."""
        entry = await self.find(name)
        uid = entry.record.uid
        async with self._changing:
            if entry.deleted:
                raise NotFound(f"weighter {name!r} was deleted")
            self._follower.drop(uid)
            try:
                await self._core.run_io(lambda: self._core.log.delete_weighter(uid))
            except BaseException:  # the log has it still, or may have it
                self._follower.host(entry.hosted)
                raise
            self._forget(entry)
            await self._delete_snapshots(entry.record)
        return uid

    async def export(self, name: str) -> dict[str, bytes]:
        """The weighter at its applied position, as files by name."""
        entry = await self.find(name)
        about = f"It started from {entry.record.initial or 'fresh parameters'}."
        return await asyncio.to_thread(weighter_files, entry.weighter, about)

    async def watch(self, name: str) -> AsyncIterator[WeighterView]:
        """The weighter now, and again whenever its applied position has moved."""
        entry = await self.find(name)
        sent = -1
        while not self._core.draining:
            if entry.deleted:
                raise NotFound(f"weighter {name!r} was deleted")
            self._check_served(entry)
            moved = entry.moved
            if entry.applied != sent:
                sent = entry.applied
                yield view(entry)
            else:
                await moved.wait()
        raise Unavailable("the service is draining; watch again when it is back")

    async def packaged(self) -> Weighter:
        """The weighter that comes with the package, as it was taught. Raises FailedPrecondition without one."""
        if self._packaged is None:
            self._packaged = await asyncio.to_thread(self._states.packaged)
        return self._packaged

    async def _snapshot_file(self, entry: Entry, position: int) -> bytes:
        """Raises FailedPrecondition where there is none at that position."""
        uid, name = entry.record.uid, entry.record.name
        try:
            if position <= entry.head:  # else it is of another history
                return await asyncio.to_thread(self._snapshots.read_bytes, uid, position)
            there = await self._snapshot_positions(entry)
        except NotFound:
            there = await self._snapshot_positions(entry)
        except OSError as exc:
            raise Unavailable(f"the snapshot of weighter {name!r} at {position} can't be read now: {exc}") from exc
        raise FailedPrecondition(
            f"to_position is {position}, but weighter {name!r} has no snapshot there; it has them at "
            f"{', '.join(map(str, there)) or 'no position'}"
        )

    async def _snapshot_positions(self, entry: Entry) -> tuple[int, ...]:
        try:
            positions = await asyncio.to_thread(self._snapshots.positions, entry.record.uid)
        except OSError as exc:
            raise Unavailable(f"the snapshots of weighter {entry.record.name!r} can't be listed: {exc}") from exc
        return tuple(position for position in positions if position <= entry.head)

    async def _delete_snapshots(self, record: WeighterRecord) -> None:
        """Of a weighter that the log does not have; what can't be removed only takes up space."""
        try:
            await asyncio.to_thread(self._snapshots.delete, record.uid)
        except OSError as exc:
            log.warning("the snapshots of weighter %r (%s) were not removed: %s", record.name, record.uid, exc)


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
