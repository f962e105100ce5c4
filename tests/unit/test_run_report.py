"""Summaries, the moment when a curve reaches a loss, means and shares by source, compute, the table and the picture."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from trainer_client.run.compute import Compute, scoring_flops, teaching_flops, training_flops
from trainer_client.run.plot import SourceHistory, enrichment, plot_sources
from trainer_client.run.report import (
    Reached,
    RunSummary,
    first_reached,
    flops_at_points,
    job_summary,
    loss_at_compute,
    mean_effective_size,
    shares_by_source,
    weights_by_source,
    write_json,
)
from trainer_client.run.table import table
from trainer_client.run.variants import variant_of
from weighting_contract.errors import InvalidArgument

WEIGHTER = {
    "name": "default",
    "version": 7,
    "applied_updates": 7,
    "client": {"updates_sent": 189, "updates_acknowledged": 187, "updates_dropped": 2},
}
CURVE = [(10, 1.0, 6.0), (20, 3.0, 5.0), (30, 4.0, 5.5), (40, 6.0, 4.0)]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (6.5, Reached(10.0, 1.0)),  # already at the first point
        (5.25, Reached(17.5, 2.5)),
        (5.0, Reached(20.0, 3.0)),
        (4.75, Reached(35.0, 5.0)),  # after having risen again
        (3.9, Reached(None, None)),
    ],
)
def test_first_reached_interpolates(loss, expected):
    assert first_reached(CURVE, loss) == expected


def test_means_and_shares_are_of_the_last_quarter():
    weights = np.ones((8, 4), np.float32)
    weights[6:] = [[2, 2, 0, 0], [1, 3, 0, 0]]
    sources = np.tile(np.array([0, 1, 2, 2]), (8, 1))
    names = ["a", "b", "c", "never drawn"]
    assert weights_by_source(weights, sources, names) == {"a": 1.5, "b": 2.5, "c": 0.0}
    assert shares_by_source(weights, sources, names) == {"a": 3 / 8, "b": 5 / 8, "c": 0.0, "never drawn": 0.0}
    assert mean_effective_size(weights) == pytest.approx((2.0 + 1.6) / 2)


def test_weighted_and_selected_batches_of_one_mixture_have_one_share():
    weighted = shares_by_source(np.array([[1.5, 1.5, 0.5, 0.5]]), np.array([[0, 0, 1, 1]]), ["a", "b"])
    selected = shares_by_source(np.ones((1, 4)), np.array([[0, 0, 0, 1]]), ["a", "b"])
    assert weighted == selected == {"a": 0.75, "b": 0.25}


def test_enrichment_against_a_loop():
    rng = np.random.default_rng(0)
    weights, sources, drawn = rng.random((12, 5)), rng.integers(0, 3, (12, 5)), rng.integers(0, 3, (12, 15))
    drawn[:3] = 1  # source 0 comes later
    window = 4
    expected = []
    for s in range(12):
        span = slice(max(0, s - window + 1), s + 1)
        below = np.mean(drawn[span] == 0) * len(drawn[span])
        above = sum(weights[t][sources[t] == 0].sum() / 5 for t in range(*span.indices(12)))
        expected.append(above / below if below else np.nan)
    history = SourceHistory(weights, sources, drawn, ["a", "b", "c"])
    np.testing.assert_allclose(enrichment(history, 0, window), expected)


def test_enrichment_of_a_batch_as_drawn_is_its_mean_weight():
    weights, sources = np.array([[2.0, 1.0, 0.5, 0.5]] * 3), np.array([[0, 1, 1, 1]] * 3)
    history = SourceHistory(weights, sources, sources, ["a", "b"])
    np.testing.assert_allclose(enrichment(history, 0, 2), [2, 2, 2])
    np.testing.assert_allclose(enrichment(history, 1, 2), [2 / 3, 2 / 3, 2 / 3])


def test_compute_by_the_usual_counts():
    n, r = 1000, 50
    compute = Compute(
        training_flops(n, 100 * 32 * 64),
        teaching_flops(n, "finite_difference", 25 * 16 * 64, 25 * 8 * 64),
        scoring_flops(r, 100 * 160 * 64),
        reference_flops=1.0,
    )
    assert compute.training_flops == 6 * n * 100 * 32 * 64
    assert compute.teaching_flops == 25 * 64 * n * (2 * 16 + 6 * 8)
    assert compute.scoring_flops == 2 * r * 100 * 160 * 64
    assert compute.relative == pytest.approx(1 + 25 * (32 + 48) / (6 * 100 * 32) + 2 * 50 * 160 / (6 * 1000 * 32))
    assert compute.to_dict().keys() == {
        *("training_flops", "teaching_flops", "scoring_flops", "reference_flops", "relative"),
    }


def _summary(label: str, loss: float) -> RunSummary:
    variant = variant_of(label, "default")
    extra = 2.0 if variant.selects else 1.0 if variant.learned else 0.0
    return RunSummary(
        label=label,
        method=variant.method,
        mode=variant.mode,
        weighter_from=variant.weighter_from,
        role=variant.role,
        candidates=5 if variant.draws_candidates else 1,
        seed=0,
        steps=40,
        tokens_seen=40 * 2048,
        val_loss=loss + 0.1,
        test_loss=loss,
        wall_seconds=10.0,
        train_seconds=8.0,
        score_seconds=0.4,
        meta_seconds=0.8,
        wait_seconds=0.3,
        fallback_steps=1,
        meta_updates=9,
        meta_updates_skipped=1,
        effective_sample_size=14.2,
        weights_by_source={"prose": 1.5, "noise": 0.5} if variant.weighs else {"prose": 1.0, "noise": 1.0},
        shares_by_source={"prose": 0.75, "noise": 0.25} if variant.learned else {"prose": 0.5, "noise": 0.5},
        trust=0.9 if variant.learned else None,
        compute=Compute(10.0, extra, 0.0, 0.0).to_dict(),
        weighter=WEIGHTER if variant.learned else None,
        test_curve=[(step, seconds, x + loss - 4.0) for step, seconds, x in CURVE],
    )


def test_summaries_round_trip(tmp_path):
    summary = _summary("select", 4.3)
    summary.write(tmp_path / "s.json")
    assert RunSummary.read(tmp_path / "s.json") == summary
    write_json(tmp_path / "s.json", {"method": "dwm"})
    with pytest.raises(InvalidArgument, match="not the summary of a run"):
        RunSummary.read(tmp_path / "s.json")


@pytest.mark.parametrize(("change", "named"), [({"more": 1}, "more"), ({"steps": None}, "steps")])
def test_a_summary_of_another_version_is_named_as_one(tmp_path, change, named):
    path = tmp_path / "s.json"
    values = {**dataclasses.asdict(_summary("select", 4.3)), **change}
    write_json(path, {name: value for name, value in values.items() if value is not None or name not in change})
    with pytest.raises(
        InvalidArgument, match=rf"is the summary of a run of another version \(they differ in {named}\)"
    ):
        RunSummary.read(path)


def test_job_summary_has_the_main_run_on_top_and_the_others_beside_it():
    runs = {"weight": _summary("weight", 4.25), "uniform": _summary("uniform", 4.5)}
    summary = json.loads(json.dumps(job_summary(runs, "weight")))
    assert (summary["label"], summary["method"], summary["compare"]["uniform"]["method"]) == (
        "weight",
        "dwm",
        "uniform",
    )
    assert summary["steps_to_uniform_loss"] == pytest.approx(30 + 10 * (5.75 - 4.5) / 1.5)
    assert summary["seconds_to_uniform_loss"] == pytest.approx(4 + 2 * (5.75 - 4.5) / 1.5)
    at = 40 / 1.1  # steps that cost as much as all of uniform's
    assert summary["loss_at_uniform_compute"] == pytest.approx(4.25 + 1.5 * (40 - at) / 10)
    assert job_summary(dict(reversed(runs.items())), "uniform")["compare"].keys() == {"weight"}
    assert "compare" not in job_summary({"weight": runs["weight"]}, "weight")


def test_loss_at_compute_is_the_nearest_evaluation_where_the_curve_ends():
    uniform, costly = _summary("uniform", 4.0), _summary("select", 4.0)
    costly.compute["scoring_flops"] = 1000.0
    assert loss_at_compute(uniform, uniform) == 4.0
    assert loss_at_compute(costly, uniform) == CURVE[0][2]


def test_loss_at_compute_counts_what_was_spent_by_then():
    """Candidates are scored when they come first: half of the run may cost more than half of all."""
    uniform = _summary("uniform", 4.0)
    early = replace(_summary("select", 4.0), spent_curve=[5.0, 12.0, 15.0, 20.0])
    assert flops_at_points(early) == [5, 12, 15, 20]
    assert flops_at_points(uniform) == [2.5, 5, 7.5, 10]
    assert loss_at_compute(early, uniform) == pytest.approx(6 - 5 / 7)  # of 10 FLOPs, at 5 of the 7 to the next point


def test_a_run_that_stays_above_uniform_never_reaches_it():
    runs = {"select": _summary("select", 4.6), "uniform": _summary("uniform", 4.5)}
    summary = job_summary(runs, "select")
    assert summary["steps_to_uniform_loss"] is None
    assert summary["seconds_to_uniform_loss"] is None


def _shown(runs: dict[str, RunSummary], main: str) -> tuple[str, dict[str, list[str]]]:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table(runs, main))
    text = console.export_text()
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    return text, {name: values for _, name, *values, _ in cells}


def test_the_table_shows_the_runs_side_by_side():
    text, rows = _shown({"weight": _summary("weight", 4.25), "uniform": _summary("uniform", 4.5)}, "weight")
    assert "weight against uniform; seed 0" in text
    assert rows["test loss"] == ["4.500", "4.250"]
    assert rows["loss at uniform's compute"] == ["4.500", "4.795"]
    assert rows["steps to uniform's loss"] == ["40", "38"]
    assert rows["compute, uniform = 1"] == ["1.00", "1.10"]
    assert rows["share of prose*"] == ["50 %", "75 %"]
    assert rows["trust at the end"] == ["-", "0.90"]
    assert rows["teaching, s"] == ["-", "0.8 (10 %)"]
    assert (rows["meta-updates"], rows["degenerate"]) == (["-", "9"], ["-", "1"])
    assert rows["acknowledged"] == ["-", "187 of 189"]
    assert rows["steps without an answer"] == ["-", "1"]


def test_four_runs_fit_into_80_columns():
    labels = ("select", "uniform", "weight-scratch", "select-scratch")
    text, rows = _shown({label: _summary(label, 4.0 + i / 10) for i, label in enumerate(labels)}, "select")
    assert "…" not in text
    for label in labels:
        assert label in text
    assert rows["test loss"] == ["4.100", "4.200", "4.300", "4.000"]
    assert rows["waiting for scores, s"] == ["-", "-", "0.3", "0.3"]
    assert all(len(values) == 4 for values in rows.values())
    assert not any(not name for name in rows)  # no row takes two lines


def test_many_runs_are_rows_and_fit_into_80_columns_the_best_one_first():
    labels = ("select", "uniform", "dsir", "rho", "similarity-weight", "alignment", "oracle")
    runs = {label: _summary(label, 4.0 + i / 10) for i, label in enumerate(labels)}
    text, rows = _shown(runs, "oracle")
    assert "7 runs, of which oracle is the main one; seed 0" in text
    assert "…" not in text
    assert [name for name in rows if name] == list(labels)
    assert rows["uniform"][:3] == ["4.100", "4.100", "40"]
    assert rows["oracle"][:3] == ["4.600", "4.600", "never"]
    assert rows["select"][1:] == ["5.000", "39", "1.20", "0.90", "1"]


def test_rows_that_say_nothing_are_left_out():
    _, rows = _shown({"dsir": _summary("dsir", 4.0)}, "dsir")
    assert "test loss" in rows
    assert not {"trust at the end", "teaching, s", "meta-updates", "degenerate"} & rows.keys()


def test_plots_are_pictures(tmp_path):
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 3, (30, 8))
    history = SourceHistory(rng.random((30, 8)), sources, sources, ["a", "b", "c", "unused"])
    plot_sources(tmp_path / "weights.png", history, "title")
    selected = SourceHistory(np.ones((30, 8)), sources, rng.integers(0, 3, (30, 40)), ["a", "b", "c"])
    plot_sources(tmp_path / "selected.png", selected, "title", trust=np.linspace(1, 0, 30))
    one = SourceHistory(np.ones((1, 8)), np.zeros((1, 8), int), np.zeros((1, 8), int), ["a"])
    plot_sources(tmp_path / "one.png", one, "one step")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 1000
