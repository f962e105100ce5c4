"""What a finished job has to say: summary.json, and the numbers in it.

Works on numbers that runs left behind (metrics lines, records); knows nothing of training or of the service.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from weighting_contract.errors import InvalidArgument

Curve = Sequence[tuple[int, float, float]]  # step, seconds, loss on fixed samples


@dataclass(frozen=True)
class RunSummary:
    """One run. Losses are nats a token over all documents; seconds are wall seconds of the training loop."""

    label: str
    method: str
    mode: str  # of dwm and judged methods, else empty
    weighter_from: str  # of dwm, else empty
    role: str  # of dwm, else empty
    candidates: int  # a place in the batch; 1: the batch is taken as drawn
    seed: int
    steps: int
    tokens_seen: int
    val_loss: float
    test_loss: float
    wall_seconds: float  # everything, evaluations and checkpoints too
    train_seconds: float  # training steps: forward to optimiser step, with scoring and teaching
    score_seconds: float  # features and waiting for samples and weights
    meta_seconds: float  # cotangents and handing them over
    wait_seconds: float  # waiting for candidates that were not scored in time
    fallback_steps: int  # steps without the weighter, because it did not answer
    meta_updates: int  # handed over
    meta_updates_skipped: int  # their cotangent was degenerate
    effective_sample_size: float  # mean over the last quarter of the steps, in samples
    weights_by_source: dict[str, float]  # mean over the last quarter of the steps
    shares_by_source: dict[str, float]  # of what was trained on, weight x count, over the last quarter of the steps
    trust: float | None  # at the last step that the weighter answered; None: it never did, or there is none
    compute: dict[str, float]  # as of `Compute`
    reference: dict[str, Any] | None = None  # name, checksum, parameters
    weighter: dict[str, Any] | None = None  # name, version (position), applied_updates, url, client (its counters)
    replayed_from: str | None = None  # folder of the job whose records it was trained with
    warnings: tuple[str, ...] = ()  # about the data, in sentences
    eval_tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, as they were asked for
    eval_scores: dict[str, dict[str, float]] | None = None  # task -> metric -> value
    test_curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, loss on fixed samples
    spent_curve: list[float] = field(default_factory=list)  # FLOPs at each of its points, as of `Compute.total`

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Raises InvalidArgument where the file is not a summary."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["test_curve"] = [(int(step), float(s), float(loss)) for step, s, loss in values["test_curve"]]
            for name in ("eval_tasks", "warnings"):
                values[name] = tuple(values.get(name, ()))
            if other := _other_fields(cls, values):
                raise InvalidArgument(
                    f"{path} is the summary of a run of another version (they differ in {', '.join(other)}): read it "
                    "with that version, or start the run anew in another folder"
                )
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise InvalidArgument(f"{path} is not the summary of a run: {exc!r}") from exc


def _other_fields(kind: type[RunSummary], values: dict[str, Any]) -> list[str]:
    """What `values` lack or have beside the fields of a summary."""
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return sorted((needed - values.keys()) | (values.keys() - {f.name for f in fields(kind)}))


@dataclass(frozen=True)
class Reached:
    """When a run first had a loss: optimiser steps and seconds, interpolated between evaluations; None: never."""

    steps: float | None
    seconds: float | None


def first_reached(curve: Curve, loss: float) -> Reached:
    """When a curve is first at or below `loss`."""
    before: tuple[int, float, float] | None = None
    for point in curve:
        if point[2] <= loss:
            if before is None:
                return Reached(float(point[0]), point[1])
            share = (before[2] - loss) / (before[2] - point[2])
            return Reached(before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1]))
        before = point
    return Reached(None, None)


def reached_uniform(run: RunSummary, uniform: RunSummary) -> Reached:
    """When `run` first had the test loss that the uniform run ended with, both on the curve's fixed samples."""
    return first_reached(run.test_curve, uniform.test_curve[-1][2])


def loss_at_compute(run: RunSummary, uniform: RunSummary) -> float:
    """Test loss of `run` when it had taken as much compute as all of the uniform run, on the curve's fixed samples.

    Linear between evaluations; at the ends, the nearest one.
    """
    return loss_after(uniform.compute["training_flops"], flops_at_points(run), run.test_curve)


def flops_at_points(run: RunSummary) -> list[float]:
    """FLOPs at each point of a run's curve; where they are not known, as of older runs, all steps cost the same."""
    total = sum(run.compute[name] for name in ("training_flops", "teaching_flops", "scoring_flops"))
    return run.spent_curve or [total * step / run.steps for step, _, _ in run.test_curve]


def loss_after(flops: float, spent: Sequence[float], curve: Curve) -> float:
    """Loss of a curve once so much was spent; linear between its points, constant beyond.

    Args:
        spent: FLOPs at each point of the curve.
    """
    return float(np.interp(flops, spent, [loss for _, _, loss in curve]))


def weights_by_source(weights: np.ndarray, sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean weight of each source's samples over the last quarter of the steps.

    Args:
        weights, sources: [S, B]; sources are indices into `names`. A source without samples is left out.
    """
    last_weights, last_sources = last_quarter(weights), last_quarter(sources)
    return {
        name: float(last_weights[last_sources == i].mean(dtype=np.float64))
        for i, name in enumerate(names)
        if (last_sources == i).any()
    }


def shares_by_source(weights: np.ndarray, sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of each source in what was trained on, weight x count, over the last quarter of the steps.

    It says the same of selected and of weighted batches. Args as of `weights_by_source`; the shares add up to 1.
    """
    last_weights, last_sources = last_quarter(weights).astype(np.float64), last_quarter(sources)
    total = last_weights.sum()
    return {name: float(last_weights[last_sources == i].sum() / total) for i, name in enumerate(names)}


def mean_effective_size(weights: np.ndarray) -> float:
    """Mean effective sample size over the last quarter of the steps; weights [S, B]."""
    last = last_quarter(weights).astype(np.float64)
    return float((last.sum(1) ** 2 / (last**2).sum(1)).mean())


def last_quarter(values: np.ndarray) -> np.ndarray:
    """The rows of the last quarter of the steps, at least one; values [S, ...]."""
    return values[len(values) - max(1, len(values) // 4) :]


def job_summary(runs: dict[str, RunSummary], main: str) -> dict[str, Any]:
    """The contents of a job's summary.json: the main run's summary, and beside it those it is compared with."""
    summary = asdict(runs[main])
    others = {label: asdict(run) for label, run in runs.items() if label != main}
    if others:
        summary["compare"] = others
    if "uniform" in others:
        reached = reached_uniform(runs[main], runs["uniform"])
        summary["steps_to_uniform_loss"], summary["seconds_to_uniform_loss"] = reached.steps, reached.seconds
        summary["loss_at_uniform_compute"] = loss_at_compute(runs[main], runs["uniform"])
    return summary


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
