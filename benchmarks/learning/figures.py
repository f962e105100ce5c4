"""Numbers of a matrix: means over seeds at equal steps and at equal compute. Knows results, no goal."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.learning.results import Result, Results

UNIFORM, ORACLE = "uniform", "oracle"


@dataclass(frozen=True)
class Figures:
    """A method on a corpus, mean over the seeds that uniform has too.

    With U the uniform run of the same seed and C what it spent in all:
    """

    corpus: str
    method: str
    seeds: int
    test_loss: float  # at equal steps, on all test documents
    spread: float  # its largest difference between seeds
    gap_closed: float | None  # (U - method) / (U - oracle); None without an oracle
    loss_at_compute: float  # test loss on the curve's samples once C was spent
    compute: float  # of all steps, as a share of C
    compute_to_uniform: float  # what was spent when it had the loss that U ends with, as a share of C; may be infinite
    teaching_seconds: float  # share of the training time that teaching took


def figures(results: Results) -> list[Figures]:
    """By corpus and method; a method without a uniform run to compare it with is left out."""
    found = []
    for corpus in results.corpora:
        uniform = {run.seed: run for run in results.of(corpus, UNIFORM)}
        oracle = {run.seed: run for run in results.of(corpus, ORACLE)}
        for method in results.methods:
            runs = [run for run in results.of(corpus, method) if run.seed in uniform]
            if runs:
                found.append(_figures(corpus, method, runs, uniform, oracle))
    return found


def _figures(
    corpus: str, method: str, runs: list[Result], uniform: dict[int, Result], oracle: dict[int, Result]
) -> Figures:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values)

    losses = [run.test_loss for run in runs]
    base = [uniform[run.seed] for run in runs]
    spent = [run.flops_a_step * run.steps for run in base]
    gap = None
    if all(run.seed in oracle for run in runs):
        level = mean([run.test_loss for run in base])
        best = mean([oracle[run.seed].test_loss for run in runs])
        gap = (level - mean(losses)) / (level - best) if level > best else None
    return Figures(
        corpus=corpus,
        method=method,
        seeds=len(runs),
        test_loss=mean(losses),
        spread=max(losses) - min(losses),
        gap_closed=gap,
        loss_at_compute=mean([run.loss_after(flops) for run, flops in zip(runs, spent, strict=True)]),
        compute=mean([run.flops_a_step * run.steps / flops for run, flops in zip(runs, spent, strict=True)]),
        compute_to_uniform=mean(
            [run.flops_to(u.curve[-1][2]) / flops for run, u, flops in zip(runs, base, spent, strict=True)]
        ),
        teaching_seconds=mean([run.seconds["meta"] / run.seconds["train"] for run in runs]),
    )
