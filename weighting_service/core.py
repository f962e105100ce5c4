"""What all use cases share: the log and its I/O thread, the engine, limits, metrics, and whether calls are taken now.

Knows no use case and no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from weighting_contract.errors import ResourceExhausted, Unavailable
from weighting_service.call_queue import EngineLimits
from weighting_service.engine import Engine
from weighting_service.guards import FULL_RETRY_S, Room, UnderWay
from weighting_service.inputs import BatchLimits
from weighting_service.metrics import Metrics
from weighting_service.update_log import UpdateLog

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of what one service takes on; each is a setting (`settings.py`), which refusals name."""

    batch: BatchLimits = field(default_factory=BatchLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    pending_updates: int = 1000  # in a weighter's log, not yet applied
    snapshot_every: int = 200  # positions
    updates_kept: int = 10_000  # positions behind the oldest kept snapshot
    sync_s: float = 0.1  # between two looks at what other services wrote to the log
    loading_wait_s: float = 8.0  # that a call waits for a reference; below what clients wait for OpenJob
    calls_per_job: int = 64  # of one job, under way at one time
    weighters_per_tenant: int = 100
    jobs_per_tenant: int = 1000  # open ones
    weighter_parameters: int = 1_000_000_000
    job_idle_s: float = 900.0  # without a call, after which a job is closed
    log_bytes: int = 16 << 30  # of the update log, beyond which updates are refused
    free_disk_bytes: int = 256 << 20  # below which updates are refused
    disk: Path | None = None  # directory whose free space is watched; None: none is


class Core:
    """Made once a service; its methods belong to the service's event loop."""

    def __init__(
        self,
        update_log: UpdateLog,
        limits: ServiceLimits,
        metrics: Metrics,
        snapshot_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.log = update_log
        self.limits = limits
        self.metrics = metrics
        self.engine = Engine(limits.engine, metrics.observe_pass)
        self.under_way = UnderWay(limits.calls_per_job, self.engine.retry_after_s)
        self.room = Room(
            update_log,
            self.run_io,
            metrics,
            log_bytes=limits.log_bytes,
            free_disk_bytes=limits.free_disk_bytes,
            disk=limits.disk,
            snapshot_bytes=snapshot_bytes,
        )
        self.started = False
        self.draining = False
        self._io = ThreadPoolExecutor(1, "weighbridge-log")
        self._changes: set[asyncio.Task[Any]] = set()  # begun and not ended

    async def run_io(self, work: Callable[[], T]) -> T:
        """`work` on the one thread that the log is used from."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._io, work)
        except Unavailable:
            self.metrics.log_reachable.set(0)
            raise
        self.metrics.log_reachable.set(1)
        return result

    async def to_its_end(self, change: Coroutine[Any, Any, T]) -> T:
        """`change`, which goes on where its caller is gone: what it did to the log must show in this service too."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def changes_end(self) -> None:
        """Until every change that was begun has ended."""
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def close_log(self) -> None:
        await self.run_io(self.log.close)
        self._io.shutdown()

    def not_ready_because(self) -> str:
        """Why the service should get no traffic now; empty when it should."""
        if self.draining:
            return "the service is draining"
        return "" if self.started else "the service is loading its weighters and references"

    def check_open(self) -> None:
        """Raises Unavailable while the service takes no calls."""
        if reason := self.not_ready_because():
            raise Unavailable(f"{reason}; use another one or try again shortly")

    def check_loaded(self) -> None:
        """Raises Unavailable while weighters are being loaded: what is not found may be there soon."""
        if not self.started:
            raise Unavailable("the service is loading its weighters; try again shortly")


def tenant_of(name: str) -> str:
    """Whose a weighter, reference or job is, by its internal name; empty: the default tenant's."""
    return name.rpartition("/")[0]


def check_room(name: str, taken: Iterable[str], most: int, full: str) -> None:
    """Raises ResourceExhausted, which says `full`, where the tenant of `name` has `most` of the names `taken`."""
    tenant = tenant_of(name)
    if sum(tenant_of(other) == tenant for other in taken) >= most:
        raise ResourceExhausted(full, retry_after_s=FULL_RETRY_S)


def own_name(name: str) -> str:
    """An internal name without its tenant."""
    return name.rpartition("/")[2]
