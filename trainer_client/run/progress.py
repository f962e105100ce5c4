"""What a user sees while a job runs: one bar over all of its runs in a terminal, plain lines everywhere else.

Knows numbers and names only; nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_UNKNOWN = "-"


class JobProgress:
    """Progress over `total_steps` of all runs of a job; a context manager."""

    def __init__(self, console: Console, total_steps: int, batch_size: int) -> None:
        self._console, self._total, self._batch_size = console, total_steps, batch_size
        self._label, self._before, self._val_loss = "", 0, _UNKNOWN
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=total_steps, **_fields()) if self._bar else None

    def start(self, label: str, steps_before: int, step: int) -> None:
        """A run begins at `step`; `steps_before` belong to runs that are finished."""
        self._label, self._before, self._val_loss = label, steps_before, _UNKNOWN
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=label, completed=steps_before + step)
        elif step:
            self._console.print(f"{label}: goes on after step {step}", highlight=False)

    def update(self, line: dict[str, Any]) -> None:
        """Shows the metrics of one step."""
        val_loss = line.get("val_loss")
        if val_loss is not None:
            self._val_loss = f"{val_loss:.3f}"
        ess = f"{line['effective_sample_size']:.1f}/{self._batch_size}"
        shown = _fields(f"{line['loss']:.3f}", self._val_loss, ess)
        done = self._before + line["step"]
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, **shown)
        elif val_loss is not None:
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            where = f"{self._label}: step {line['step']} ({done} of {self._total})"
            self._console.print(f"{where}  {numbers}", highlight=False)

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> JobProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()


@contextmanager
def preparing(console: Console, said: str = "", every: int = 100) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for what happens outside of training runs; yields the function that moves it (done, total, what).

    Where there is no terminal to draw on: a line from time to time about what begins with `said`; "": nothing.
    """
    if not console.is_terminal:

        def line(done: int, total: int, what: str) -> None:
            if said and what.startswith(said) and (done % every == 0 or done == total):
                console.print(f"{what}: step {done} of {total}", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}", style="cyan"), BarColumn(bar_width=None), MofNCompleteColumn())
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task("preparing the data", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _fields(loss: str = _UNKNOWN, val: str = _UNKNOWN, ess: str = _UNKNOWN) -> dict[str, Any]:
    return {"loss": loss, "val": val, "ess": ess}


class _Field(ProgressColumn):
    """A named number of the current step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def render(self, task: Task) -> Text:
        return Text.assemble((f"{self._name} ", "dim"), (str(task.fields[self._name]), "bold"))


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="cyan"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Field("loss"),
        _Field("val"),
        _Field("ess"),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
    )
