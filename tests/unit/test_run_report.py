"""Summaries, the moment when a curve reaches a loss, means by source, and the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from trainer_client.run.plot import plot_weights, smoothed_mean
from trainer_client.run.report import (
    Reached,
    RunSummary,
    first_reached,
    job_summary,
    mean_effective_size,
    table,
    weights_by_source,
    write_json,
)
from weighting_contract.errors import InvalidArgument

WEIGHTER = {
    "name": "default",
    "version": 7,
    "applied_updates": 7,
    "client": {"updates_sent": 9, "updates_acknowledged": 7, "updates_dropped": 2},
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


def test_weights_by_source_are_of_the_last_quarter():
    weights = np.ones((8, 4), np.float32)
    weights[6:] = [[2, 2, 0, 0], [1, 3, 0, 0]]
    sources = np.tile(np.array([0, 1, 2, 2]), (8, 1))
    means = weights_by_source(weights, sources, ["a", "b", "c", "never drawn"])
    assert means == {"a": 1.5, "b": 2.5, "c": 0.0}
    assert mean_effective_size(weights) == pytest.approx((2.0 + 1.6) / 2)


def test_smoothed_mean_against_a_loop():
    rng = np.random.default_rng(0)
    values, chosen, window = rng.random((12, 5)), rng.random((12, 5)) < 0.4, 3
    chosen[:4] = False
    expected = []
    for s in range(12):
        span = slice(max(0, s - window + 1), s + 1)
        picked = values[span][chosen[span]]
        expected.append(picked.mean() if picked.size else np.nan)
    np.testing.assert_allclose(smoothed_mean(values, chosen, window), expected)


def _summary(method: str, loss: float) -> RunSummary:
    return RunSummary(
        method=method,
        seed=0,
        steps=40,
        tokens_seen=40 * 2048,
        val_loss=loss + 0.1,
        test_loss=loss,
        wall_seconds=10.0,
        train_seconds=8.0,
        score_seconds=0.4,
        meta_seconds=0.8,
        fallback_steps=1,
        meta_updates=9,
        meta_updates_skipped=1,
        effective_sample_size=14.2,
        weights_by_source={"prose": 1.5, "noise": 0.5} if method == "dwm" else {"prose": 1.0, "noise": 1.0},
        weighter=WEIGHTER if method == "dwm" else None,
        test_curve=[(step, seconds, x + loss - 4.0) for step, seconds, x in CURVE],
    )


def test_summaries_round_trip(tmp_path):
    summary = _summary("dwm", 4.3)
    summary.write(tmp_path / "s.json")
    assert RunSummary.read(tmp_path / "s.json") == summary
    write_json(tmp_path / "s.json", {"method": "dwm"})
    with pytest.raises(InvalidArgument, match="not the summary of a run"):
        RunSummary.read(tmp_path / "s.json")


def test_job_summary_has_the_method_on_top_and_the_other_beside_it():
    runs = {"dwm": _summary("dwm", 4.25), "uniform": _summary("uniform", 4.5)}
    summary = json.loads(json.dumps(job_summary(runs, "dwm")))
    assert (summary["method"], summary["compare"]["uniform"]["method"]) == ("dwm", "uniform")
    assert summary["steps_to_uniform_loss"] == pytest.approx(30 + 10 * (5.75 - 4.5) / 1.5)
    assert summary["seconds_to_uniform_loss"] == pytest.approx(4 + 2 * (5.75 - 4.5) / 1.5)
    assert job_summary(dict(reversed(runs.items())), "uniform")["compare"].keys() == {"dwm"}
    assert "compare" not in job_summary({"dwm": runs["dwm"]}, "dwm")


def test_a_run_that_stays_above_uniform_never_reaches_it():
    runs = {"dwm": _summary("dwm", 4.6), "uniform": _summary("uniform", 4.5)}
    summary = job_summary(runs, "dwm")
    assert summary["steps_to_uniform_loss"] is None
    assert summary["seconds_to_uniform_loss"] is None


def test_table_shows_both_runs():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table({"dwm": _summary("dwm", 4.25), "uniform": _summary("uniform", 4.5)}, "dwm"))
    text = console.export_text()
    assert "uniform against dwm" in text
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    rows = {name: values for _, name, *values, _ in cells}
    assert rows["test loss"] == ["4.500", "4.250"]
    assert rows["steps to the uniform run's final loss"] == ["40", "38"]
    assert rows["mean weight of prose*"] == ["1.00", "1.50"]
    assert rows["teaching, s"] == ["-", "0.8 (10 %)"]
    assert rows["meta-updates (degenerate)"] == ["-", "9 (1)"]
    assert rows["acknowledged of sent since the last start"] == ["-", "7 of 9"]


def test_plot_is_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.random((30, 8)).astype(np.float32)
    plot_weights(tmp_path / "w.png", weights, rng.integers(0, 3, (30, 8)), ["a", "b", "c", "unused"], "title")
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    plot_weights(tmp_path / "one.png", weights[:1], np.zeros((1, 8), np.int64), ["a"], "one step")
    assert (tmp_path / "one.png").stat().st_size > 1000
