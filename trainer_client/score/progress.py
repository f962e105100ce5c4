"""What a user sees while a corpus is counted, scored and selected from: a bar in a terminal, elsewhere nothing.

Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


@contextmanager
def phase(console: Console, label: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over `total` documents (None: not known yet); yields the function that is told how many are done."""
    if not console.is_terminal:
        yield lambda documents: None
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}", style="cyan"), BarColumn(bar_width=None)]
    columns += [_Count(), _Rate()]
    if total is not None:
        columns += [TextColumn("left", style="dim"), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda documents: bar.update(task, completed=documents)


class _Count(ProgressColumn):
    """Documents done, of how many."""

    def render(self, task: Task) -> Text:
        of = "" if task.total is None else f" of {int(task.total):,}"
        return Text(f"{int(task.completed):,}{of} documents")


class _Rate(ProgressColumn):
    """Documents a second, lately."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="dim")
