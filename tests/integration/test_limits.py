"""What one job or tenant may take, what is refused before it reaches the log, and who is kept from teaching."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from tests.conftest import ServiceThread
from weighting_contract.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, WeighbridgeError
from weighting_contract.tensors import to_message
from weighting_service.auth import Caller
from weighting_service.core import ServiceLimits
from weighting_service.domain import EVERYONE, MetaUpdate, RawInputs
from weighting_service.grpc_server import STREAMS_PER_CONNECTION
from weighting_service.references import ReferenceStore
from weighting_service.service import WeightingService
from weighting_service.snapshots import SnapshotStore
from weighting_service.tenancy import TenantService
from weighting_service.tokens import ROLES
from weighting_service.update_log import Appended, SqliteUpdateLog
from weighting_service.views import JobRequest, MetaUpdateRequest

FEATURES = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
COTANGENT = FEATURES[:, 0]
SPEC = {"features": {"names": ["a", "b"]}, "head": {"width": 8, "attention_heads": 2}}
BATCH = RawInputs(FEATURES)


class Log(SqliteUpdateLog):
    """Appends when it is let, and is as large as it is told."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.let = threading.Event(), threading.Event()
        self.let.set()
        self.grown = 0

    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        self.begun.set()
        assert self.let.wait(60)
        return super().append(weighter_uid, update)

    def size_bytes(self) -> int:
        return super().size_bytes() + self.grown


@asynccontextmanager
async def serving(folder: Path, log: Log | None = None, **limits: Any) -> AsyncIterator[WeightingService]:
    """A service with the weighter "w" and its open job "job"."""
    cpu = torch.device("cpu")
    service = WeightingService(
        log or Log(folder / "log.sqlite"),
        SnapshotStore(folder / "snapshots"),
        ReferenceStore(folder / "references", models_dir=None, device=cpu),
        device=cpu,
        limits=ServiceLimits(**limits),
    )
    await service.start()
    try:
        await service.create_weighter("w", SPEC, exist_ok=True)
        await service.open_job(JobRequest("w", "job"))
        yield service
    finally:
        await service.stop()


def update(step: int, cotangent: np.ndarray = COTANGENT, features: np.ndarray = FEATURES) -> MetaUpdateRequest:
    return MetaUpdateRequest(step, RawInputs(features), cotangent)


async def refusal(
    call: Callable[[], Awaitable[Any]], kind: type[WeighbridgeError], words: str, service: WeightingService, reason: str
) -> WeighbridgeError:
    """What `call` is refused with; sees that it is counted as the refusal of an update for `reason`."""
    before = refused(service, reason)
    with pytest.raises(kind, match=words) as error:
        await call()
    assert refused(service, reason) == before + 1
    return error.value


def refused(service: WeightingService, reason: str) -> float:
    counts = re.findall(
        rf'updates_refused_total{{.*reason="{reason}",weighter="w"}} (.*)', service.metrics.render().decode()
    )
    return sum(map(float, counts))


async def updates_applied(service: WeightingService, position: int) -> None:
    await service.score("job", BATCH, min_position=position)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


# ---- Limits ---------------------------------------------------------------------------------------------------------


def test_a_job_has_so_many_calls_under_way(tmp_path: Path) -> None:
    async def main() -> None:
        log = Log(tmp_path / "log.sqlite")
        async with serving(tmp_path, log, calls_per_job=1) as service:
            await service.open_job(JobRequest("w", "other"))
            log.let.clear()
            held = asyncio.create_task(service.meta_update("job", update(0)))
            await asyncio.to_thread(log.begun.wait)
            for call in (lambda: service.score("job", BATCH), lambda: service.meta_update("job", update(1))):
                with pytest.raises(ResourceExhausted, match=r"job 'job' has 1 calls .*--max-calls-per-job") as error:
                    await call()
                assert error.value.retry_after_s > 0
            assert (await service.score("other", BATCH)).position == 0
            assert (await service.score_once("w", BATCH)).position == 0
            log.let.set()
            assert (await held).position == 1
            assert (await service.meta_update("job", update(1))).position == 2

    run(main())


def test_scoring_without_a_job_is_shared_out_among_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(tmp_path, calls_per_job=1) as service:
            await service.share_weighter("w", (EVERYONE,))
            one, other = (TenantService(service, Caller(tenant, frozenset(ROLES), tenant)) for tenant in ("t", "u"))
            kept: Future[Any] = Future()
            monkeypatch.setattr(service._core.engine, "score", lambda *_: kept)
            for score in (
                lambda tenant: tenant.score_once("/w", BATCH),
                lambda tenant: tenant.score_texts(("a text",), ("a target",)),
            ):
                held = [asyncio.ensure_future(score(tenant)) for tenant in (one, other)]
                while len(service._core.under_way._calls) < 2:
                    await asyncio.sleep(0.01)
                with pytest.raises(ResourceExhausted, match="without a job has 1 calls under way") as refused:
                    await score(one)
                assert "'t" not in refused.value.message
                for call in held:
                    call.cancel()
                await asyncio.wait(held)
                kept = Future()

    run(main())


def test_calls_beyond_those_of_a_connection_wait_for_their_turn(tmp_path: Path) -> None:
    running = ServiceThread(tmp_path / "state", max_calls_per_job=200)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
            stub = WeightingServiceStub(channel)  # type: ignore[no-untyped-call]
            spec = pb.WeighterSpec(features=pb.FeatureSpec(names=["a", "b"]))
            stub.CreateWeighter(pb.CreateWeighterRequest(name="w", spec=spec))
            stub.OpenJob(pb.OpenJobRequest(weighter="w", job_id="job"))
            request = pb.ScoreRequest(job_id="job", inputs=pb.Inputs(features=to_message(FEATURES)))
            calls = [stub.Score.future(request, timeout=60) for _ in range(4 * STREAMS_PER_CONNECTION)]
            assert Counter(call.code() for call in calls) == {grpc.StatusCode.OK: len(calls)}
    finally:
        running.stop()


