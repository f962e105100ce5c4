"""Runs what is not finished, some at a time, with a progress bar; one that fails stops nothing and is said at the end.

A matrix that was stopped goes on where it was: a run is finished once its summary.json is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.learning.plan import Run
from benchmarks.machine import commit

_COMMIT = "commit"
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def finished(out: Path, run: Run) -> bool:
    return (out / run.folder / "summary.json").is_file()


def made_at(out: Path, run: Run) -> str:
    """The commit that a finished run was begun at; "" where it is not known."""
    path = out / run.folder / _COMMIT
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def execute(
    runs: Sequence[Run],
    command: Callable[[Run], list[str]],
    out: Path,
    processes: int,
    console: Console,
    title: str,
    attempts: int = 1,
) -> list[tuple[Run, str]]:
    """Runs those that are not finished; the ones that failed at every attempt, with the last line that each said."""
    todo = [run for run in runs if not finished(out, run)]
    failed: list[tuple[Run, str]] = []
    with Progress(*_COLUMNS, console=console) as bar:
        task = bar.add_task(title, total=len(runs), completed=len(runs) - len(todo))

        def work(run: Run) -> None:
            for _ in range(attempts):
                if not (error := _run(command(run), out / run.folder)):
                    break
            else:
                failed.append((run, error))
            bar.advance(task)
            if not console.is_terminal:
                console.print(
                    f"{title}: {run.folder} {'FAILED: ' + error if error else 'done'}", highlight=False, soft_wrap=True
                )

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, todo))
    return failed


def _run(flags: list[str], folder: Path) -> str:
    """The last line of a run that failed, "" for one that did not."""
    command = [sys.executable, "-m", "trainer_client.run", *flags]
    environment, begun_at = {**os.environ, "OMP_NUM_THREADS": "1"}, commit()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if not (folder / "summary.json").is_file():
        return "it ended well, but left no summary.json"
    (folder / _COMMIT).write_text(begun_at, encoding="utf-8")
    return ""
