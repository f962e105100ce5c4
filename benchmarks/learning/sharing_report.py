"""report.md of the sharing experiments, in plain words."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.learning.goals import Goal
from benchmarks.learning.report import goals_section, head
from benchmarks.learning.results import Result
from benchmarks.learning.sharing_figures import (
    STAYS,
    TIMES_POOL,
    Comparison,
    SharingResults,
    comparisons,
    late,
    reduced,
)
from benchmarks.learning.sharing_plan import FROZEN, LATE, LATE_FROZEN, OWN, SHARED

_NAMES = {
    OWN: "its own weighter",
    SHARED: "the shared weighter",
    LATE: "the shared weighter, learning",
    LATE_FROZEN: "the shared weighter, frozen",
    FROZEN: "the small model's weighter, frozen",
}


def write_sharing_report(results: SharingResults, goals: list[Goal], folder: Path) -> Path:
    """report.md in `folder`; where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = comparisons(results)
    fifth = late(results)
    words = (
        "Losses are test losses in nats a token, at equal steps. *Useful from*: the step from which the target's share "
        f"of what is kept stays above {TIMES_POOL:g} times its share of the pool for {STAYS} steps. *To uniform's "
        "end*: steps until the loss that uniform ends with.\n"
    )
    parts = [
        head("Sharing, passing on, and standing on top", "python -m benchmarks.learning.sharing", results),
        words,
        goals_section(goals),
        "## Four jobs: a weighter each, or one for all\n",
        _jobs(results, jobs, (OWN, SHARED)),
        "## Taught with a small model, used by a larger one\n",
        _jobs(results, [c for c in jobs if FROZEN in c.runs], (OWN, FROZEN)),
        "## A fifth job, after the four\n",
        _jobs(results, [fifth] if fifth else [], (OWN, LATE, LATE_FROZEN)),
        *([_curve(fifth)] if fifth else []),
        "## On top of methods that reduce the pool\n",
        _reduced(reduced(results)),
    ]
    path = folder / "report.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _jobs(results: SharingResults, jobs: list[Comparison], kinds: tuple[str, ...]) -> str:
    rows = []
    for c in jobs:
        of = f"| {c.corpus}, {c.size}, seed {c.seed}"
        rows.append(f"{of} | uniform | {c.uniform.test_loss:.3f} | | | |")
        for kind in kinds:
            if kind in c.runs:
                run, steps = c.runs[kind], c.steps_to_uniform(kind)
                rows.append(
                    f"{of} | {_NAMES[kind]} | {run.test_loss:.3f} | {c.gain(kind):.3f} "
                    f"| {_or_never(results.useful_from(run))} | {_or_never(steps)} |"
                )
    table = "| job | weighter | test loss | below uniform | useful from | to uniform's end |\n|---|---|---|---|---|---|"
    return "\n".join([table, *rows, ""])


def _curve(fifth: Comparison) -> str:
    """Its first evaluations."""
    runs: dict[str, Result] = {"uniform": fifth.uniform, **{_NAMES[kind]: run for kind, run in fifth.runs.items()}}
    steps = [point[0] for point in fifth.uniform.curve[:6]]
    rows = [f"| {name} | " + " | ".join(f"{p[2]:.3f}" for p in run.curve[:6]) + " |" for name, run in runs.items()]
    gains = [
        f"{_NAMES[kind]}: {fifth.mean_gain(kind):.3f}"
        for kind in (LATE, LATE_FROZEN)
        if {OWN, kind} <= fifth.runs.keys()
    ]
    head = "| test loss after steps | " + " | ".join(map(str, steps)) + " |"
    below = f"\nNats below a fresh weighter, mean over all evaluations: {'; '.join(gains)}.\n" if gains else ""
    return "\n".join([head, "|---" * (len(steps) + 1) + "|", *rows, below])


def _reduced(pools: dict[str, list[tuple[Result, Result]]]) -> str:
    rows = []
    for corpus, pairs in pools.items():
        uniform, own = (statistics.fmean(pair[i].test_loss for pair in pairs) for i in (0, 1))
        rows.append(f"| {corpus} | {uniform:.3f} | {own:.3f} | {uniform - own:.3f} | {len(pairs)} |")
    return "\n".join(
        ["| pool | uniform | selection, from scratch | gain | seeds |", "|---|---|---|---|---|", *rows, ""]
    )


def _or_never(steps: float | None) -> str:
    return "never" if steps is None else f"{steps:.0f}"
