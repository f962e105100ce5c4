"""The runs of the sharing experiments and their flags: jobs with one weighter each, jobs that share one, those after.

Knows flags of `python -m trainer_client.run`, nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.learning.plan import Plan, Run
from benchmarks.learning.reduced import REDUCED

BUILTIN = "builtin"
UNIFORM, OWN, SHARED, LATE, LATE_FROZEN, FROZEN = "uniform", "own", "shared", "late", "late-frozen", "frozen"
WEIGHTER = "shared"
ANSWER_S = 60  # four trainers and a service on two cores: a slow answer is no missing one


@dataclass(frozen=True)
class JobOf:
    """A trainer: its data, its model and its seed."""

    corpus: str
    size: str
    seed: int

    def run(self, kind: str) -> Run:
        return Run(self.corpus, f"{kind}-{self.size}", self.seed, None)


@dataclass(frozen=True)
class SharingPlan(Plan):
    """All runs.

    Attributes:
        jobs: the four that share a weighter, or have one each: two targets, each with a small and a larger model.
        late: the job that comes when they have ended.
        reduced_seeds: of the runs on the built-in pool as it is, and reduced.
    """

    jobs: tuple[JobOf, ...] = ()
    late: JobOf = JobOf(BUILTIN, "", 0)
    reduced_seeds: tuple[int, ...] = (0, 1)

    def alone(self) -> list[Run]:
        """Those that need no other, the longest first, so that two processes end together."""
        pairs = [job.run(kind) for job in (*self.jobs, self.late) for kind in (OWN, UNIFORM)]
        small = self.late.size
        for corpus in (BUILTIN, *REDUCED):
            pairs += [JobOf(corpus, small, seed).run(kind) for seed in self.reduced_seeds for kind in (OWN, UNIFORM)]
        return sorted(dict.fromkeys(pairs), key=lambda run: run.method.endswith(small))

    def together(self) -> list[Run]:
        """Those that teach one weighter at the same time."""
        return [job.run(SHARED) for job in self.jobs]

    def after(self) -> dict[Run, Run | None]:
        """Those that use a copy of a taught weighter: of that run, or (None) of the shared one."""
        lessons = {job.run(FROZEN): self.teacher(job).run(OWN) for job in self.larger}
        return {**lessons, self.late.run(LATE): None, self.late.run(LATE_FROZEN): None}

    @property
    def larger(self) -> list[JobOf]:
        return [job for job in self.jobs if job.size != self.late.size]

    def teacher(self, larger: JobOf) -> JobOf:
        """The job with the small model and the same target."""
        return next(j for j in self.jobs if j.corpus == larger.corpus and j.size == self.late.size)

    def runs(self, rates: Mapping[str, float] | None = None) -> list[Run]:
        return [*self.alone(), *self.together(), *self.after()]


def sharing_plan(second: str, small: str, large: str, steps: int, rate: float) -> SharingPlan:
    """The experiments with the built-in corpus and `second` as targets, and models of two sizes."""
    methods: dict[str, dict[str, Any]] = {}
    fresh = {"method": "dwm", "mode": "select", "weighter-from": "none"}
    frozen = {**fresh, "role": "frozen"}
    for size in (small, large):
        flags: dict[str, dict[str, Any]] = {
            UNIFORM: {"method": "uniform"},
            OWN: fresh,
            SHARED: {**fresh, "weighter-name": WEIGHTER, "deadline": ANSWER_S, "on-failure": "raise"},
            LATE: {**fresh, "weighter-name": WEIGHTER},
            LATE_FROZEN: {**frozen, "weighter-name": WEIGHTER},
            FROZEN: frozen,
        }
        methods |= {f"{kind}-{size}": {**of, "model": size} for kind, of in flags.items()}
    targets = [(corpus, size) for size in (small, large) for corpus in (BUILTIN, second)]
    jobs = tuple(JobOf(corpus, size, seed) for seed, (corpus, size) in enumerate(targets))
    return SharingPlan(
        methods=methods,
        corpora=(BUILTIN, second, *REDUCED),
        seeds=tuple(range(len(jobs) + 1)),
        rates=(rate,),
        tuning_corpora=(),
        tuning_seed=-1,
        flags={"steps": steps},
        jobs=jobs,
        late=JobOf(BUILTIN, small, len(jobs)),
    ).checked()
