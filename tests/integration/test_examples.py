"""The examples run as a user runs them, and show what they claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_loop_teaches_a_weighter_to_leave_the_noise_out():
    script = EXAMPLES / "own_loop.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    mean_weight = float(re.search(r"mean weight of the noise .*: ([0-9.]+) \(", done.stdout)[1])
    assert mean_weight < 0.5


def test_own_loop_marks_five_lines():
    text = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")
    assert re.findall(r"  # \((\d)\)", text) == ["1", "2", "3", "4", "5"]


def test_select_loader_keeps_what_serves_the_target():
    script = EXAMPLES / "select_loader.py"
    command = [sys.executable, str(script), "--steps", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "24 steps selected, 0 not, 24 updates taught" in done.stdout
    shares = re.findall(r"(\w+): ([0-9.]+) of the samples kept, ([0-9.]+) of the candidates", done.stdout)
    kept = {source: float(share) for source, share, _ in shares}
    assert kept.keys() == {"topics", "code", "tables"}
    assert kept["topics"] > 0.3, "of the candidates 0.2 are"
