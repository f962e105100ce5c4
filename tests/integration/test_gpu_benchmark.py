"""The GPU benchmark in its small form, on the CPU: everything that it measures is there and holds together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import step_seconds
from tests.integration.small_job import read

PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]


def test_the_small_form_measures_all_runs_and_a_reference(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "--small", "--out", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "results.json")
    runs, reference = found["runs"], found["reference"]
    frozen = {"frozen-select", "frozen-weight"}
    assert runs.keys() == {"uniform", "weight-scratch", "select", "select-scratch", *frozen}
    for name, run in runs.items():
        assert run["overhead"] == pytest.approx(run["step_ms"] / runs["uniform"]["step_ms"] - 1)
        assert (run["steps"], run["fallback_steps"]) == (12 if name in frozen else 24, 0)
    assert len({run["loss_in_uniforms_time"] for name, run in runs.items() if name not in frozen}) == 4
    assert read(tmp_path / "runs" / "learn" / "summary.json")["reference"]["parameters"] == 0  # runs count theirs
    assert reference["parameters"] > 0
    for kind in ("scoring", "plain"):
        per_token = reference[kind] / reference[f"{kind}_tokens"]
        assert per_token == pytest.approx(2 * reference["parameters"] + 2 * 64 * 16)  # attention: one layer of width 16
    assert found["hardware"].splitlines()[0] in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no GPU here: --small shows on the CPU that the program works" in done.stderr
    assert "Traceback" not in done.stderr


def test_steps_are_timed_without_evaluations_and_first_steps(tmp_path: Path) -> None:
    taken = [9.0, 9.0, 1.0, 7.0, 2.0, 3.0, 4.0, 7.0]  # of steps 1 to 8; every fourth one is followed by an evaluation
    lines = [json.dumps({"seconds": sum(taken[: step + 1])}) for step in range(len(taken))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert step_seconds(tmp_path / "metrics.jsonl", first=2, eval_every=4) == pytest.approx((1 + 2 + 3 + 4) / 4)
