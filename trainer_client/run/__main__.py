"""`python -m trainer_client.run`: flags in, a finished job and its table out, mistakes as sentences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from trainer_client.run.config import RunConfig, parse
from trainer_client.run.signals import StopOnSignal
from weighting_contract.errors import WeighbridgeError

if TYPE_CHECKING:
    from trainer_client.run.report import RunSummary

_MISTAKE, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a job.

    Returns:
        The exit code: 0 finished, 2 the user's mistake (one sentence on stderr), 130 or 143 stopped by a signal.
    """
    console = Console()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    try:
        config = parse(arguments)
        return _run(config, console)
    except (WeighbridgeError, OSError) as exc:
        print(f"trainer_client.run: {exc}", file=sys.stderr)
        return _MISTAKE
    except KeyboardInterrupt:
        print("trainer_client.run: interrupted", file=sys.stderr)
        return _INTERRUPTED


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
    from trainer_client.run.report import table

    console.print()
    console.print(table(runs, config.method))
    out = Path(config.out)
    files = [(out / "summary.json", "all of these numbers")]
    for method in runs:
        files.append((out / method / "metrics.jsonl", f"the {method} run, one line a step"))
    files.append((out, "TensorBoard events: tensorboard --logdir " + str(out)))
    files.append((out / "weights.png", "how the weights of the sources evolve"))
    files.append((out / "weighter-export", "the weighter, to be used elsewhere"))
    console.print()
    for path, what in files:
        if path.exists():
            console.print(f"{path}  [dim]{what}[/dim]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
