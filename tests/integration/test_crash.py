"""The service killed at every failpoint and at random moments: nothing lost, nothing twice, the state to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.soak import Outcome, Remains, differences, random_deaths, soak, undisturbed
from benchmarks.soak_client import Death, Trainer
from tests.redis_server import RedisServer
from weighting_service import failpoints

SEED = 20
UPDATES = 130  # the first trim of more than one portion is behind the snapshot at 120
DUPLICATES = {"before_append": [0], "after_append": [1]}  # of the others, an answer may be under way
HITS = {"before_append": 60, "after_append": 70, "during_apply": 20, "during_snapshot_write": 2}  # others: the first


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Remains]:
    return undisturbed(tmp_path_factory.mktemp("twin"), SEED, UPDATES)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        yield server


def check(outcome: Outcome) -> None:
    assert outcome.lost == []
    assert outcome.twice == 0
    assert outcome.differences == []


@pytest.mark.parametrize("name", failpoints.NAMES)
def test_a_kill_at_a_failpoint_changes_nothing(tmp_path: Path, name: str, twin: tuple[Trainer, Remains]) -> None:
    outcome = soak(tmp_path, [Death(name, HITS.get(name, 1))], seed=SEED, updates=UPDATES, twin=twin)
    assert outcome.trainer.kills == Counter({name: 1})
    assert outcome.trainer.duplicates in DUPLICATES.get(name, [0, 1])
    check(outcome)


@pytest.mark.parametrize("name", ["after_append", "after_snapshot"])
def test_nor_does_it_with_redis(tmp_path: Path, name: str, twin: tuple[Trainer, Remains], redis: RedisServer) -> None:
    death = Death(name, HITS.get(name, 1))
    outcome = soak(tmp_path, [death], seed=SEED, updates=UPDATES, twin=twin, redis=redis)
    assert outcome.trainer.kills == Counter({name: 1})
    assert outcome.trainer.duplicates in DUPLICATES.get(name, [0, 1])
    check(outcome)


def test_nor_does_the_death_of_redis(tmp_path: Path, twin: tuple[Trainer, Remains], redis: RedisServer) -> None:
    deaths = [Death("after_append", 60, redis_after_s=0.1), Death("before_append", 40, redis_after_s=0.1)]
    outcome = soak(tmp_path, deaths, seed=SEED, updates=UPDATES, twin=twin, redis=redis)
    assert outcome.trainer.kills["redis-server"] == 2
    check(outcome)


def test_ten_kills_at_random(tmp_path: Path) -> None:
    outcome = soak(tmp_path, islice(random_deaths(SEED), 10), seed=SEED)
    assert outcome.trainer.kills.total() == 10
    assert len(outcome.trainer.positions) > 0
    check(outcome)


def test_the_comparison_finds_what_differs(tmp_path: Path, twin: tuple[Trainer, Remains]) -> None:
    other = undisturbed(tmp_path, SEED + 1, 50)
    found = differences(*other, *twin)
    assert "weights" in found
    assert "exported parameters" in found
    assert any(name.startswith("tensor ") for name in found)
    assert any("cotangent" in name or "jobs" in name for name in found)
    assert "log head" in found
    assert differences(*twin, *twin) == []
