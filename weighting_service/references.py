"""The references that a service can score by: found, uploaded, loaded when needed, deleted. Knows no job, no transport.

They come from the package (the name "pretaught"), from folders of the models directory that hold a reference.json, and
from uploads, which lie in a storage that replicas share: what another one uploaded or deleted is noticed when a name is
asked for. Belongs to the service's event loop; files and models are read on worker threads, so nothing here keeps calls
waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from weighting_contract.reference import FILES, MANIFEST, MODEL, ReferenceInfo, check_reference
from weighting_contract.spec import check_name
from weighting_service import pretaught
from weighting_service.core import check_room, tenant_of
from weighting_service.loaded import LoadedReferences, short
from weighting_service.metrics import Metrics
from weighting_service.reference import Reference
from weighting_service.storage import Storage, open_storage
from weighting_service.uploads import Known, Uploads, known_reference
from weighting_service.views import ReferenceView

LOOK_EVERY_S = 1.0  # between two looks into the storage at what is known already
_REMEMBERED_LOOKS = 1000

__all__ = ["Known", "ReferenceStore", "short"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Damaged:
    reason: str
    uploaded: bool


class ReferenceStore:
    """References by name; names of one checksum share one loaded reference. `await start()` before use.

    A tenant's references have names "tenant/name" and are counted; that only its callers use them is not known here.

    Args:
        storage: for uploads: a storage, or the path or URL of one.
        models_dir: folders in it that hold references are offered under their own names.
        device: where references are loaded to.
        cache: folder of this machine for uploads that lie elsewhere; needed where the storage is not a local one.
        cached_samples: whose raw statistics each loaded reference keeps in memory; 0: none.
        per_tenant: uploads that a tenant may have, those that are damaged included.
    """

    def __init__(
        self,
        storage: Storage | str | os.PathLike[str],
        *,
        models_dir: Path | None,
        device: torch.device,
        cache: Path | None = None,
        cached_samples: int = 0,
        per_tenant: int = 1000,
    ) -> None:
        self._uploads = Uploads(open_storage(storage), cache)
        self._models_dir = models_dir
        self._per_tenant = per_tenant
        self._tenants: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # while uploading
        self._known: dict[str, Known] = {}
        self._failed: dict[str, _Damaged] = {}  # references that are there, but damaged
        self._memory = LoadedReferences(device, self._bring, cached_samples)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by name
        self._looked: dict[str, float] = {}  # when a look for a name began
        self._refreshing = asyncio.Lock()
        self._refreshed = float("-inf")
        self._metrics: Metrics | None = None

    async def start(self, metrics: Metrics, in_use: Callable[[], Collection[str]] | None = None) -> None:
        """Looks for references; one that is damaged is reported in the log and does not keep the others away.

        Args:
            metrics: where they are counted.
            in_use: checksums that open jobs score by; without it no loaded reference is ever dropped from memory.
        """
        self._metrics, self._memory.in_use = metrics, in_use
        self._known, self._failed = await asyncio.to_thread(self._scan)
        try:
            await self.refresh()
        except Unavailable as exc:
            log.error("uploaded references are looked for when they are asked for: %s", exc)
        else:
            await asyncio.to_thread(self._uploads.tidy, list(self._known.values()))
        self._count()

    async def stop(self) -> None:
        """Nobody waits for what is still loading."""
        await self._memory.stop()

    # ---- Use cases --------------------------------------------------------------------------------------------------

    async def put(self, name: str, files: Mapping[str, bytes], exist_ok: bool) -> ReferenceView:
        """A new reference under a name that is free, durable when this returns; with `exist_ok` the very same one."""
        check_name(name.rpartition("/")[2], "name")
        info = await asyncio.to_thread(check_reference, files, f"reference {name!r}")
        async with self._lock(name):
            await self._look(name)
            if failed := self._failed.get(name):
                raise AlreadyExists(f"reference {name!r} exists, but is damaged: {failed.reason}; delete it first")
            if existing := self._known.get(name):
                return self._existing(existing, info, exist_ok)
            try:
                async with self._tenants.setdefault(tenant_of(name), asyncio.Lock()):
                    await asyncio.to_thread(self._check_room, name)
                    await asyncio.to_thread(self._uploads.write, name, files)
                created = True
            except FileExistsError:
                created = False  # by another replica, since this one looked
            except OSError as exc:
                raise Unavailable(f"reference {name!r} was not stored: its files can't be written ({exc})") from exc
            await self._look(name)  # what is offered is what reads back
            stored = self._known.get(name)
            if stored is None or (created and stored.info.checksum != info.checksum):
                failed = self._failed.get(name)
                why = failed.reason if failed else "it was deleted, or replaced by another one, at the same time"
                raise Unavailable(
                    f"reference {name!r} does not read back as it was stored: {why}; try again, or choose another name"
                )
            return self._view(stored) if created else self._existing(stored, info, exist_ok)

    def _check_room(self, name: str) -> None:
        """Raises where the name's tenant has all the uploads that it may have, by what the storage holds now."""
        most = self._per_tenant
        full = (
            f"there are {most} uploaded references, as many as a tenant may have (--max-references-per-tenant); "
            "delete one"
        )
        check_room(name, self._uploads.names(), most, full)

    def _existing(self, known: Known, info: ReferenceInfo, exist_ok: bool) -> ReferenceView:
        if known.info.checksum != info.checksum:
            raise AlreadyExists(
                f"reference {known.name!r} exists with the checksum {short(known.info.checksum)}, asked for "
                f"{short(info.checksum)}; references are immutable: choose another name"
            )
        if not exist_ok:
            raise AlreadyExists(f"reference {known.name!r} exists; choose another name or set exist_ok")
        return self._view(known)

    async def get(self, name: str, files: Iterable[str] = ()) -> ReferenceView:
        """A reference, with those of its files that are named; a counted one has no model's."""
        known, wanted = await self.find(name), list(dict.fromkeys(files))
        for file in wanted:
            if file not in FILES:
                raise InvalidArgument(f"files names {file!r}, expected some of {', '.join(FILES)}")
        try:
            contents = await asyncio.to_thread(self._contents, known, wanted)
        except OSError as exc:
            raise Unavailable(f"the files of reference {name!r} can't be read: {exc.strerror or exc}") from exc
        return self._view(known, contents)

    def views(self) -> list[ReferenceView]:
        """All that are known now; `refresh` first for what other replicas have changed."""
        return [self._view(self._known[name]) for name in sorted(self._known)]

    async def delete(self, name: str) -> None:
        """Removes an upload, a damaged one too. That no open job uses it is the caller's to know."""
        async with self._lock(name):
            if _is_name(name):
                await self._look(name)
            if failed := self._failed.get(name):
                if not failed.uploaded:
                    raise FailedPrecondition(f"reference {name!r} is damaged and not an upload: {failed.reason}")
            elif not self.known(name).uploaded:
                raise FailedPrecondition(
                    f"reference {name!r} is not an upload: it comes with the service or its models directory and stays"
                )
            self._forget(name)
            try:
                await asyncio.to_thread(self._uploads.delete, name)
            except OSError as exc:
                raise Unavailable(f"the files of reference {name!r} can't be removed: {exc.strerror or exc}") from exc

    # ---- For the other use cases ------------------------------------------------------------------------------------

    def names(self) -> dict[str, bool]:
        """The references known by now, damaged ones too; whether one is no upload, and so everybody's."""
        known: dict[str, Known | _Damaged] = {**self._failed, **self._known}
        return {name: not reference.uploaded for name, reference in known.items()}

    async def find(self, name: str) -> Known:
        """The reference of that name, also one that another replica was given a moment ago.

        Raises:
            NotFound: there is none, or it was deleted.
            FailedPrecondition: it is damaged.
            Unavailable: it is not known here, and the storage can't be reached.
        """
        await self._look_again(name)
        return self.known(name)

    def known(self, name: str) -> Known:
        """As `find`, but at once: what this replica knows."""
        if found := self._known.get(name):
            return found
        if failed := self._failed.get(name):
            raise FailedPrecondition(f"reference {name!r} is damaged: {failed.reason}")
        raise NotFound(
            f"there is no reference {name!r}; this service has: {', '.join(sorted(self._known)[:10]) or 'none'}"
        )

    async def find_checksum(self, name: str, checksum: str) -> Known:
        """The reference that had this name and checksum, under whichever name it is known now; at once where it is.

        Raises:
            FailedPrecondition: this service does not have it; the message says what it has instead.
            Unavailable: it is not known here, and the storage can't be reached.
        """
        for look in (functools.partial(self._look_again, name), self.refresh):
            with contextlib.suppress(FailedPrecondition):
                return self.of_checksum(name, checksum)
            await look()
        return self.of_checksum(name, checksum)

    def of_checksum(self, name: str, checksum: str) -> Known:
        """As `find_checksum`, among what this replica knows."""
        named = self._known.get(name)
        for candidate in ([named] if named else []) + list(self._known.values()):
            if candidate.info.checksum == checksum:
                return candidate
        if named:
            reason = f"has the checksum {short(named.info.checksum)} here"
        else:
            reason = f"is damaged: {self._failed[name].reason}" if name in self._failed else "is not on this service"
        raise FailedPrecondition(
            f"reference {name!r} of the checksum {short(checksum)} is needed, but {name!r} {reason}; upload the "
            "reference again, or open the job under another id"
        )

    def ready(self, known: Known) -> Reference:
        """The reference at work, at once.

        Raises:
            Unavailable: it is still being loaded; this call has seen to it.
            FailedPrecondition: it can't be loaded.
        """
        return self._memory.ready(known)

    async def load(self, known: Known, wait_s: float | None = None) -> Reference:
        """As `ready`, but waits for what is being loaded, at most `wait_s`; what failed before is tried again."""
        return await self._memory.load(known, wait_s)

    # ---- What other replicas change ---------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Learns which uploads came and went elsewhere, unless that was done within `LOOK_EVERY_S`.

        Raises:
            Unavailable: the storage can't be reached.
        """
        async with self._refreshing:
            if time.monotonic() - self._refreshed < LOOK_EVERY_S:
                return
            began = time.monotonic()
            try:
                names = await asyncio.to_thread(self._uploads.names)
            except OSError as exc:
                raise Unavailable(f"uploaded references can't be listed: {exc}") from exc
            for name in sorted(names ^ {known.name for known in self._known.values() if known.uploaded}):
                await self._look_again(name)
            self._refreshed = began

    async def _look_again(self, name: str) -> None:
        """Looks for an upload, unless the answer is fresh: a look that began after this call, or a moment ago."""
        if ((known := self._known.get(name)) and not known.uploaded) or not _is_name(name):
            return
        asked = time.monotonic()
        async with self._lock(name):
            looked = self._looked.get(name, float("-inf"))
            seen = name in self._known or name in self._failed
            if looked < asked - (LOOK_EVERY_S if seen else 0):
                await self._look(name)

    async def _look(self, name: str) -> None:
        """Makes what is known of one upload what the storage holds. The caller has the name's lock."""
        known, failed = self._known.get(name), self._failed.get(name)
        if (known and not known.uploaded) or (failed and not failed.uploaded):
            return
        if len(self._looked) > _REMEMBERED_LOOKS:
            self._looked.clear()
        self._looked[name] = time.monotonic()
        try:
            if known and await asyncio.to_thread(self._uploads.fingerprint, name) == known.fingerprint:
                return
            upload = await asyncio.to_thread(self._uploads.read, name)
        except InvalidArgument as exc:
            self._offer(name, None, exc.message)
        except OSError as exc:
            if known is None:
                raise Unavailable(f"reference {name!r} can't be looked for: {exc}") from exc
            log.warning("whether reference %r is still there can't be seen: %s", name, exc)
        else:
            self._offer(name, upload)

    def _offer(self, name: str, upload: Known | None, damage: str = "") -> None:
        """Replaces what is known under a name."""
        new = name not in self._failed
        self._forget(name)
        if upload:
            self._known[name] = upload
        if damage:
            self._failed[name] = _Damaged(damage, uploaded=True)
            if new:
                log.error("reference %r is not offered: %s", name, damage)
        self._count()

    def _forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        self._failed.pop(name, None)
        if known and not self._offered(known.info.checksum):
            self._memory.drop(known.info.checksum)
        if self._metrics:
            self._metrics.forget_reference(name)
        self._count()

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _offered(self, checksum: str) -> bool:
        return any(known.info.checksum == checksum for known in self._known.values())

    def _contents(self, known: Known, files: Iterable[str]) -> dict[str, bytes]:
        self._bring(known)
        counted = not any((known.folder / file).exists() for file in MODEL)
        return {file: (known.folder / file).read_bytes() for file in files if not (counted and file in MODEL)}

    def _bring(self, known: Known) -> None:
        """Fetches an upload again where the cache has lost it."""
        if known.uploaded and not known.folder.is_dir():
            self._uploads.read(known.name)

    def _scan(self) -> tuple[dict[str, Known], dict[str, _Damaged]]:
        """The references that stay: the package's and those of the models directory."""
        known: dict[str, Known] = {}
        failed: dict[str, _Damaged] = {}
        for name, folder in self._fixed():
            if name in known or name in failed:
                log.warning("the reference in %s is not offered: the name %r is taken", folder, name)
                continue
            try:
                known[name] = known_reference(name, folder)
            except InvalidArgument as exc:
                failed[name] = _Damaged(exc.message, uploaded=False)
                log.error("reference %r is not offered: %s", name, exc)
        return known, failed

    def _fixed(self) -> Iterator[tuple[str, Path]]:
        if pretaught.reference_folder().is_dir():
            yield pretaught.NAME, pretaught.reference_folder()
        if self._models_dir and self._models_dir.is_dir():
            for folder in sorted(self._models_dir.iterdir()):
                if (folder / MANIFEST).is_file():
                    yield folder.name, folder

    def _view(self, known: Known, files: Mapping[str, bytes] | None = None) -> ReferenceView:
        loaded = known.info.checksum in self._memory
        return ReferenceView(known.name, known.info, known.ngram_buckets, loaded, files or {})

    def _count(self) -> None:
        if self._metrics:
            self._metrics.references.set(len(self._known))
            self._metrics.references_failed.set(len(self._failed))


def _is_name(name: str) -> bool:
    """Whether it can be an upload's: "name" or "tenant/name"."""
    try:
        for part in name.split("/", 1):
            check_name(part, "name")
    except InvalidArgument:
        return False
    return True
