"""Weighters of one service: how many and how large they may be, whom they are shared with, and rollbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
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
