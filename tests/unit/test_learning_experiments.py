"""The harness of learning experiments: plans, figures by hand, goals, results that come back as they were written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning.__main__ import HERE
from benchmarks.learning.figures import figures
from benchmarks.learning.goals import goals
from benchmarks.learning.plan import Run, load_plan
from benchmarks.learning.report import write_report
from benchmarks.learning.results import Result, Results, Series, best_rates, collect, known_losses
from trainer_client.run.config import parse

METHODS = {
    "uniform": {"method": "uniform"},
    "oracle": {"method": "oracle", "mode": "select"},
    "dsir": {"method": "dsir"},
    "loss-weight": {"method": "loss", "mode": "weight"},
    "dwm-weight": {"method": "dwm", "mode": "weight"},
    "dwm": {"method": "dwm", "mode": "select"},
}


def result(method: str, loss: float, *, seed: int = 0, scoring: float = 0.0, corpus: str = "builtin") -> Result:
    """100 steps that cost 1 FLOP each and `scoring` in all; the loss falls from 6 to `loss` on a line."""
    return Result(
        corpus=corpus,
        method=method,
        seed=seed,
        rate=2e-3,
        steps=100,
        val_loss=loss,
        test_loss=loss,
        compute={"training_flops": 100.0, "teaching_flops": 0.0, "scoring_flops": scoring, "reference_flops": 7.0},
        seconds={"wall": 12.0, "train": 10.0, "score": 1.0, "meta": 0.5 if method.startswith("dwm") else 0.0},
        curve=[(0, 0.0, 6.0), (50, 5.0, (6 + loss) / 2), (100, 10.0, loss)],
        trust=None,
        series=Series([50.0, 100.0], {"prose": [0.2, 0.8], "code": [0.8, 0.2]}, [1.0, 1.0], []),
    )


@pytest.fixture
def results() -> Results:
    runs = [
        *(result("uniform", loss, seed=seed) for seed, loss in enumerate((4.0, 4.2))),
        *(result("oracle", loss, seed=seed) for seed, loss in enumerate((3.0, 3.2))),
        *(result("dwm", loss, seed=seed, scoring=100.0) for seed, loss in enumerate((3.1, 3.3))),
        *(result("dsir", 3.4, seed=seed) for seed in range(2)),
        *(result("loss-weight", 3.95, seed=seed) for seed in range(2)),
        *(result("dwm-weight", 3.9, seed=seed) for seed in range(2)),
    ]
    return Results("abc", "a machine", "2026-01-01", METHODS, {"dwm": {"0.002": 3.5}}, {"dwm": 2e-3}, runs)


def test_figures_are_means_over_seeds_at_equal_steps_and_at_equal_compute(results: Results) -> None:
    by_method = {f.method: f for f in figures(results)}
    dwm = by_method["dwm"]
    assert dwm.seeds == 2
    assert dwm.test_loss == pytest.approx(3.2)
    assert dwm.spread == pytest.approx(0.2)
    assert dwm.gap_closed == pytest.approx((4.1 - 3.2) / (4.1 - 3.1))
    assert dwm.compute == pytest.approx(2.0)
    assert dwm.loss_at_compute == pytest.approx((6 + 3.2) / 2)  # half of the steps for what uniform spends in all
    steps = [(6 - 4.0) / (6 - 3.1), (6 - 4.2) / (6 - 3.3)]  # of a run, to uniform's end
    assert dwm.compute_to_uniform == pytest.approx(2 * sum(steps) / 2)
    assert dwm.teaching_seconds == pytest.approx(0.05)
    assert by_method["uniform"].gap_closed == 0
    assert by_method["dwm-weight"].compute_to_uniform < 1


def test_what_is_scored_once_is_spent_early() -> None:
    run = replace(result("dwm", 3.0, scoring=100.0), spent=[0.0, 150.0, 200.0])
    assert run.flops_a_step == 2
    assert run.loss_after(75.0) == pytest.approx((6 + 4.5) / 2)
    assert run.loss_after(175.0) == pytest.approx((4.5 + 3) / 2)
    assert run.flops_to(4.5) == pytest.approx(150)
    assert run.flops_to(3.75) == pytest.approx(175)


def test_a_loss_that_is_never_reached_costs_without_end(results: Results) -> None:
    runs = [*results.runs, *(result("worse", 5.0, seed=s) for s in range(2))]
    worse = replace(results, methods={**METHODS, "worse": {}}, runs=runs)
    (found,) = (f for f in figures(worse) if f.method == "worse")
    assert found.compute_to_uniform == float("inf")


def test_goals_say_what_is_reached_and_what_is_not(results: Results) -> None:
    found = {goal.what: goal for goal in goals(results, figures(results))}
    gain = found["builtin: DWM inside the batch, nats below uniform"]
    assert gain.value == pytest.approx(0.2)
    assert gain.reached
    assert found["builtin: DWM inside the batch, loss-weight being the best of the others"].reached
    assert found["builtin: dwm, share of the gap closed"].reached
    compute = found["builtin: the best DWM at equal compute, dsir being the best of the others"]
    assert not compute.reached
    assert compute.bound == pytest.approx(3.4)

    more = [*results.runs, *(result("dsir-warm", 3.05, seed=seed) for seed in range(2))]
    warm = replace(results, methods={**METHODS, "dsir-warm": {}}, runs=more)
    found = {goal.what: goal for goal in goals(warm, figures(warm))}
    assert found["builtin: the best DWM at equal compute, dsir being the best of the others"].bound == compute.bound


def test_results_come_back_as_they_were_written(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_results_of_another_version_are_refused(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    with pytest.raises(SystemExit, match=r"is of version 0, this program reads version 1.*abc"):
        Results.read(path)
    path.write_text("{}")
    with pytest.raises(SystemExit, match="holds no results"):
        Results.read(path)


def test_the_report_has_every_method_and_its_pictures(results: Results, tmp_path: Path) -> None:
    found = figures(results)
    text = write_report(results, found, list(goals(results, found)), tmp_path).read_text()
    for method in METHODS:
        assert f"| {method} | " in text
    assert "builtin-loss.png" in text
    assert (tmp_path / "builtin-loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "builtin-choices.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["full.yaml", "quick.yaml"])
def test_every_run_of_the_plans_is_one_that_the_trainer_takes(name: str, tmp_path: Path) -> None:
    plan = load_plan(HERE / name)
    for run in [*plan.tuning(), *plan.runs()]:
        config = parse(plan.command(run, run.rate or 2e-3, (), tmp_path))
        assert config.seed == run.seed
        assert config.out == str(tmp_path / run.folder)
    rates = dict.fromkeys(plan.methods, 2e-3)
    assert len({run.folder for run in [*plan.runs(rates), *plan.tuning()]}) == len(plan.runs()) + len(plan.tuning())
    others = {run.folder for run in plan.runs(dict.fromkeys(plan.methods, 4e-3))}
    assert not others & {run.folder for run in plan.runs(rates)}


def test_the_smallest_rate_that_is_as_good_as_the_best_is_taken() -> None:
    plan = replace(load_plan(HERE / "full.yaml"), methods={"dsir": {}})
    assert best_rates(plan, {"dsir": {"0.001": 4.1, "0.002": 3.9, "0.004": 4.0}}) == {"dsir": 0.002}
    assert best_rates(plan, {"dsir": {"0.001": 4.1, "0.002": 3.91, "0.004": 3.9}}) == {"dsir": 0.002}
    assert best_rates(plan, {"dsir": {"0.001": 4.1, "0.002": 3.94, "0.004": 3.9}}) == {"dsir": 0.004}
    with pytest.raises(SystemExit, match="no tuning run of 'dsir' is finished"):
        best_rates(plan, {})


def test_what_an_earlier_matrix_has_of_the_same_flags_and_rate_is_known(results: Results, tmp_path: Path) -> None:
    plan = replace(load_plan(HERE / "quick.yaml"), methods=METHODS, corpora=("builtin",), seeds=(0, 1))
    rate = results.runs[0].rate
    again = collect(plan, tmp_path, {}, dict.fromkeys(METHODS, rate), results)
    assert sorted((r.method, r.seed) for r in again.runs) == sorted((r.method, r.seed) for r in results.runs)
    assert {r.commit for r in again.runs} == {results.commit}
    assert known_losses(plan, "dwm", results) == results.rates["dwm"]

    changed = replace(plan, methods={**METHODS, "dwm": {"method": "dwm", "temperature": 2}})
    rates = {**dict.fromkeys(METHODS, rate), "uniform": 2 * rate}
    kept = {r.method for r in collect(changed, tmp_path, {}, rates, results).runs}
    assert kept == set(METHODS) - {"dwm", "uniform"}
    assert known_losses(changed, "dwm", results) == {}
    assert known_losses(replace(plan, rates=(1e-3,)), "dwm", results) == {}
    anew = results.without(["dwm"])
    assert {r.method for r in collect(plan, tmp_path, {}, dict.fromkeys(METHODS, rate), anew).runs} == {*METHODS} - {
        "dwm"
    }
    assert known_losses(plan, "dwm", anew) == {}
    with pytest.raises(SystemExit, match="no method 'dwn' in the results, which have uniform, oracle"):
        results.without(["dwn"])
    assert collect(replace(plan, flags={"steps": 7}), tmp_path, {}, rates, results).runs == []


def test_a_plan_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("methods: [uniform]")
    with pytest.raises(SystemExit, match=r"is not a plan of learning runs .*full\.yaml is one"):
        load_plan(path)
    text = (HERE / "quick.yaml").read_text().replace("seed: 9", "seed: 0")
    path.write_text(text)
    with pytest.raises(SystemExit, match="seed 0 tunes the learning rates, so no run that counts may have it"):
        load_plan(path)


def test_tuning_and_counting_runs_have_folders_of_their_own() -> None:
    assert Run("books", "dwm", 9, 1e-3, tuning=True).folder == Path("tuning/books/dwm/seed-9-lr-0.001")
    assert Run("books", "dwm", 1, None).folder == Path("runs/books/dwm/seed-1")
