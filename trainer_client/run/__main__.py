"""`python -m trainer_client.run`: flags in, a finished job and its table out, mistakes as sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trainer_client.run.config import RunConfig, parse
from trainer_client.run.shell import in_shell
from trainer_client.run.signals import StopOnSignal

if TYPE_CHECKING:
    from trainer_client.run.report import RunSummary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a job.

    Returns:
        The exit code: 0 finished, 2 the user's mistake (one sentence on stderr), 130 or 143 stopped by a signal.
    """
    return in_shell("trainer_client.run", lambda console: _run(parse(arguments), console))


def _run(config: RunConfig, console: Console) -> int:
    # Torch and transformers take seconds to import: --help and mistakes in the flags need not wait for them.
    with console.status("loading torch"):
        from trainer_client.run.loop import Interrupted
        from trainer_client.run.runner import run_job

    stop = StopOnSignal()
    try:
        runs = run_job(config, console, stop)
    except Interrupted as exc:
        console.print(
            f"{exc}. To go on: python -m trainer_client.run --resume --out {config.out}",
            highlight=False,
            soft_wrap=True,
        )
        return stop.exit_code
    _show(config, runs, console)
    return 0


def _show(config: RunConfig, runs: dict[str, RunSummary], console: Console) -> None:
    from trainer_client.run.table import table

    console.print()
    console.print(table(runs, config.main.label))
    out = Path(config.out)
    files = [(out / "summary.json", "all of these numbers")]
    for label in runs:
        files.append((out / label / "metrics.jsonl", f"the {label} run, one line a step"))
    files.append((out, "TensorBoard events: tensorboard --logdir " + str(out)))
    files.append((out / "weights.png", "how much the sources count, step by step"))
    files.append((out / "weighter-export", "the weighter, to be used elsewhere"))
    files.append((out / "reference", "the reference that it read the samples by"))
    console.print()
    for path, what in files:
        if path.exists():
            console.print(f"{path}  [dim]{what}[/dim]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
