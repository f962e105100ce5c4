"""References in memory: loaded when they are first needed, dropped when they are many. Knows no names but for messages.

Belongs to the service's event loop; references are loaded on worker threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

import numpy as np
import torch

from weighting_contract.errors import FailedPrecondition, InvalidArgument, Unavailable
from weighting_service.reference import Reference, load_reference
from weighting_service.uploads import Known

LOADED_MOST = 8  # beyond it, those that no open job uses are dropped

log = logging.getLogger(__name__)


class LoadedReferences:
    """Loaded references by checksum.

    Args:
        device: where they are loaded to.
        bring: called on a worker thread before a reference is loaded, to see that its folder is there.
        cached_samples: of each reference.
    """

    def __init__(self, device: torch.device, bring: Callable[[Known], None], cached_samples: int = 0) -> None:
        self._device = device
        self._cached_samples = cached_samples
        self._bring = bring
        self._loaded: dict[str, Reference] = {}  # by checksum, the least recently used first
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._dropped: set[str] = set()  # checksums that went while they were being loaded
        self._broken: dict[str, str] = {}  # verified ones that could not be loaded, and why
        self.in_use: Callable[[], Collection[str]] | None = None  # checksums that stay; None: none is ever dropped

    def __contains__(self, checksum: object) -> bool:
        return checksum in self._loaded

    def ready(self, known: Known) -> Reference:
        """As `ReferenceStore.ready`."""
        checksum = known.info.checksum
        if reference := self._loaded.pop(checksum, None):
            self._loaded[checksum] = reference
            return reference
        if reason := self._broken.get(checksum):
            raise FailedPrecondition(f"reference {known.name!r} can't be used: {reason}")
        self._begin(known)
        raise Unavailable(f"reference {known.name!r} is still loading; try again shortly")

    async def load(self, known: Known, wait_s: float | None) -> Reference:
        """As `ReferenceStore.load`."""
        if known.info.checksum not in self._loaded:
            self._broken.pop(known.info.checksum, None)
            await asyncio.wait([self._begin(known)], timeout=wait_s)  # the loading goes on whatever becomes of the wait
        return self.ready(known)

    def drop(self, checksum: str) -> None:
        """Forgets a reference that is not offered any more."""
        self._loaded.pop(checksum, None)
        self._broken.pop(checksum, None)
        if checksum in self._loading:
            self._dropped.add(checksum)

    async def stop(self) -> None:
        """Nobody waits for what is still loading."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, known: Known) -> asyncio.Task[None]:
        checksum = known.info.checksum
        self._dropped.discard(checksum)
        if checksum not in self._loading:
            self._loading[checksum] = asyncio.create_task(self._load(known), name=f"load reference {known.name}")
        return self._loading[checksum]

    async def _load(self, known: Known) -> None:
        checksum = known.info.checksum
        try:
            reference = await asyncio.to_thread(self._load_warm, known)
        except Exception as exc:  # damaged files, libraries that are missing, a device without memory: many kinds
            self._broken[checksum] = str(exc)
            log.error("reference %r can't be loaded: %s", known.name, exc)
        else:
            if checksum not in self._dropped:
                self._loaded[checksum] = reference
                log.info("reference %r is loaded", known.name)
                self._drop_idle()
        finally:
            self._dropped.discard(checksum)
            del self._loading[checksum]

    def _load_warm(self, known: Known) -> Reference:
        """One pass on the device, so that the first caller doesn't pay for lazy initialisation."""
        self._bring(known)
        reference = load_reference(known.folder, self._device, name=known.name, cached_samples=self._cached_samples)
        if reference.checksum != known.info.checksum:
            raise InvalidArgument(f"its files have changed since the service started: {short(reference.checksum)}")
        reference.raw_statistics([np.zeros(2, np.int64)])
        return reference

    def _drop_idle(self) -> None:
        """Makes room in memory: whoever asks for what was dropped has it loaded again."""
        if self.in_use is None or len(self._loaded) <= LOADED_MOST:
            return
        used, newest = self.in_use(), list(self._loaded)[-1]
        idle = [checksum for checksum in self._loaded if checksum not in used and checksum != newest]
        for checksum in idle[: len(self._loaded) - LOADED_MOST]:
            log.info("reference %r is dropped from memory until it is needed", self._loaded.pop(checksum).name)


def short(checksum: str) -> str:
    """Enough of a checksum to tell two apart."""
    return f"{checksum[:12]}..." if checksum else "none"
