"""What all use cases share: the log and its I/O thread, the engine, limits, metrics, and whether calls are taken now.

Knows no use case and no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from weighting_contract.errors import Unavailable
from weighting_service.engine import Engine, EngineLimits
from weighting_service.inputs import BatchLimits
from weighting_service.metrics import Metrics
from weighting_service.update_log import UpdateLog

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of what one service takes on."""

    batch: BatchLimits = field(default_factory=BatchLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    pending_updates: int = 1000  # in a weighter's log, not yet applied
    snapshot_every: int = 200  # positions
    loading_wait_s: float = 8.0  # that a call waits for a reference; below what clients wait for OpenJob


class Core:
    """Made once a service; its methods belong to the service's event loop."""

    def __init__(self, update_log: UpdateLog, limits: ServiceLimits, metrics: Metrics) -> None:
        self.log = update_log
        self.limits = limits
        self.metrics = metrics
        self.engine = Engine(limits.engine, metrics.observe_pass)
        self.started = False
        self.draining = False
        self._io = ThreadPoolExecutor(1, "weighbridge-log")

    async def run_io(self, work: Callable[[], T]) -> T:
        """`work` on the one thread that the log is used from."""
        return await asyncio.get_running_loop().run_in_executor(self._io, work)

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
