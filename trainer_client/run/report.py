"""What a finished job has to say: summary.json, and the table that a user sees.

Works on numbers that runs left behind (metrics lines, summaries); knows nothing of training or of the service.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from weighting_contract.errors import InvalidArgument


@dataclass(frozen=True)
class RunSummary:
    """One method's run. Losses are nats a token over all documents; seconds are wall seconds of the training loop."""

    method: str
    seed: int
    steps: int
    tokens_seen: int
    val_loss: float
    test_loss: float
    wall_seconds: float  # everything, evaluations and checkpoints too
    train_seconds: float  # training steps: forward to optimiser step, with scoring and teaching
    score_seconds: float  # features and waiting for weights
    meta_seconds: float  # cotangents and handing them over
    fallback_steps: int  # steps with uniform weights because the weighter did not answer
    meta_updates: int  # handed over
    meta_updates_skipped: int  # their cotangent was degenerate
    effective_sample_size: float  # mean over the last quarter of the steps, in samples
    weights_by_source: dict[str, float]  # mean over the last quarter of the steps
    weighter: dict[str, Any] | None = None  # name, version (position), applied_updates, url, client (its counters)
    test_curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, loss on fixed samples

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Raises InvalidArgument where the file is not a summary."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["test_curve"] = [(int(step), float(s), float(loss)) for step, s, loss in values["test_curve"]]
            return cls(**values)
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidArgument(f"{path} is not the summary of a run: {exc}") from exc


@dataclass(frozen=True)
class Reached:
    """When a run first had a loss: optimiser steps and seconds, interpolated between evaluations; None: never."""

    steps: float | None
    seconds: float | None


def first_reached(curve: Sequence[tuple[int, float, float]], loss: float) -> Reached:
    """When a curve of (step, seconds, loss) is first at or below `loss`."""
    before: tuple[int, float, float] | None = None
    for point in curve:
        if point[2] <= loss:
            if before is None:
                return Reached(float(point[0]), point[1])
            share = (before[2] - loss) / (before[2] - point[2])
            return Reached(before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1]))
        before = point
    return Reached(None, None)


def weights_by_source(weights: np.ndarray, sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean weight of each source's samples over the last quarter of the steps.

    Args:
        weights, sources: [S, B]; sources are indices into `names`. A source without samples is left out.
    """
    tail = len(weights) - max(1, len(weights) // 4)
    last_weights, last_sources = weights[tail:], sources[tail:]
    return {
        name: float(last_weights[last_sources == i].mean(dtype=np.float64))
        for i, name in enumerate(names)
        if (last_sources == i).any()
    }


def mean_effective_size(weights: np.ndarray) -> float:
    """Mean effective sample size over the last quarter of the steps; weights [S, B]."""
    last = weights[len(weights) - max(1, len(weights) // 4) :].astype(np.float64)
    return float((last.sum(1) ** 2 / (last**2).sum(1)).mean())


def job_summary(runs: dict[str, RunSummary], method: str) -> dict[str, Any]:
    """The contents of a job's summary.json: the method's own summary, and beside it those it is compared with."""
    summary = asdict(runs[method])
    others = {name: asdict(run) for name, run in runs.items() if name != method}
    if others:
        summary["compare"] = others
    if "uniform" in others:
        reached = reached_uniform(runs[method], runs["uniform"])
        summary["steps_to_uniform_loss"], summary["seconds_to_uniform_loss"] = reached.steps, reached.seconds
    return summary


def reached_uniform(run: RunSummary, uniform: RunSummary) -> Reached:
    """When `run` first had the test loss that the uniform run ended with, both on the curve's fixed samples."""
    return first_reached(run.test_curve, uniform.test_curve[-1][2])


def table(runs: dict[str, RunSummary], method: str) -> Table:
    """A rich table of the runs side by side, uniform first."""
    shown = [runs[name] for name in sorted(runs, key=lambda name: name == method)]
    result = Table(title=f"{' against '.join(r.method for r in shown)}, seed {shown[0].seed}", title_justify="left")
    result.add_column("")
    for run in shown:
        result.add_column(run.method, justify="right")

    def row(name: str, values: list[str], last: bool = False) -> None:
        result.add_row(name, *values, end_section=last)

    row("test loss", [f"{r.test_loss:.3f}" for r in shown])
    row("validation loss", [f"{r.val_loss:.3f}" for r in shown])
    if "uniform" in runs and len(runs) > 1:
        reached = [reached_uniform(r, runs["uniform"]) for r in shown]
        row("steps to the uniform run's final loss", [_number(r.steps) for r in reached])
        row("seconds to it", [_number(r.seconds) for r in reached])
    row("wall time, s", [f"{r.wall_seconds:.0f}" for r in shown], last=True)
    names = {name: None for r in shown for name in r.weights_by_source}
    for i, name in enumerate(names):
        values = [f"{r.weights_by_source[name]:.2f}" if name in r.weights_by_source else "-" for r in shown]
        row(f"mean weight of {name}*", values, last=i == len(names) - 1)
    row("effective sample size*", [f"{r.effective_sample_size:.1f}" for r in shown])
    result.caption = "* over the last quarter of the steps; shares are of the time of the training steps"
    result.caption_justify = "left"
    if not any(r.weighter for r in shown):
        return result
    row("scoring, s", [_time_share(r.score_seconds, r) for r in shown])
    row("teaching, s", [_time_share(r.meta_seconds, r) for r in shown])
    updates = [f"{r.meta_updates} ({r.meta_updates_skipped})" if r.weighter else "-" for r in shown]
    row("meta-updates (degenerate)", updates)
    row("acknowledged of sent since the last start", [_acknowledged(r) for r in shown])
    row("steps without the weighter", [str(r.fallback_steps) if r.weighter else "-" for r in shown])
    return result


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _acknowledged(run: RunSummary) -> str:
    if run.weighter is None:
        return "-"
    counts = run.weighter["client"]
    return f"{counts['updates_acknowledged']} of {counts['updates_sent']}"


def _time_share(seconds: float, run: RunSummary) -> str:
    return f"{seconds:.1f} ({100 * seconds / run.train_seconds:.0f} %)" if run.weighter else "-"
