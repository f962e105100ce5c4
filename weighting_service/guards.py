"""What stands between a call and the service's resources: calls under way of one job, room for more updates.

Belongs to the service's event loop. Knows no use case and no transport.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weighting_contract.errors import ResourceExhausted
from weighting_service.metrics import Metrics
from weighting_service.update_log import UpdateLog

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
FULL_RETRY_S = 30.0  # somebody has to make room
MIB = 1 << 20


def the_job(job_id: str) -> str:
    """A job as a caller of `UnderWay`."""
    return f"job {job_id!r}"


class UnderWay:
    """Counts calls under way by who makes them, in words that a refusal can use, and refuses those beyond `limit`."""

    def __init__(self, limit: int, retry_after_s: Callable[[], float]) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._calls: Counter[str] = Counter()

    def calls_of(self, caller: str) -> int:
        return self._calls[caller]

    @contextmanager
    def one_of(self, caller: str, tenant: str = "") -> Iterator[None]:
        """Around one call. Raises ResourceExhausted where there are as many as there may be.

        Args:
            caller: who makes it.
            tenant: each one's callers of these words are others.
        """
        key = f"{tenant}/{caller}" if tenant else caller
        if self._calls[key] >= self._limit:
            raise ResourceExhausted(
                f"{caller} has {self._limit} calls under way, as many as it may have (--max-calls-per-job); wait for "
                "an answer before the next call",
                self._retry_after_s(),
            ).because("calls")
        self._calls[key] += 1
        try:
            yield
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]


class Room:
    """Whether there is room for more updates, in the log and on the disk. Looks once a second at most, off the loop.

    Args:
        run_io: runs a function on the log's thread.
        log_bytes: size of the log beyond which there is none.
        free_disk_bytes: free space below which there is none.
        disk: the directory whose free space counts; None: none does.
        snapshot_bytes: says how much the snapshots take, which is only shown; None: it is not.
    """

    def __init__(
        self,
        update_log: UpdateLog,
        run_io: Callable[[Callable[[], tuple[int, int | None]]], Awaitable[tuple[int, int | None]]],
        metrics: Metrics,
        *,
        log_bytes: int,
        free_disk_bytes: int,
        disk: Path | None,
        snapshot_bytes: Callable[[], int] | None,
    ) -> None:
        self._log = update_log
        self._run_io = run_io
        self._metrics = metrics
        self._log_bytes = log_bytes
        self._free_disk_bytes = free_disk_bytes
        self._disk = disk
        self._snapshot_bytes = snapshot_bytes
        self._looked_at = -LOOK_EVERY_S
        self._full = ""  # what is full, and what to do; empty: nothing is

    async def check(self) -> None:
        """Raises ResourceExhausted where there is no room for another update."""
        await self.look()
        if self._full:
            raise ResourceExhausted(self._full, FULL_RETRY_S).because("storage")

    async def look(self) -> None:
        """Looks again where the last look is a second old. Meanwhile other callers go by the last one."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        size, free = await self._run_io(self._measure)
        self._metrics.log_bytes.set(size)
        if free is not None:
            self._metrics.disk_free_bytes.set(free)
        self._full = self._verdict(size, free)

    async def show(self) -> None:
        """Brings the metrics up to date, as it may be a while since the last update."""
        await self.look()
        if self._snapshot_bytes:
            try:
                self._metrics.snapshot_bytes.set(await asyncio.to_thread(self._snapshot_bytes))
            except OSError as exc:
                log.warning("the size of the snapshots can't be read: %s", exc)

    def _measure(self) -> tuple[int, int | None]:
        """Bytes of the log, and bytes free."""
        free = None
        if self._disk:
            try:
                free = shutil.disk_usage(self._disk).free
            except OSError as exc:
                log.warning("the free space of %s can't be read: %s", self._disk, exc.strerror)
        return self._log.size_bytes(), free

    def _verdict(self, size: int, free: int | None) -> str:
        if size > self._log_bytes:
            return (
                f"the update log takes {size / MIB:.0f} MiB, and may take {self._log_bytes / MIB:.0f} (--max-log-mb): "
                "no update is taken, scores go on; delete weighters that nobody needs, keep fewer updates "
                "(--updates-kept) or allow more"
            )
        if free is not None and free < self._free_disk_bytes:
            return (
                f"the disk of --state has {free / MIB:.0f} MiB left, and {self._free_disk_bytes / MIB:.0f} are to stay "
                "free (--min-free-disk-mb): no update is taken, scores go on; make room"
            )
        return ""
