"""Numbers of the sharing experiments and what they are to reach. Knows results and the names of their methods."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.learning.goals import Goal
from benchmarks.learning.plan import Run
from benchmarks.learning.reduced import REDUCED
from benchmarks.learning.results import Result, Results, collect
from benchmarks.learning.sharing_plan import (
    BUILTIN,
    FROZEN,
    LATE,
    LATE_FROZEN,
    OWN,
    SHARED,
    UNIFORM,
    SharingPlan,
)
from trainer_client.run.metrics import read_metrics
from trainer_client.run.report import first_reached

TARGET_SOURCES = {BUILTIN: "prose", "books": "target", "pip": "prose"}  # of the pools
TIMES_POOL = 2.0  # a weighter is useful once the target's share of what is kept is so many times that of the pool ...
SMOOTHED, STAYS = 10, 100  # ... in the mean of so many steps, and stays above it for so many


@dataclass(frozen=True)
class SharingResults(Results):
    """All of the experiments.

    Attributes:
        jobs: those that share a weighter: corpus, size, seed.
        late: the fifth.
        useful: by folder of a run, the step from which its weighter was useful; None: never.
    """

    jobs: list[list[str | int]] = field(default_factory=list)
    late: list[str | int] = field(default_factory=list)
    useful: dict[str, int | None] = field(default_factory=dict)

    def get(self, corpus: str, kind: str, size: str, seed: int) -> Result | None:
        """The run, if it is there."""
        return next((r for r in self.of(corpus, f"{kind}-{size}") if r.seed == seed), None)

    def useful_from(self, run: Result) -> int | None:
        return self.useful.get(str(Run(run.corpus, run.method, run.seed, None).folder))


@dataclass(frozen=True)
class Comparison:
    """A job's ways to a weighter, beside uniform; the same seed, model and data."""

    corpus: str
    size: str
    seed: int
    uniform: Result
    runs: dict[str, Result]  # by kind, as far as they are there

    def steps_to_uniform(self, kind: str) -> float | None:
        return first_reached(self.runs[kind].curve, self.uniform.curve[-1][2]).steps

    def gain(self, kind: str) -> float:
        """Nats below uniform at the end."""
        return self.uniform.test_loss - self.runs[kind].test_loss

    def first_gain(self, kind: str) -> float:
        """Nats below a fresh weighter's run at the first evaluation."""
        return self.runs[OWN].curve[0][2] - self.runs[kind].curve[0][2]

    def mean_gain(self, kind: str) -> float:
        """Nats below a fresh weighter's run, mean over all evaluations."""
        pairs = zip(self.runs[OWN].curve, self.runs[kind].curve, strict=True)
        return statistics.fmean(own[2] - other[2] for own, other in pairs)


def collect_sharing(plan: SharingPlan, out: Path) -> SharingResults:
    """The figures of all finished runs of `plan` in `out`."""
    results = collect(plan, out, {}, {}, Results.none())
    useful = {}
    for run in results.runs:
        target = TARGET_SOURCES.get(run.corpus)
        uniform = [r for r in results.runs if r.corpus == run.corpus and r.method.startswith(UNIFORM)]
        if target is None or not uniform or run.method.startswith(UNIFORM):
            continue
        folders = [Run(r.corpus, r.method, r.seed, None).folder for r in (run, *uniform)]
        shares, *drawn = (target_shares(out / folder, target) for folder in folders)
        useful[str(folders[0])] = useful_from(shares, float(np.concatenate(drawn).mean()))
    jobs: list[list[str | int]] = [[j.corpus, j.size, j.seed] for j in (*plan.jobs, plan.late)]
    return SharingResults(**vars(results), jobs=jobs[:-1], late=jobs[-1], useful=useful)


def target_shares(folder: Path, source: str) -> np.ndarray:
    """[S] share of a source in what each step trained on."""
    (path,) = folder.glob("*/metrics.jsonl")
    return np.array([line["trained_share"].get(source, 0.0) for line in read_metrics(path)])


