"""The runs in the folders of jobs: their metrics, summaries and what tells them apart. Reads files; draws nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer_client.run.metrics import read_metrics
from trainer_client.run.report import RunSummary, flops_at_points
from weighting_contract.errors import InvalidArgument

_METRICS = "metrics.jsonl"
_FIRST = "uniform"  # what the others are compared with comes first


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    name: str  # its label, with the job's folder in front where there are several jobs
    label: str
    job: Path  # the job's folder
    seed: int
    batch_size: int
    group_by: str  # the field of documents that is called their source
    lines: list[dict[str, Any]]  # of metrics.jsonl, at least one
    summary: RunSummary | None  # None: it is not finished

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return int(self.lines[-1]["step"])

    def curve(self, name: str) -> list[tuple[int, float, float]]:
        """Step, seconds and value of a loss that is taken from time to time: `test_loss` or `val_loss`."""
        return [(line["step"], line["seconds"], line[name]) for line in self.lines if name in line]

    @property
    def spent(self) -> dict[int, float]:
        """FLOPs of training, teaching and scoring after the steps of its evaluations; none before the run's end."""
        if self.summary is None:
            return {}
        steps = (step for step, _, _ in self.summary.test_curve)
        return dict(zip(steps, flops_at_points(self.summary), strict=True))


def find_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in folders of jobs or of single runs, each once; uniform ones first within their job.

    Raises:
        InvalidArgument: a folder that is not there or holds no run, or a run of another version.
    """
    folders = {folder.resolve(): folder for path in paths for folder in _run_folders(Path(path))}
    runs = [_read(folder) for folder in folders.values()]
    if len({run.job.resolve() for run in runs}) == 1:
        return runs
    names = [f"{run.job.resolve().name}/{run.label}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.job}/{run.label}" for run in runs]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def baseline_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The uniform run that `run` is compared with: that of its own job, or else the first one there is."""
    uniform = [other for other in runs if other.label == _FIRST]
    return next((other for other in uniform if other.job == run.job), uniform[0] if uniform else None)


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InvalidArgument(
            f"there is no folder {path}: name the --out folder of a job, or the folder of one run in it"
        )
    if (path / _METRICS).is_file():
        return [path]
    found = sorted(file.parent for file in path.glob(f"*/{_METRICS}"))
    if not found:
        raise InvalidArgument(
            f"{path} holds no run that has begun to train (no {_METRICS}): name the --out folder of a job, or the "
            "folder of one run in it"
        )
    return sorted(found, key=lambda folder: folder.name != _FIRST)


def _read(folder: Path) -> Run:
    job = folder.parent
    try:
        config = json.loads((job / "config.json").read_text(encoding="utf-8"))["config"]
        seed, batch_size, group_by = int(config["seed"]), int(config["batch_size"]), config.get("group_by")
        lines = read_metrics(folder / _METRICS)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidArgument(f"{folder} is no run that can be read, as {_reason(exc)}") from exc
    if not lines:
        raise InvalidArgument(f"{folder} has no steps yet: ask again when the run has trained some")
    if group_by is None or "preference" not in lines[0]:
        raise InvalidArgument(
            f"{folder} is a run of an earlier version, which did not record what it preferred: train it again to have "
            "it in a report"
        )
    summary = folder / "summary.json"
    return Run(
        name=folder.resolve().name,
        label=folder.resolve().name,
        job=job,
        seed=seed,
        batch_size=batch_size,
        group_by=group_by,
        lines=lines,
        summary=RunSummary.read(summary) if summary.is_file() else None,
    )


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError):
        return f"{exc.filename} can't be read: {exc.strerror}"
    if isinstance(exc, KeyError):
        return f"its job's config.json lacks {exc}"
    return f"its job's config.json or its {_METRICS} is damaged: {exc}"
