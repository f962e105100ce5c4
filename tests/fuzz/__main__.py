"""`python -m tests.fuzz [--inputs 20000] [--seed S]`: fuzzes a service; exit status 1 where it found something.

Prints the seed, progress, a table of codes, and each kind of failure with the first input that showed it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz.campaign import Campaign, warmed_up
from tests.fuzz.target import Target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="fuzz a weighting service")
    parser.add_argument("--inputs", type=int, default=20_000, help="over all surfaces")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; left out: a new one")
    given = parser.parse_args(arguments)
    seed = random.randrange(2**32) if given.seed is None else given.seed
    console = Console()
    console.print(f"fuzzing with {given.inputs} inputs, seed {seed}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        campaign = warmed_up(target, seed)
        _run(campaign, given.inputs, console)
        now_mb = campaign.check_memory()
        status = target.close()
    console.print(_table(campaign))
    console.print(
        f"{campaign.sent} inputs in {time.monotonic() - began:.0f} s, seed {seed}; "
        f"memory {campaign.resident_mb:.1f} MiB before, {now_mb:.1f} MiB after; exit status {status}"
    )
    if campaign.failures or status:
        console.print(campaign.report(), markup=False, highlight=False, soft_wrap=True)
        console.print(f"{len(campaign.failures)} kinds of failures; again: make fuzz ARGS='--seed {seed}'")
        return 1
    console.print("no crash, no hang, no internal error; the same scores as before")
    return 0


def _run(campaign: Campaign, inputs: int, console: Console) -> None:
    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        share = inputs // len(campaign.surfaces)
        for name in campaign.surfaces:
            task = progress.add_task(name, total=share)
            campaign.run(name, share, partial(progress.advance, task))


def _table(campaign: Campaign) -> Table:
    names = list(campaign.surfaces)
    table = Table("code", *names)
    for code in sorted({code for _, code in campaign.codes}):
        table.add_row(code, *(str(campaign.codes[name, code] or "") for name in names))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