def useful_from(shares: Sequence[float] | np.ndarray, pool_share: float) -> int | None:
    """The first step, from 1, from which the mean of the last `SMOOTHED` shares stays above `TIMES_POOL` times that of
    the pool for `STAYS` steps; None where there is none. A batch is few samples, and selection is left to chance."""
    if len(shares) < SMOOTHED + STAYS:
        return None
    means = np.convolve(shares, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    runs = np.lib.stride_tricks.sliding_window_view(means > TIMES_POOL * pool_share, STAYS).all(1)
    return int(runs.argmax()) + SMOOTHED if runs.any() else None


def comparisons(results: SharingResults) -> list[Comparison]:
    """The jobs that share, those of them that are finished."""
    return [c for job in results.jobs if (c := _comparison(results, job, (OWN, SHARED, FROZEN))) is not None]


def late(results: SharingResults) -> Comparison | None:
    """The fifth job."""
    return _comparison(results, results.late, (OWN, LATE, LATE_FROZEN)) if results.late else None


def reduced(results: SharingResults) -> dict[str, list[tuple[Result, Result]]]:
    """By pool, uniform and selection by a fresh weighter, a pair a seed."""
    found: dict[str, list[tuple[Result, Result]]] = {}
    if not results.late:
        return found
    size = results.late[1]
    seeds = {r.seed for r in results.runs if r.corpus in REDUCED}
    for corpus in (BUILTIN, *REDUCED):
        own = {r.seed: r for r in results.of(corpus, f"{OWN}-{size}")}
        uniform = {r.seed: r for r in results.of(corpus, f"{UNIFORM}-{size}")}
        found[corpus] = [(uniform[s], own[s]) for s in sorted(seeds) if s in own and s in uniform]
    return {corpus: pairs for corpus, pairs in found.items() if pairs}


def sharing_goals(results: SharingResults) -> Iterator[Goal]:
    """All whose runs are there."""
    jobs = [c for c in comparisons(results) if {OWN, SHARED} <= c.runs.keys()]
    if jobs:
        loss = {kind: statistics.fmean(c.runs[kind].test_loss for c in jobs) for kind in (OWN, SHARED)}
        yield Goal("one weighter for four jobs: mean test loss, with one each being", loss[SHARED], loss[OWN])
        # Where none was useful, the shared one gets no benefit of the doubt.
        shared = statistics.fmean(_steps(results, c.runs[SHARED], float("inf")) for c in jobs)
        own = statistics.fmean(_steps(results, c.runs[OWN], c.uniform.steps) for c in jobs)
        yield Goal("one weighter for four jobs: steps until it is useful, with one each", shared, own)
    fifth = late(results)
    for kind in (LATE, LATE_FROZEN):
        if fifth is not None and {OWN, kind} <= fifth.runs.keys():
            what = f"a fifth job, {'frozen' if kind == LATE_FROZEN else 'learning'}: nats below a fresh weighter"
            yield Goal(f"{what}, first evaluation", fifth.first_gain(kind), 0.0, at_least=True)
    for c in comparisons(results):
        if {OWN, FROZEN} <= c.runs.keys():
            what = f"{c.corpus}: taught with the small model, frozen with {c.size}: share of the gain kept"
            yield Goal(what, c.gain(FROZEN) / c.gain(OWN), 0.9, at_least=True)
    for corpus, pairs in reduced(results).items():
        if corpus != BUILTIN:
            uniform, own = (statistics.fmean(pair[i].test_loss for pair in pairs) for i in (0, 1))
            yield Goal(f"{corpus}: selection by a fresh weighter, uniform being", own, uniform)


def _steps(results: SharingResults, run: Result, never: float) -> float:
    """Until its weighter was useful."""
    found = results.useful_from(run)
    return never if found is None else found


def _comparison(results: SharingResults, job: list[str | int], kinds: tuple[str, ...]) -> Comparison | None:
    corpus, size, seed = str(job[0]), str(job[1]), int(job[2])
    uniform = results.get(corpus, UNIFORM, size, seed)
    if uniform is None:
        return None
    runs = {kind: run for kind in kinds if (run := results.get(corpus, kind, size, seed)) is not None}
    return Comparison(corpus, size, seed, uniform, runs)
