"""The sharing experiments: which runs they are, figures by hand, goals, results that come back, the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning.plan import Run
from benchmarks.learning.results import Result, Series
from benchmarks.learning.sharing_figures import SMOOTHED, STAYS, SharingResults, sharing_goals, useful_from
from benchmarks.learning.sharing_plan import JobOf, SharingPlan, sharing_plan
from benchmarks.learning.sharing_report import write_sharing_report
from trainer_client.run.config import parse

POOL = 0.2  # of the target


@pytest.fixture(scope="module")
def plan() -> SharingPlan:
    return sharing_plan("books", "nano", "micro", steps=600, rate=2e-3)


def result(corpus: str, method: str, seed: int, loss: float) -> Result:
    """The loss falls from 6 to `loss` on a line over 600 steps."""
    return Result(
        corpus=corpus,
        method=method,
        seed=seed,
        rate=2e-3,
        steps=600,
        val_loss=loss,
        test_loss=loss,
        compute={"training_flops": 600.0, "teaching_flops": 0.0, "scoring_flops": 0.0, "reference_flops": 0.0},
        seconds={"wall": 12.0, "train": 10.0, "score": 1.0, "meta": 0.5},
        curve=[(step, step / 60, 6 - (6 - loss) * step / 600) for step in (100, 300, 600)],
        trust=None,
        series=Series([300.0, 600.0], {}, [1.0, 1.0], []),
    )


LOSSES = {"uniform": 4.0, "own": 3.5, "shared": 3.4, "late": 3.3, "late-frozen": 3.6, "frozen": 3.54}


@pytest.fixture
def results(plan: SharingPlan) -> SharingResults:
    runs = [result(r.corpus, r.method, r.seed, LOSSES[r.method.rpartition("-")[0]]) for r in plan.runs()]
    useful: dict[str, int | None] = {str(r.folder): 60 if r.method.startswith("shared") else 90 for r in plan.runs()}
    useful[str(Run("builtin", "own-nano", 0, None).folder)] = None
    jobs: list[list[str | int]] = [[j.corpus, j.size, j.seed] for j in (*plan.jobs, plan.late)]
    about: dict[str, Any] = {"jobs": jobs[:-1], "late": jobs[-1], "useful": useful}
    return SharingResults("abc", "a machine", "2026-01-01", plan.methods, {}, {}, runs, **about)


def test_four_jobs_have_two_targets_and_two_sizes_each(plan: SharingPlan) -> None:
    assert {(job.corpus, job.size) for job in plan.jobs} == {
        (c, s) for c in ("builtin", "books") for s in ("nano", "micro")
    }
    assert len({job.seed for job in (*plan.jobs, plan.late)}) == 5
    assert len({run.folder for run in plan.runs()}) == len(plan.runs())
    assert {run.method for run in plan.together()} == {"shared-nano", "shared-micro"}


def test_a_larger_model_is_taught_by_the_smaller_one_with_its_target(plan: SharingPlan) -> None:
    taught = {run: by for run, by in plan.after().items() if by is not None}
    assert taught == {
        JobOf("builtin", "micro", 2).run("frozen"): JobOf("builtin", "nano", 0).run("own"),
        JobOf("books", "micro", 3).run("frozen"): JobOf("books", "nano", 1).run("own"),
    }
    assert all(by in plan.alone() for by in taught.values())


def test_every_run_is_one_that_the_trainer_takes(plan: SharingPlan, tmp_path: Path) -> None:
    for run in plan.runs():
        config = parse(plan.command(run, 2e-3, ("--data", "a", "--val", "b"), tmp_path))
        kind, _, size = run.method.rpartition("-")
        assert (config.model, config.seed, config.out) == (size, run.seed, str(tmp_path / run.folder))
        assert config.role == ("frozen" if kind.endswith("frozen") else "learn")
        assert config.weighter_name == ("shared" if kind in ("shared", "late", "late-frozen") else "default")
        assert (config.on_failure, config.deadline) == (("raise", 60) if kind == "shared" else ("uniform", 0))


def test_a_weighter_is_useful_from_the_step_that_its_share_stays_above_twice_the_pools() -> None:
    shares = np.full(600, POOL)
    shares[50 : 50 + STAYS // 2] = 1.0  # not for long enough
    assert useful_from(shares, POOL) is None
    shares[300:] = 2 * POOL + 0.1
    # Of the ten steps of a mean, eight must be above: 0.2 + 0.03 n > 0.4.
    assert useful_from(shares, POOL) == 300 + 7
    shares[:] = 1.0
    assert useful_from(shares, POOL) == SMOOTHED
    assert useful_from(shares[: STAYS - 1], POOL) is None


def test_goals_say_what_is_reached_and_what_is_not(results: SharingResults) -> None:
    found = {goal.what: goal for goal in sharing_goals(results)}
    loss = found["one weighter for four jobs: mean test loss, with one each being"]
    assert (loss.value, loss.bound) == pytest.approx((3.4, 3.5))
    useful = found["one weighter for four jobs: steps until it is useful, with one each"]
    assert (useful.value, useful.bound) == pytest.approx((60, (600 + 3 * 90) / 4))  # never: all of its steps
    first = {
        k: found[f"a fifth job, {k}: nats below a fresh weighter, first evaluation"] for k in ("learning", "frozen")
    }
    assert first["learning"].value == pytest.approx(0.2 / 6)
    assert first["learning"].reached
    assert not first["frozen"].reached
    for corpus in ("builtin", "books"):
        kept = found[f"{corpus}: taught with the small model, frozen with micro: share of the gain kept"]
        assert kept.value == pytest.approx(0.46 / 0.5)
        assert kept.reached
    for corpus in ("builtin-dsir", "builtin-dsir-loss"):
        assert found[f"{corpus}: selection by a fresh weighter, uniform being"].reached
    assert len(found) == 8


def test_a_shared_weighter_that_was_never_useful_is_a_miss(results: SharingResults) -> None:
    never = replace(results, useful=dict.fromkeys(results.useful))
    (useful,) = (goal for goal in sharing_goals(never) if "useful" in goal.what)
    assert (useful.value, useful.bound, useful.reached) == (float("inf"), 600, False)


def test_goals_are_of_the_runs_that_are_there(results: SharingResults) -> None:
    some = replace(results, runs=[run for run in results.runs if run.method.startswith(("uniform", "own"))])
    assert {goal.what.split(":")[0] for goal in sharing_goals(some)} == {"builtin-dsir", "builtin-dsir-loss"}
    assert list(sharing_goals(replace(results, runs=[]))) == []


def test_results_come_back_as_they_were_written(results: SharingResults, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    assert SharingResults.read(tmp_path / "results.json") == results


def test_the_report_has_every_way_to_a_weighter(results: SharingResults, tmp_path: Path) -> None:
    text = write_sharing_report(results, list(sharing_goals(results)), tmp_path).read_text()
    assert "| books, micro, seed 3 | the shared weighter | 3.400 | 0.600 | 60 | " in text
    assert "| builtin, nano, seed 0 | its own weighter | 3.500 | 0.500 | never | " in text
    assert "| books, micro, seed 3 | the small model's weighter, frozen | 3.540 | 0.460 | 90 | " in text
    assert "| builtin-dsir | 4.000 | 3.500 | 0.500 | 2 |" in text
    assert "Goals: 7 of 8 reached" in text
