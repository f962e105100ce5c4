"""`python -m trainer_client.run`: flags in, a finished job and its table out, mistakes as sentences."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trainer_client.run.config import RunConfig, parse
from trainer_client.run.shell import in_shell, is_first_rank
from trainer_client.run.signals import StopOnSignal
from weighting_contract.errors import FailedPrecondition, InvalidArgument, WeighbridgeError

if TYPE_CHECKING:
    from trainer_client.ranks import Ranks
    from trainer_client.run.report import RunSummary

_MISTAKE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a job.

    Returns:
        The exit code: 0 finished, 2 the user's mistake (one sentence on stderr), 130 or 143 stopped by a signal.
    """
    launch = _Launch()
    code = in_shell("trainer_client.run", lambda console: _start(arguments, console, launch))
    if not launch.leave():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class _Launch:
    """This process among those of torchrun. Torch takes seconds to import, so it is only when they are many."""

    def __init__(self) -> None:
        self.many = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self._ranks: Ranks | None = None

    def join(self) -> Ranks:
        from trainer_client.run.parallel import join

        self._ranks = join()
        return self._ranks

    def abandon(self) -> None:
        """The others may be anywhere: don't wait for them."""
        self._ranks = None

    def leave(self) -> bool:
        """Whether this process can end as any other."""
        if self._ranks is None:
            return True
        from trainer_client.run.parallel import leave

        return leave(self._ranks)


def _start(arguments: Sequence[str] | None, console: Console, launch: _Launch) -> int:
    if not launch.many:
        return _run(parse(arguments), console)
    config = error = None
    with _first_rank_speaks():
        try:
            config = parse(arguments)
        except (WeighbridgeError, OSError) as exc:
            error = exc if isinstance(exc, WeighbridgeError) else InvalidArgument(str(exc))
        except SystemExit as exc:  # argparse has said why
            if not exc.code:
                return 0
            error = FailedPrecondition("the flags can't be read")
            error.__cause__ = exc
    if config is not None and config.dry_run:
        return _plan(config, console)
    try:
        return _run_together(config, error, console, launch)
    except KeyboardInterrupt:
        launch.abandon()
        raise


def _run_together(config: RunConfig | None, error: WeighbridgeError | None, console: Console, launch: _Launch) -> int:
    from trainer_client.run.parallel import check_same_settings

    ranks = launch.join()
    try:
        ranks.agree(error)
    except FailedPrecondition as exc:
        if isinstance(exc.__cause__, SystemExit):
            return _MISTAKE
        raise
    assert config is not None
    check_same_settings(config, ranks)
    return _run(config, console, ranks)


@contextmanager
def _first_rank_speaks() -> Iterator[None]:
    """What argparse prints is printed once."""
    if is_first_rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _run(config: RunConfig, console: Console, ranks: Ranks | None = None) -> int:
    # Torch and transformers take seconds to import: --help and mistakes in the flags need not wait for them.
    with console.status("loading torch"):
        from trainer_client.run.loop import Interrupted
        from trainer_client.run.runner import run_job

    if config.dry_run:
        return _plan(config, console)
    stop = StopOnSignal()
    try:
        runs = run_job(config, console, stop, ranks)
    except Interrupted as exc:
        console.print(
            f"{exc}. To go on: python -m trainer_client.run --resume --out {config.out}",
            highlight=False,
            soft_wrap=True,
        )
        return stop.exit_code
    if is_first_rank():
        _show(config, runs, console)
    return 0


def _plan(config: RunConfig, console: Console) -> int:
    if not is_first_rank():  # one plan is enough
        return 0
    from trainer_client.run.dry_run import show_plan

    show_plan(config, console)
    return 0


def _show(config: RunConfig, runs: dict[str, RunSummary], console: Console) -> None:
    from trainer_client.run.table import table

    console.print()
    console.print(table(runs, config.main.label))
    out = Path(config.out)
    files = [(out / "summary.json", "all of these numbers")]
    for label in runs:
        files.append((out / label / "metrics.jsonl", f"the {label} run, one line a step"))
        files.append((out / label / "eval.json", f"the {label} run on the evaluation tasks"))
    files.append((out, "TensorBoard events: tensorboard --logdir " + str(out)))
    files.append((out / config.main.label / "model", "the trained model, for AutoModelForCausalLM and AutoTokenizer"))
    files.append((out / "weights.png", "how much the sources count, step by step"))
    files.append((out / "weighter-export", "the weighter, to be used elsewhere"))
    files.append((out / "reference", "the reference that it read the samples by"))
    console.print()
    for path, what in files:
        if path.exists():
            console.print(f"{path}  [dim]{what}[/dim]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
