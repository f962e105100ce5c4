"""The GPU benchmark in its small form, on the CPU: everything that it measures is there and holds together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.small_job import read

PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]


def test_the_small_form_measures_three_runs_and_a_reference(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "--small", "--out", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "results.json")
    runs, reference = found["runs"], found["reference"]
    assert runs.keys() == {"uniform", "weight-scratch", "select-scratch"}
    assert runs["uniform"]["teaching"] == runs["uniform"]["scoring"] == 0
    for name in ("weight-scratch", "select-scratch"):
        assert 0 < runs[name]["teaching"] < 1
        assert 0 < runs[name]["scoring"] < 1
    assert len({run["loss_in_uniforms_time"] for run in runs.values()}) == 3
    assert reference["parameters"] == read(tmp_path / "runs" / "summary.json")["reference"]["parameters"]
    for kind in ("scoring", "plain"):
        per_token = reference[kind] / reference[f"{kind}_tokens"]
        assert per_token == pytest.approx(2 * reference["parameters"] + 2 * 64 * 32)  # attention: one layer of width 32
    assert found["hardware"].splitlines()[0] in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no GPU here: --small shows on the CPU that the program works" in done.stderr
    assert "Traceback" not in done.stderr
