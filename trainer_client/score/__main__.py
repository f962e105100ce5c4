"""`python -m trainer_client.score`: flags in, a table of weights out, mistakes as sentences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainer_client.run.shell import in_shell
from trainer_client.score.config import ScoreConfig, parse

if TYPE_CHECKING:
    from trainer_client.score.runner import Outcome

_ROWS_SHOWN = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores a corpus.

    Returns:
        The exit code: 0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted; what is scored is kept.
    """

    def command(console: Console) -> int:
        config = parse(arguments)
        from trainer_client.score.runner import score_corpus  # pyarrow takes a while: --help need not wait for it

        try:
            with _own_warnings():
                outcome = score_corpus(config, console)
        except KeyboardInterrupt:
            _say(console, "what is scored is kept; the same command with --resume goes on")
            raise
        _show(config, outcome, console)
        return 0

    return in_shell("trainer_client.score", command)


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Jobs warn of uniform weights, which are never used here: what matters is said by the scoring itself."""
    levels = {"trainer_client": logging.ERROR, "trainer_client.score": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _show(config: ScoreConfig, outcome: Outcome, console: Console) -> None:
    if outcome.scored:
        table = Table("source", "documents", "mean weight", title_justify="left")
        means = {name: outcome.weights[name] / count for name, count in outcome.counts.items()}
        for name in sorted(means, key=lambda name: -means[name])[:_ROWS_SHOWN]:
            table.add_row(name, f"{outcome.counts[name]:,}", f"{means[name]:.3f}")
        console.print(table)
        if len(means) > _ROWS_SHOWN:
            console.print(f"... and {len(means) - _ROWS_SHOWN} more", highlight=False)
        short = f", {outcome.unscored:,} of them too short for a weight" if outcome.unscored else ""
        _say(console, f"{config.output}: {outcome.documents:,} documents{short}")
        if outcome.positions and outcome.positions[0] != outcome.positions[1]:
            first, last = outcome.positions
            _say(
                console,
                f"the weighter was taught meanwhile: weights are of its positions {first:,} to {last:,} (column "
                "position)",
            )
    else:
        _say(console, f"{config.output}: was finished before")
    if outcome.selected is not None:
        _say(console, f"{config.selection_path}: {outcome.selected:,} documents, by --select {config.select}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
