"""What other services write to a shared log: looks at all heads every so often, and at once where a caller needs it.

Belongs to the service's event loop. Knows the log; what a change means is its owner's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from weighting_contract.errors import ResourceExhausted, Unavailable, WeighbridgeError
from weighting_service.core import Core

log = logging.getLogger(__name__)

AWAY_S = 1.0  # between two looks at a log that does not answer, at least


class LogWatch:
    """Looks from `start` to `stop`; a log that is not shared has nothing to look for.

    Args:
        core: the log, and how often to look.
        known_heads: by uid, as they are known when a look begins.
        on_heads: gets those, and the heads that were found.
        on_records: the record of a weighter or a job was made, changed or deleted; it is told whether changes were
            undone: the log is an older copy then.
        overdue: says that `on_records` is to be called although nothing changed.
    """

    def __init__(
        self,
        core: Core,
        known_heads: Callable[[], dict[str, int]],
        on_heads: Callable[[Mapping[str, int], Mapping[str, int]], None],
        on_records: Callable[[bool], Awaitable[None]],
        overdue: Callable[[], bool],
    ) -> None:
        self._core = core
        self._known_heads = known_heads
        self._on_heads = on_heads
        self._on_records = on_records
        self._overdue = overdue
        self._version = -1
        self._looking = asyncio.Lock()  # one at a time, so that no look is overtaken by an earlier one
        self._task: asyncio.Task[None] | None = None
        self.reachable = True  # whether the log answered the last look

    def start(self) -> None:
        if self._core.log.shared:
            self._task = asyncio.create_task(self._look_forever(), name="look at the shared log")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> None:
        """Sees all that was written before this call. Raises Unavailable where the log does not answer."""
        if not self._core.log.shared:
            return
        async with self._looking:
            before = self._known_heads()
            heads = await self._core.run_io(self._core.log.heads)
            if heads.version != self._version or self._overdue():
                await self._on_records(heads.version < self._version)
                self._version = heads.version
            self._on_heads(before, heads.positions)

    async def _look_forever(self) -> None:
        pause_s = self._core.limits.sync_s
        while True:
            await asyncio.sleep(pause_s if self.reachable else max(pause_s, AWAY_S))
            try:
                await self.look()
            except (Unavailable, ResourceExhausted) as exc:
                if self.reachable:
                    log.warning("what other services write is not seen for now: %s", exc)
                self.reachable = False
            except WeighbridgeError as exc:
                log.error("what other services wrote can't be read: %s", exc)
                self.reachable = False
            except Exception:
                log.exception("looking at the shared log failed")
                self.reachable = False
            else:
                if not self.reachable:
                    log.warning("the log can be read again")
                self.reachable = True
