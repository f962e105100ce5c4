"""Ranks and the job that they share, on three processes: one launch, whose outcomes the tests read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.group_ranks import CHECKS
from tests.distributed.launch import torchrun


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank and by check: 'passed' or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(3, "tests.distributed.group_ranks", str(folder), cache=folder)
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("check", CHECKS)
def test_three_ranks(outcomes: list[dict[str, str]], check: str) -> None:
    found = [rank.get(check) for rank in outcomes]
    assert found == ["passed"] * 3, "\n".join(map(str, found))
