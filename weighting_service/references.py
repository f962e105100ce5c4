"""The references that a service can score by: found, uploaded, loaded when needed, deleted. Knows no job, no transport.

They come from the package (the name "pretaught"), from folders of the models directory that hold a reference.json, and
from uploads, which lie in the state directory. Belongs to the service's event loop; files and models are read on worker
threads, so nothing here keeps calls waiting.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weighting_contract.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from weighting_contract.reference import FILES, MANIFEST, ReferenceInfo, check_reference, read_counts
from weighting_contract.spec import check_name
from weighting_service import pretaught
from weighting_service.metrics import Metrics
from weighting_service.reference import Reference, load_reference, reference_files, write_reference
from weighting_service.views import ReferenceView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """A verified reference: where it lies and what it says about itself."""

    name: str
    folder: Path
    info: ReferenceInfo
    ngram_buckets: int
    uploaded: bool  # else it is the package's or the models directory's, and stays


class ReferenceStore:
    """References by name; names of one checksum share one loaded reference. `await start()` before use.

    Args:
        folder: for uploads; made when the first one comes.
        models_dir: folders in it that hold references are offered under their own names.
        device: where references are loaded to.
    """

    def __init__(self, folder: Path, *, models_dir: Path | None, device: torch.device) -> None:
        self._folder = folder
        self._models_dir = models_dir
        self._device = device
        self._known: dict[str, Known] = {}
        self._failed: dict[str, str] = {}  # references on disk that are damaged, and why
        self._loaded: dict[str, Reference] = {}  # by checksum
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, str] = {}  # verified ones that could not be loaded, and why
        self._changing = asyncio.Lock()
        self._metrics: Metrics | None = None

    async def start(self, metrics: Metrics) -> None:
        """Looks for references; one that is damaged is reported in the log and does not keep the others away."""
        self._metrics = metrics
        self._known, self._failed = await asyncio.to_thread(self._scan)
        self._count()

    async def stop(self) -> None:
        """Nobody waits for what is still loading."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- Use cases --------------------------------------------------------------------------------------------------

    async def put(self, name: str, files: Mapping[str, bytes], exist_ok: bool) -> ReferenceView:
        """A new reference under a name that is free, durable when this returns; with `exist_ok` the very same one."""
        check_name(name, "name")
        info = await asyncio.to_thread(check_reference, files, f"reference {name!r}")
        async with self._changing:
            if name in self._failed:
                raise AlreadyExists(f"reference {name!r} exists, but is damaged: {self._failed[name]}; delete it first")
            if existing := self._known.get(name):
                return self._existing(existing, info, exist_ok)
            folder = self._folder / name
            try:
                await asyncio.to_thread(write_reference, folder, files)
            except OSError as exc:
                raise Unavailable(f"reference {name!r} was not stored: its files can't be written ({exc})") from exc
            buckets = len(read_counts(files).ngrams)
            self._known[name] = Known(name, folder, info, buckets, uploaded=True)
            self._count()
            return self._view(self._known[name])

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
        """A reference, with those of its files that are named."""
        known, wanted = self.known(name), list(dict.fromkeys(files))
        for file in wanted:
            if file not in FILES:
                raise InvalidArgument(f"files names {file!r}, expected some of {', '.join(FILES)}")
        try:
            contents = await asyncio.to_thread(lambda: {file: (known.folder / file).read_bytes() for file in wanted})
        except OSError as exc:
            raise Unavailable(f"the files of reference {name!r} can't be read: {exc.strerror or exc}") from exc
        return self._view(known, contents)

    def views(self) -> list[ReferenceView]:
        return [self._view(self._known[name]) for name in sorted(self._known)]

    async def delete(self, name: str) -> None:
        """Removes an upload, a damaged one too. That no open job uses it is the caller's to know."""
        async with self._changing:
            if name not in self._failed and not self.known(name).uploaded:
                raise FailedPrecondition(
                    f"reference {name!r} is not an upload: it comes with the service or its models directory and stays"
                )
            folder = self._folder / name
            if name in self._failed and not folder.is_dir():
                raise FailedPrecondition(f"reference {name!r} is damaged and not an upload: {self._failed[name]}")
            known = self._known.pop(name, None)
            self._failed.pop(name, None)
            if known and all(other.info.checksum != known.info.checksum for other in self._known.values()):
                self._loaded.pop(known.info.checksum, None)
                self._broken.pop(known.info.checksum, None)
            if self._metrics:
                self._metrics.forget_reference(name)
            self._count()
            try:
                await asyncio.to_thread(_remove, folder)
            except OSError as exc:
                raise Unavailable(f"the files of reference {name!r} can't be removed: {exc.strerror or exc}") from exc

    # ---- For the other use cases ------------------------------------------------------------------------------------

    def known(self, name: str) -> Known:
        """The reference of that name. Raises NotFound, or FailedPrecondition where it is damaged."""
        if found := self._known.get(name):
            return found
        if reason := self._failed.get(name):
            raise FailedPrecondition(f"reference {name!r} is damaged: {reason}")
        raise NotFound(
            f"there is no reference {name!r}; this service has: {', '.join(sorted(self._known)[:10]) or 'none'}"
        )

    def of_checksum(self, name: str, checksum: str) -> Known:
        """The reference that had this name and checksum, under whichever name it is known now.

        Raises:
            FailedPrecondition: this service does not have it; the message says what it has instead.
        """
        named = self._known.get(name)
        for candidate in ([named] if named else []) + list(self._known.values()):
            if candidate.info.checksum == checksum:
                return candidate
        if named:
            reason = f"has the checksum {short(named.info.checksum)} here"
        else:
            reason = f"is damaged: {self._failed[name]}" if name in self._failed else "is not on this service"
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
        if reference := self._loaded.get(known.info.checksum):
            return reference
        if reason := self._broken.get(known.info.checksum):
            raise FailedPrecondition(f"reference {known.name!r} can't be used: {reason}")
        self._begin(known)
        raise Unavailable(f"reference {known.name!r} is still loading; try again shortly")

    async def load(self, known: Known, wait_s: float | None = None) -> Reference:
        """As `ready`, but waits for what is being loaded, at most `wait_s`; what failed before is tried again."""
        if known.info.checksum not in self._loaded:
            self._broken.pop(known.info.checksum, None)
            await asyncio.wait([self._begin(known)], timeout=wait_s)  # the loading goes on whatever becomes of the wait
        return self.ready(known)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _begin(self, known: Known) -> asyncio.Task[None]:
        checksum = known.info.checksum
        if checksum not in self._loading:
            self._loading[checksum] = asyncio.create_task(self._load(known), name=f"load reference {known.name}")
        return self._loading[checksum]

    async def _load(self, known: Known) -> None:
        checksum = known.info.checksum
        try:
            reference = await asyncio.to_thread(_load_warm, known, self._device)
        except Exception as exc:  # damaged files, libraries that are missing, a device without memory: many kinds
            self._broken[checksum] = str(exc)
            log.error("reference %r can't be loaded: %s", known.name, exc)
        else:
            if any(other.info.checksum == checksum for other in self._known.values()):  # else it was deleted meanwhile
                self._loaded[checksum] = reference
                log.info("reference %r is loaded", known.name)
        finally:
            del self._loading[checksum]

    def _scan(self) -> tuple[dict[str, Known], dict[str, str]]:
        known: dict[str, Known] = {}
        failed: dict[str, str] = {}
        for name, folder, uploaded in self._candidates():
            if name in known or name in failed:
                log.warning("the reference in %s is not offered: the name %r is taken", folder, name)
                continue
            try:
                files = reference_files(folder)
                info = check_reference(files, str(folder))
                known[name] = Known(name, folder, info, len(read_counts(files).ngrams), uploaded)
            except InvalidArgument as exc:
                failed[name] = exc.message
                log.error("reference %r is not offered: %s", name, exc)
        return known, failed

    def _candidates(self) -> Iterator[tuple[str, Path, bool]]:
        if pretaught.reference_folder().is_dir():
            yield pretaught.NAME, pretaught.reference_folder(), False
        if self._models_dir and self._models_dir.is_dir():
            for folder in sorted(self._models_dir.iterdir()):
                if (folder / MANIFEST).is_file():
                    yield folder.name, folder, False
        if self._folder.is_dir():
            for folder in sorted(self._folder.iterdir()):
                if folder.name.startswith("."):  # of an upload or a deletion that was cut short
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    yield folder.name, folder, True

    def _view(self, known: Known, files: Mapping[str, bytes] | None = None) -> ReferenceView:
        loaded = known.info.checksum in self._loaded
        return ReferenceView(known.name, known.info, known.ngram_buckets, loaded, files or {})

    def _count(self) -> None:
        if self._metrics:
            self._metrics.references.set(len(self._known))
            self._metrics.references_failed.set(len(self._failed))


def short(checksum: str) -> str:
    """Enough of a checksum to tell two apart."""
    return f"{checksum[:12]}..." if checksum else "none"


def _load_warm(known: Known, device: torch.device) -> Reference:
    """One pass on the device, so that the first caller doesn't pay for lazy initialisation."""
    reference = load_reference(known.folder, device, name=known.name)
    if reference.checksum != known.info.checksum:
        raise InvalidArgument(f"its files have changed since the service started: {short(reference.checksum)}")
    reference.raw_statistics([np.zeros(2, np.int64)])
    return reference


def _remove(folder: Path) -> None:
    """First out of sight, so that what a crash leaves is no half reference."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    folder.rename(hidden)
    shutil.rmtree(hidden)