def test_a_tenant_has_so_many_open_jobs(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, jobs_per_tenant=2) as service:
            for job in ("t/a", "t/b", "t/b", "second"):
                await service.open_job(JobRequest("w", job))
            with pytest.raises(ResourceExhausted, match=r"2 jobs are open.*--max-jobs-per-tenant"):
                await service.open_job(JobRequest("w", "t/c"))
            await service.close_job("t/a")
            assert (await service.open_job(JobRequest("w", "t/c"))).record.job_id == "t/c"
            with pytest.raises(ResourceExhausted):
                await service.open_job(JobRequest("w", "t/a"))

    run(main())


@pytest.mark.parametrize(
    ("limits", "setting"),
    [({"log_bytes": 1 << 30}, "--max-log-mb"), ({"free_disk_bytes": 1 << 62}, "--min-free-disk-mb")],
)
def test_full_storage_takes_no_updates_and_goes_on_scoring(
    tmp_path: Path, limits: dict[str, int], setting: str
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as roomy:
            assert (await roomy.meta_update("job", update(0))).position == 1
        log = Log(tmp_path / "log.sqlite")
        log.grown = 1 << 30
        async with serving(tmp_path, log, disk=tmp_path, **limits) as service:
            full = await refusal(
                lambda: service.meta_update("job", update(1)), ResourceExhausted, setting, service, "storage"
            )
            assert "scores go on" in full.message
            assert (await service.score("job", BATCH)).position == 1
            assert (await service.meta_update("job", update(0))).duplicate
            metrics = service.metrics.render().decode()
            size = float(re.findall(r"\nweighbridge_log_bytes (.*)", metrics)[0])
            assert size > 1 << 30
            assert "weighbridge_disk_free_bytes" in metrics

    run(main())


# ---- Guarded learning -----------------------------------------------------------------------------------------------


def test_absurd_and_non_finite_numbers_teach_nothing(tmp_path: Path) -> None:
    def spoilt(array: np.ndarray, value: float) -> np.ndarray:
        array = array.copy()
        array[(1,) * array.ndim] = value
        return array

    async def main() -> None:
        async with serving(tmp_path) as service:

            async def is_refused(request: MetaUpdateRequest, words: str, reason: str) -> None:
                await refusal(lambda: service.meta_update("job", request), InvalidArgument, words, service, reason)

            await is_refused(update(0, spoilt(COTANGENT, np.nan)), r"cotangent\[1\] is nan", "not_finite")
            await is_refused(update(0, features=spoilt(FEATURES, np.inf)), r"features\[1, 1\] is inf", "not_finite")
            await is_refused(update(0, spoilt(COTANGENT, 2e12)), "cotangent reaches 2e.12", "absurd")
            await is_refused(update(0, features=spoilt(FEATURES, -2e15)), r"features\[1, 1\] is -1999", "absurd")
            await is_refused(update(0, np.ones(8, np.float32)), "the same for all", "constant")
            for step in range(7):
                await service.meta_update("job", update(step))
            await updates_applied(service, 7)
            await service.meta_update("job", update(7, spoilt(COTANGENT, 1e5)))  # too few before it to judge by
            await updates_applied(service, 8)
            await is_refused(update(8, COTANGENT * 1e11), "had an RMS of", "absurd")
            assert (await service.meta_update("job", update(8, COTANGENT * 1e3))).position == 9
            assert (await service.meta_update("job", update(7, spoilt(COTANGENT, 1e5)))).duplicate
            view = await service.get_weighter("w")
            assert (view.position, view.refused) == (9, 6)

    run(main())


def test_a_quarantined_job_scores_and_teaches_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as service:
            assert (await service.meta_update("job", update(0))).position == 1
            view = await service.quarantine_job("job", "its loss exploded")
            assert (view.record.quarantined, view.record.open) == ("its loss exploded", True)
            await refusal(
                lambda: service.meta_update("job", update(1)),
                FailedPrecondition,
                "quarantined.*its loss exploded",
                service,
                "quarantined",
            )
            assert (await service.meta_update("job", update(0))).duplicate
            assert (await service.score("job", BATCH)).weights.mean() == pytest.approx(1)
            await service.close_job("job")
            assert (await service.open_job(JobRequest("w", "job"))).record.quarantined == "its loss exploded"
        async with serving(tmp_path) as service:
            with pytest.raises(FailedPrecondition, match="its loss exploded"):
                await service.meta_update("job", update(1))
            with pytest.raises(InvalidArgument, match="reason has 501 characters"):
                await service.quarantine_job("job", "x" * 501)
            assert (await service.quarantine_job("job", "")).record.quarantined == ""
            assert (await service.meta_update("job", update(1))).position == 2

    run(main())


class SharedLog(Log):
    shared = True


def test_a_quarantine_by_another_service_holds_here(tmp_path: Path) -> None:
    async def main() -> None:
        log = SharedLog(tmp_path / "log.sqlite")
        async with serving(tmp_path, log, sync_s=0.01) as service:
            assert (await service.meta_update("job", update(0))).position == 1
            job = log.job("job")
            assert job
            log.put_job(replace(job, quarantined="elsewhere"))

            async def teach_on() -> None:
                for step in itertools.count(1):
                    await service.meta_update("job", update(step))

            with pytest.raises(FailedPrecondition, match="elsewhere"):
                await teach_on()
            assert (await service.open_job(JobRequest("w", "job"))).record.quarantined == "elsewhere"

    run(main())
