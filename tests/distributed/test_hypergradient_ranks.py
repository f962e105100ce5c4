"""Cotangents on two ranks against those of one process: one launch, whose outcomes the tests read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.hypergradient_ranks import CHECKS
from tests.distributed.launch import torchrun


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank and by check: 'passed' or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, "tests.distributed.hypergradient_ranks", str(folder), cache=folder)
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(outcomes: list[dict[str, str]], check: str) -> None:
    assert [rank.get(check) for rank in outcomes] == ["passed", "passed"], outcomes[0].get(check)
