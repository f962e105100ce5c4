"""Leases of jobs: one whose trainer was not heard of for a while is closed, so that what it holds is free again.

Belongs to the service's event loop. Several services on one log tell each other through it when a job was last heard
of. Their clocks need to agree to a fraction of the idle time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from weighting_contract.errors import WeighbridgeError
from weighting_service.core import Core
from weighting_service.guards import the_job

log = logging.getLogger(__name__)

LONGEST_PERIOD_S = 30.0


class Leases:
    """Sweeps from `start` to `stop`.

    Args:
        open_jobs: the ids of the jobs that are open now.
        expire: closes a job, unless `silent` says by then that it was heard of.
    """

    def __init__(
        self, core: Core, open_jobs: Callable[[], Iterable[str]], expire: Callable[[str], Awaitable[None]]
    ) -> None:
        self._core = core
        self._open_jobs = open_jobs
        self._expire = expire
        self._idle_s = core.limits.job_idle_s
        self._heard: dict[str, float] = {}  # job -> monotonic time
        self._unwritten: set[str] = set()  # jobs heard of since the log was told
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Jobs that are open already get a whole lease: nobody could call while the service was down."""
        self._renew()
        self._sweeping = asyncio.create_task(self._sweep_forever(), name="sweep idle jobs")

    async def stop(self) -> None:
        if self._sweeping:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping

    def heard(self, job_id: str) -> None:
        """A call of the job came in."""
        self._heard[job_id] = time.monotonic()
        self._unwritten.add(job_id)

    def forget(self, job_id: str) -> None:
        """The job is closed."""
        self._heard.pop(job_id, None)
        self._unwritten.discard(job_id)

    def silent(self, job_id: str) -> bool:
        """Whether this service has not heard of an open job for the idle time, and answers no call of it now."""
        since = time.monotonic() - self._heard.setdefault(job_id, time.monotonic())
        return since >= self._idle_s and not self._core.under_way.calls_of(the_job(job_id))

    async def sweep(self) -> None:
        """Tells the log who was heard of, and closes the jobs that no service has heard of for the idle time."""
        self._renew()
        await self._tell()
        silent = [job_id for job_id in self._open_jobs() if self.silent(job_id)]
        if not silent:
            return
        seen = await self._core.run_io(lambda: self._core.log.jobs_seen(silent))
        for job_id in silent:
            if job_id in seen:
                elsewhere = time.monotonic() - max(0.0, time.time() - seen[job_id] / 1000)
                self._heard[job_id] = max(self._heard.get(job_id, elsewhere), elsewhere)
            if self.silent(job_id):
                await self._expire(job_id)

    def _renew(self) -> None:
        """Jobs that are new here, as another service opened them or this one started, begin a lease."""
        now = time.monotonic()
        jobs = set(self._open_jobs())
        self._heard = {job_id: self._heard.get(job_id, now) for job_id in jobs}
        self._unwritten &= jobs

    async def _tell(self) -> None:
        news, self._unwritten = self._unwritten, set()
        clock = time.time() - time.monotonic()
        times = {job_id: int((clock + self._heard[job_id]) * 1000) for job_id in news}
        if not times:
            return
        try:
            await self._core.run_io(lambda: self._core.log.touch_jobs(times))
        except WeighbridgeError:
            self._unwritten |= news
            raise

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self._core.room.show()
                await self.sweep()
            except WeighbridgeError as exc:
                log.warning("no idle jobs are closed for now: %s", exc.message)
            except Exception:
                log.exception("looking for idle jobs failed")
            await asyncio.sleep(min(self._idle_s / 4, LONGEST_PERIOD_S))
