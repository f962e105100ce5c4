"""One line a step: metrics.jsonl for programs, TensorBoard events for people.

Knows nothing of training. A step that is trained again after a resume does not get a second line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

Sink: TypeAlias = Callable[[int, dict[str, float]], None]  # takes a step, from 1, and its scalars


class Metrics:
    """Writes the metrics of one run, open from `start_step` on."""

    def __init__(self, path: Path, events: Path, start_step: int, sink: Sink | None = None) -> None:
        """Opens `path` (JSON lines) and a TensorBoard writer in the folder `events`.

        Args:
            start_step: steps already done in the checkpoint that the run goes on from; 0: a fresh run.
            sink: gets every step's scalars once, too.
        """
        from torch.utils.tensorboard import SummaryWriter  # who only reads metrics need not have torch

        written = _cut_to_whole_lines(path)
        self.last_step = int(written[-1]["step"]) if written else 0
        self.last_seconds = float(written[-1]["seconds"]) if written else 0.0
        self._sink = sink
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._events = SummaryWriter(str(events), purge_step=start_step + 1 if start_step else None)

    def write(self, line: dict[str, Any]) -> None:
        """Writes the metrics of `line["step"]`: numbers, None for what was not measured, or numbers by names.

        What is deeper goes to the file alone: events take as long as the rest of a step of a small model, if there are
        many.
        """
        step = int(line["step"])
        scalars = {tag: number for name, value in line.items() for tag, number in _scalars(name, value)}
        for tag, number in scalars.items():
            self._events.add_scalar(tag, number, step)
        if step <= self.last_step:
            return
        self._file.write(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n")
        self._file.flush()
        self.last_step = step
        if self._sink is not None:
            self._sink(step, scalars)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a line that broke off at the end is left out."""
    return _whole_lines(path)[0]


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if name == "step" or value is None:
        return []
    if isinstance(value, dict):
        return [(f"{name}/{key}", float(number)) for key, number in value.items() if not isinstance(number, dict)]
    return [(name, float(value))]


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Parsed lines and the bytes that they take."""
    if not path.exists():
        return [], 0
    lines, taken = [], 0
    for raw in path.read_bytes().splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        lines.append(json.loads(raw))
        taken += len(raw)
    return lines, taken


def _cut_to_whole_lines(path: Path) -> list[dict[str, Any]]:
    lines, taken = _whole_lines(path)
    if path.exists():
        with open(path, "r+b") as f:
            f.truncate(taken)
    return lines
