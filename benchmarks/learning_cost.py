"""What scoring and teaching cost beside the training step, in the demo's own setting, from one run.

    python -m benchmarks.learning_cost [--steps 120]

Runs `python -m trainer_client.run` with the embedded weighter and reads its summary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe, goal

GOAL_SHARE = 0.20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainer_client.run", "--steps", str(steps), "--out", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    score, meta, wall = (summary[f"{name}_seconds"] for name in ("score", "meta", "wall"))
    training = wall - score - meta
    share = (score + meta) / training
    print(f"{steps} steps: {wall:.1f} s, of which scoring {score:.2f} s and teaching {meta:.2f} s")
    print(f"scoring and teaching over the rest of the training step: {share:.1%}", goal(share, GOAL_SHARE, ".0%"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
