"""Weighters of one service: how many and how large they may be, whom they are shared with, and rollbacks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from weighting_contract.tensors import to_message
from weighting_service.embedded import EmbeddedService

SPEC = pb.WeighterSpec(features=pb.FeatureSpec(names=["a", "b"]), head=pb.HeadSpec(width=8))


class Client:
    """RPCs of a service in this process: `client.GetWeighter(name="w")`."""

    def __init__(self, service: EmbeddedService) -> None:
        self._service = service

    def __getattr__(self, method: str) -> Any:
        return lambda **fields: self._service.call(method, getattr(pb, f"{method}Request")(**fields), 60)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """`client(**settings)` of a service of these settings."""
    services: list[EmbeddedService] = []

    def start(**settings: Any) -> Client:
        services.append(EmbeddedService(tmp_path / "state", **settings))
        return Client(services[-1])

    yield start
    for service in services:
        service.close()


def test_a_tenant_has_so_many_weighters(client: Callable[..., Client]) -> None:
    one = client(max_weighters_per_tenant=2)
    for name in ("v", "w"):
        one.CreateWeighter(name=name, spec=SPEC)
    with pytest.raises(ResourceExhausted, match=r"there are 2 weighters.*\(--max-weighters-per-tenant\); delete one"):
        one.CreateWeighter(name="x", spec=SPEC)
    one.CreateWeighter(name="w", spec=SPEC, exist_ok=True)
    one.DeleteWeighter(name="v")
    one.CreateWeighter(name="x", spec=SPEC)


@pytest.mark.parametrize("width", [64, 1 << 12])
def test_a_weighter_has_so_many_parameters(client: Callable[..., Client], width: int, tmp_path: Path) -> None:
    one = client(max_weighter_parameters=20_000)
    large = pb.WeighterSpec(features=pb.FeatureSpec(names=["a"]), head=pb.HeadSpec(width=width))
    with pytest.raises(InvalidArgument, match=r"[\d,]+ parameters, but .* have 20,000 \(--max-weighter-parameters\)"):
        one.CreateWeighter(name="w", spec=large)
    with pytest.raises(NotFound):
        one.GetWeighter(name="w")
    assert list(tmp_path.rglob("*.safetensors")) == []
    one.CreateWeighter(name="w", spec=SPEC)


def test_whom_a_weighter_is_shared_with_survives(client: Callable[..., Client]) -> None:
    one = client()
    one.CreateWeighter(name="w", spec=SPEC)
    assert list(one.ShareWeighter(name="w", tenants=["green", "blue"]).shared_with) == ["green", "blue"]
    with pytest.raises(InvalidArgument, match="tenants"):
        one.ShareWeighter(name="w", tenants=["not a name"])
    one._service.close()
    assert list(client().GetWeighter(name="w").shared_with) == ["green", "blue"]


def test_a_rollback_names_the_snapshots_that_there_are(client: Callable[..., Client]) -> None:
    one = client()
    one.CreateWeighter(name="w", spec=SPEC)
    with pytest.raises(InvalidArgument, match="to_position is -1, expected 0 or more"):
        one.RollbackWeighter(name="w", to_position=-1)
    with pytest.raises(FailedPrecondition, match=r"to_position is 1, but .* it has them at 0$"):
        one.RollbackWeighter(name="w", to_position=1)
    answer = one.RollbackWeighter(name="w", to_position=0, expected_position=0)
    assert answer.position == 1
    with pytest.raises(FailedPrecondition, match="ends at position 1, not at the expected 0"):
        one.RollbackWeighter(name="w", to_position=0, expected_position=0)
    with pytest.raises(NotFound):
        one.RollbackWeighter(name="x", to_position=0)


# ---- Callers that go away, and logs that fail -----------------------------------------------------------------------


def abandoned(client: Client, log_method: str, method: str, **fields: Any) -> None:
    """Makes a call whose caller is gone while the log is at it; returns when all is done."""
    service, begun, go_on = client._service, threading.Event(), threading.Event()
    core = service._service._core
    real = getattr(core.log, log_method)

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return real(*arguments)

    setattr(core.log, log_method, slow)
    answer = service._answer(method, getattr(pb, f"{method}Request")(**fields))
    call = asyncio.run_coroutine_threadsafe(answer, service._loop)
    assert begun.wait(60)
    call.cancel()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), service._loop).result(60)  # the call has heard of it
    setattr(core.log, log_method, real)
    go_on.set()
    asyncio.run_coroutine_threadsafe(core.changes_end(), service._loop).result(60)


def test_what_was_changed_shows_although_its_caller_is_gone(client: Callable[..., Client]) -> None:
    one = client()
    abandoned(one, "create_weighter", "CreateWeighter", name="w", spec=SPEC)
    assert one.CreateWeighter(name="w", spec=SPEC, exist_ok=True).name == "w"
    one.ShareWeighter(name="w", tenants=["green"])
    abandoned(one, "put_weighter", "ShareWeighter", name="w")
    abandoned(one, "append_rollback", "RollbackWeighter", name="w")
    assert one.RollbackWeighter(name="w", expected_position=1).position == 2
    assert list(one.GetWeighter(name="w").shared_with) == []
    abandoned(one, "put_job", "OpenJob", weighter="w", job_id="job")
    abandoned(one, "put_job", "QuarantineJob", job_id="job", reason="it teaches nonsense")
    features = pb.Inputs(features=to_message(np.eye(2, dtype=np.float32)))
    cotangent = to_message(np.array([0.5, -0.5], np.float32))
    with pytest.raises(FailedPrecondition, match="it teaches nonsense"):
        one.MetaUpdate(job_id="job", inputs=features, cotangent=cotangent)
    assert one.GetWeighter(name="w").jobs_open == 1
    abandoned(one, "put_job", "CloseJob", job_id="job")
    with pytest.raises(FailedPrecondition, match="closed"):
        one.Heartbeat(job_id="job")
    assert one.GetWeighter(name="w").jobs_open == 0
    abandoned(one, "delete_weighter", "DeleteWeighter", name="w")
    one.CreateWeighter(name="w", spec=SPEC)


def test_a_weighter_that_could_not_be_deleted_is_there(
    client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = client()
    one.CreateWeighter(name="w", spec=SPEC)
    one.OpenJob(weighter="w", job_id="job")

    def fails(uid: str) -> None:
        raise Unavailable("the log is away")

    with monkeypatch.context() as patched:
        patched.setattr(one._service._service._core.log, "delete_weighter", fails)
        with pytest.raises(Unavailable, match="the log is away"):
            one.DeleteWeighter(name="w")
    features = pb.Inputs(features=to_message(np.eye(2, dtype=np.float32)))
    cotangent = to_message(np.array([0.5, -0.5], np.float32))
    assert one.MetaUpdate(job_id="job", inputs=features, cotangent=cotangent).position == 1
    assert one.Score(job_id="job", inputs=features, min_position=1).position == 1, "it learns on, too"
    one.DeleteWeighter(name="w")
    with pytest.raises(NotFound):
        one.GetWeighter(name="w")
