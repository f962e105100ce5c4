"""The sharing experiments as they are run: trainers that teach one served weighter at the same time, and one after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.learning.plan import Run
from benchmarks.learning.sharing import run
from benchmarks.learning.sharing_figures import SharingResults
from benchmarks.learning.sharing_plan import BUILTIN, JobOf, sharing_plan
from tests.integration.small_job import assert_same_tensors, exported_weighter, read, write_data

STEPS = 16


@pytest.mark.timeout(900)  # a dozen processes that load torch
def test_jobs_teach_one_served_weighter_and_a_later_one_finds_it_taught(tmp_path: Path) -> None:
    jobs = (JobOf(BUILTIN, "tiny", 0), JobOf("pip", "tiny", 1))
    plan = sharing_plan("pip", "tiny", "nano", STEPS, 2e-3)
    plan = replace(plan, jobs=jobs, late=JobOf(BUILTIN, "tiny", 2), reduced_seeds=())
    data = dict.fromkeys(plan.corpora, tuple(write_data(tmp_path)))
    out, console = tmp_path / "out", Console()

    def summary(of: Run) -> Any:
        return read(out / of.folder / "summary.json")

    assert run(plan, data, out, 2, console) == 0
    results = SharingResults.read(out / "results.json")
    assert {(r.corpus, r.method, r.seed) for r in results.runs} == {(r.corpus, r.method, r.seed) for r in plan.runs()}
    assert (out / "report" / "report.md").is_file()
    together = [summary(each) for each in plan.together()]
    assert {s["weighter"]["name"] for s in together} == {"shared"}
    lessons = sum(s["weighter"]["client"]["updates_acknowledged"] for s in together)
    assert lessons == 2 * STEPS / 4
    assert max(s["weighter"]["version"] for s in together) == lessons
    assert sum(s["fallback_steps"] for s in together) == 0
    newest = next(each for each in plan.together() if summary(each)["weighter"]["version"] == lessons)
    taught, frozen = (exported_weighter(out / each.folder) for each in (newest, plan.late.run("late-frozen")))
    assert_same_tensors(taught, frozen)
    assert summary(plan.late.run("late"))["weighter"]["version"] == lessons + STEPS / 4

    # One that was stopped goes on where it was, with the service's state as it was; the others are left alone.
    stopped, other = (out / each.folder for each in plan.together())
    config = (stopped / "config.json").stat().st_mtime_ns, (other / "config.json").stat().st_mtime_ns
    for left in (stopped / "summary.json", *stopped.glob("*/summary.json"), *stopped.glob("*/checkpoints/*16.*")):
        left.unlink()
    assert run(plan, data, out, 2, console) == 0
    again = summary(plan.together()[0])
    assert (again["test_loss"], again["weighter"]["version"]) == (together[0]["test_loss"], lessons)
    assert (stopped / "config.json").stat().st_mtime_ns > config[0]
    assert (other / "config.json").stat().st_mtime_ns == config[1]
