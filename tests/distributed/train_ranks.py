"""What `test_run_ranks.py` has every rank do: the runs of a plan, one after the other, in one launch.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed.train_ranks PLAN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from trainer_client.run.config import parse
from trainer_client.run.parallel import join, leave
from trainer_client.run.runner import run_job
from trainer_client.run.signals import StopOnSignal


def main() -> None:
    ranks = join()
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        run_job(parse(flags), Console(quiet=True), StopOnSignal(), ranks)
    leave(ranks)


if __name__ == "__main__":
    main()
