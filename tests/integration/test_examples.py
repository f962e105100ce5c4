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
