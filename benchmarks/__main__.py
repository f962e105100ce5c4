"""`python -m benchmarks`: what has a goal of speed, one after the other, each in a process of its own.

Beside them stand what takes longer: `learning` and `learning.sharing` (training), `pretaught` (makes the packaged
weighter) and `soak` (kills); and `gpu`, which wants a GPU.
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    "score",
    "learning_cost",
    "overhead",
    "reference",
    "ahead",
    "durability",
    "replay",
    "fairness",
    "linear_loss",
)


def main() -> int:
    worst = 0
    for name in BENCHMARKS:
        print(f"== python -m benchmarks.{name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
