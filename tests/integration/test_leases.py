"""Jobs whose trainer is gone are closed; one that was only away goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Address, ServiceThread
from tests.waiting import wait_for
from trainer_client import Client, Limits, Timeouts, connect
from weighting_contract.errors import Unavailable
from weighting_contract.spec import FeatureSpec, WeighterSpec
from weighting_service.core import Core, ServiceLimits
from weighting_service.domain import JobRecord, Role, WeighterRecord
from weighting_service.guards import the_job
from weighting_service.leases import Leases
from weighting_service.metrics import Metrics
from weighting_service.update_log import SqliteUpdateLog

SPEC = {"features": {"names": ["a", "b"]}, "head": {"width": 8, "attention_heads": 2}}
FEATURES = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
COTANGENT = FEATURES[:, 0]
PATIENT = Timeouts(score_s=30, meta_update_s=30, admin_s=30, close_s=30)
IDLE_S = 1.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Address]:
    running = ServiceThread(tmp_path / "state", job_idle_s=IDLE_S)
    yield running.address
    running.stop()


def client_of(service: Address, heartbeat_s: float) -> Client:
    return connect(service.grpc_url, timeouts=PATIENT, limits=Limits(heartbeat_s=heartbeat_s), on_failure="raise")


def open_jobs(client: Client) -> int:
    return client.get_weighter("w").jobs_open


def test_a_trainer_that_pauses_goes_on(service: Address) -> None:
    with client_of(service, heartbeat_s=1000) as client, client.open_job("run", weighter="w", spec=SPEC) as job:
        first = job.score(FEATURES, 0)
        wait_for(lambda: open_jobs(client) == 0)
        again = job.score(FEATURES, 1)
        np.testing.assert_array_equal(again.weights, first.weights)
        wait_for(lambda: open_jobs(client) == 0)
        job.meta_update(COTANGENT, FEATURES, 1)
        assert job.flush()
        assert (job.last_step, job.last_position) == (1, 1)
        counters = job.counters
    assert (counters.fallback_steps, counters.updates_acknowledged, counters.updates_refused) == (0, 1, 0)
    metrics = httpx.get(f"{service.rest_url}/metrics").text
    assert "weighbridge_jobs_expired_total 2.0" in metrics
    assert "weighbridge_log_reachable 1.0" in metrics
    assert re.search(r"\nweighbridge_log_bytes [1-9]", metrics)


def test_heartbeats_keep_a_job_open(service: Address) -> None:
    with (
        client_of(service, 0.1) as beating,
        client_of(service, 1000) as silent,
        beating.open_job(weighter="w", spec=SPEC),
        silent.open_job(weighter="w"),
    ):
        assert open_jobs(beating) == 2
        wait_for(lambda: open_jobs(beating) < 2)
        assert open_jobs(beating) == 1


class Replica:
    """The leases of one service on a log that others have too; `closed` are the jobs that it would close."""

    def __init__(self, log: SqliteUpdateLog, *jobs: str) -> None:
        self.core = Core(log, ServiceLimits(job_idle_s=IDLE_S), Metrics())
        self.jobs = list(jobs)
        self.closed: list[str] = []
        self.leases = Leases(self.core, lambda: self.jobs, self._close)

    async def _close(self, job_id: str) -> None:
        self.jobs.remove(job_id)
        self.closed.append(job_id)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteUpdateLog]:
    with FailingLog(tmp_path / "log.sqlite") as log:
        log.create_weighter(WeighterRecord("w", "0a", WeighterSpec(FeatureSpec(("a",))), 0))
        for job_id in ("gone", "alive"):
            log.put_job(JobRecord(job_id, "0a", Role.LEARN))
        yield log


class FailingLog(SqliteUpdateLog):
    away = False

    def touch_jobs(self, seen: Any) -> None:
        if self.away:
            raise Unavailable("the log is away")
        super().touch_jobs(seen)


async def until(condition: Callable[[], Any], turn: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await turn()
            await asyncio.sleep(0.01)


def test_a_job_that_another_service_hears_of_stays(log: SqliteUpdateLog) -> None:
    async def main() -> None:
        here, there = Replica(log, "gone", "alive"), Replica(log, "gone", "alive")

        async def turn() -> None:
            there.leases.heard("alive")
            await there.leases.sweep()
            await here.leases.sweep()

        await until(lambda: here.closed and there.closed, turn)
        assert (here.closed, there.closed) == (["gone"], ["gone"])

    asyncio.run(main())


def test_a_call_under_way_keeps_a_job_open(log: SqliteUpdateLog) -> None:
    async def main() -> None:
        here = Replica(log, "alive", "gone")
        with here.core.under_way.one_of(the_job("alive")):
            await until(lambda: here.closed, here.leases.sweep)
        assert here.closed == ["gone"]

    asyncio.run(main())


def test_after_a_restart_jobs_get_a_whole_lease(log: SqliteUpdateLog) -> None:
    async def main() -> None:
        log.touch_jobs({"gone": 1, "alive": 1})  # in 1970
        here = Replica(log, "gone", "alive")
        here.leases.start()
        await here.leases.sweep()
        await here.leases.stop()
        assert here.closed == []
        await until(lambda: here.closed, here.leases.sweep)

    asyncio.run(main())


def test_a_log_that_is_away_closes_nothing_and_is_told_later(log: FailingLog) -> None:
    async def main() -> None:
        here = Replica(log, "gone", "alive")
        log.away = True
        here.leases.heard("alive")
        with pytest.raises(Unavailable):
            await here.leases.sweep()
        assert log.jobs_seen(["alive"]) == {}
        log.away = False
        await here.leases.sweep()
        assert log.jobs_seen(["gone", "alive"]).keys() == {"alive"}
        assert here.closed == []

    asyncio.run(main())
