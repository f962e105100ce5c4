"""Cotangents on two ranks against those of one process: one launch, whose outcomes the tests read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.hypergradient_ranks import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank and by check: 'passed' or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, "-m", "tests.distributed.hypergradient_ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    files = [folder / f"rank-{rank}.json" for rank in range(2)]
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(outcomes: list[dict[str, str]], check: str) -> None:
    assert [rank.get(check) for rank in outcomes] == ["passed", "passed"], outcomes[0].get(check)
