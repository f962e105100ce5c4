"""Curves against naive means, folders that are no runs, and what a page makes of runs that were made by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer_client.report import series
from trainer_client.report.__main__ import main
from trainer_client.report.charts import run_styles
from trainer_client.report.page import page
from trainer_client.report.runs import baseline_of, find_runs

STEPS, WINDOW = 30, 5


def made_lines(steps: int = STEPS, seed: int = 0, names: tuple[str, ...] = ("a", "b")) -> list[dict[str, Any]]:
    """Of a run that prefers the first source more and more, and is taught in every second step."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        drawn = rng.dirichlet(np.full(len(names), 40.0))
        trained = drawn * np.where(np.arange(len(names)) == 0, 1 + step / steps, 0.5)
        trained /= trained.sum()
        pairs = {name: [float(d), float(t)] for name, d, t in zip(names, drawn, trained, strict=True)}
        preference = {"source": pairs, "length": {"64-127": [1.0, 1.0]}, "seen": {"0": [1.0, 1.0]}}
        if step % 3:  # the service did not answer in the others
            preference["loss"] = {f"q{q}": [0.25, 0.1 * q] for q in range(1, 5)}
        line = {"step": step, "seconds": step / 10, "fallback": int(step % 3 == 0), "preference": preference}
        line |= {"effective_sample_size": 32 - step / 2, "position": step // 2, "trust": step / steps}
        if step % 2 == 0:
            line["cotangent"] = {names[0]: -1e-6 * step, names[1]: 2e-6}
        if step % 10 == 0:
            line |= {"test_loss": 5 - step / 10, "val_loss": 4.9 - step / 10}
        lines.append(line)
    return lines


def write_job(job: Path, runs: dict[str, list[dict[str, Any]]], **config: Any) -> Path:
    job.mkdir(parents=True)
    settings = {"seed": 3, "batch_size": 32, "group_by": "source", **config}
    (job / "config.json").write_text(json.dumps({"job_id": "j", "config": settings}))
    for label, lines in runs.items():
        (job / label).mkdir()
        (job / label / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job


# ---- Curves ---------------------------------------------------------------------------------------------------------


def test_relative_weights_are_ratios_of_sums_over_the_last_steps() -> None:
    lines = made_lines()
    curve = series.relative_weight(lines, "source", "a", WINDOW, batch_size=32)
    assert curve.x == list(range(1, STEPS + 1))
    for i, value in enumerate(curve.y):
        last = [line["preference"]["source"]["a"] for line in lines[max(0, i + 1 - WINDOW) : i + 1]]
        assert value == pytest.approx(sum(t for _, t in last) / sum(d for d, _ in last), rel=1e-4)


def test_steps_that_say_nothing_are_left_out_of_sums() -> None:
    curve = series.relative_weight(made_lines(), "loss", "q3", WINDOW, batch_size=32)
    assert curve.y[1:] == pytest.approx([1.2] * (STEPS - 1))


def test_groups_of_which_too_little_was_drawn_have_a_gap() -> None:
    lines = made_lines()
    for line in lines[10:20]:
        line["preference"]["source"] = {"b": [1.0, 1.0]}
    curve = series.relative_weight(lines, "source", "a", WINDOW, batch_size=32)
    assert [i for i, y in enumerate(curve.y) if y is None] == list(range(14, 20))


def test_cotangents_are_means_over_the_taught_steps_of_the_window() -> None:
    lines = made_lines()
    curve = series.cotangent(lines, "a", WINDOW)
    for i, value in enumerate(curve.y):
        last = [-1e-6 * step for step in range(max(1, i + 2 - WINDOW), i + 2) if step % 2 == 0]
        assert (value is None) == (len(last) == 0)
        if value is not None:
            assert value == pytest.approx(np.mean(last), rel=1e-4)


def test_long_runs_have_few_points_and_their_last_one() -> None:
    lines = made_lines(1000)
    curve = series.mean(lines, "trust", 1)
    assert len(curve.x) <= series.POINTS
    assert (curve.x[0], curve.x[-1], curve.y[-1]) == (1, 1000, 1)


def test_groups_are_in_their_order() -> None:
    def runs(by: str, *names: str) -> list[series.Lines]:
        return [[{"preference": {by: {name: [1 / (i + 1), 0.0] for i, name in enumerate(names)}}}]]

    assert series.groups(runs("length", "64-127", "1024 or more", "under 64"), "length") == [
        *("under 64", "64-127", "1024 or more"),
    ]
    assert series.groups(runs("seen", "3+", "0", "2", "1"), "seen") == ["0", "1", "2", "3+"]
    assert series.groups(runs("source", "z", "b", "a"), "source") == ["z", "b", "a"]  # the largest first


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_a_job_s_runs_are_found_the_uniform_one_first(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", {"both": made_lines(), "uniform": made_lines(), "aged": made_lines()})
    assert [run.name for run in find_runs([str(job)])] == ["uniform", "aged", "both"]
    (one,) = find_runs([str(job / "both"), str(job / "both")])  # each once
    assert (one.name, one.steps, one.seed, one.summary) == ("both", STEPS, 3, None)
    assert one.curve("test_loss") == [(10, 1.0, 4.0), (20, 2.0, 3.0), (30, 3.0, 2.0)]


def test_runs_of_several_jobs_are_told_apart_and_compared_within_their_own(tmp_path: Path) -> None:
    one = write_job(tmp_path / "one", {"uniform": made_lines(), "select": made_lines()})
    two = write_job(tmp_path / "two", {"uniform": made_lines(), "select": made_lines()})
    three = write_job(tmp_path / "three", {"select": made_lines()})
    runs = {run.name: run for run in find_runs([str(one), str(two), str(three)])}
    assert list(runs) == ["one/uniform", "one/select", "two/uniform", "two/select", "three/select"]
    baselines = {name: baseline_of(run, list(runs.values())) for name, run in runs.items()}
    assert baselines["two/select"] is runs["two/uniform"]
    assert baselines["three/select"] is runs["one/uniform"]
    again = write_job(tmp_path / "elsewhere" / "one", {"select": made_lines()})
    names = [run.name for run in find_runs([str(one / "select"), str(again)])]
    assert names == [f"{one}/select", f"{again}/select"]


def _older(folder: Path) -> str:
    lines = [{key: value for key, value in line.items() if key != "preference"} for line in made_lines()]
    return str(write_job(folder / "job", {"select": lines}))


def _without_config(folder: Path) -> str:
    job = write_job(folder / "job", {"select": made_lines()})
    (job / "config.json").unlink()
    return str(job / "select")


def _damaged(folder: Path) -> str:
    job = write_job(folder / "job", {"select": made_lines()})
    (job / "select" / "summary.json").write_text('{"label": "select"}')
    return str(job)


def _empty(folder: Path) -> str:
    (folder / "job").mkdir()
    return str(folder / "job")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: str(folder / "absent"), "there is no folder .*absent: name the --out folder of a job"),
        (_empty, r"job holds no run that has begun to train \(no metrics.jsonl\)"),
        (lambda folder: str(write_job(folder / "job", {"select": []})), "job/select has no steps yet"),
        (_older, "job/select is a run of an earlier version, which did not record what it preferred"),
        (_without_config, r"job/select is no run that can be read, as .*config.json can't be read"),
        (_damaged, "summary.json is not the summary of a run"),
    ],
)
def test_what_is_no_run_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Any, said: str
) -> None:
    out = tmp_path / "report.html"
    assert main([made(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"trainer_client.report: .*{said}", error), error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_out_that_can_t_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path / "job", {"select": made_lines()})
    assert main([str(job), "--out", str(tmp_path)]) == 2
    assert "is a folder: name a file to write" in capsys.readouterr().err
    assert main([str(job), "--out", str(tmp_path / "no" / "report.html")]) == 2
    assert "which is no folder" in capsys.readouterr().err


def test_without_plotly_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)  # as if it were not installed
    assert main([str(tmp_path)]) == 2
    assert (
        "needs the package plotly, which is not installed: pip install 'weighbridge[report]'" in capsys.readouterr().err
    )


def test_reading_runs_needs_no_torch(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", {"select": made_lines()})
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from trainer_client.report.__main__ import main\n"
        f"sys.exit(main([{str(job)!r}, '--out', {str(tmp_path / 'report.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").stat().st_size > 1e6


# ---- The page -------------------------------------------------------------------------------------------------------


def test_names_from_the_data_are_text_on_the_page(tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'taken'</script>"
    job = write_job(tmp_path / "job", {"select": made_lines(names=(evil, "b"))}, group_by="<i>topic")
    shown = page(find_runs([str(job)]))
    assert evil not in shown
    assert "<i>topic" not in shown
    assert "&lt;/script&gt;&lt;script&gt;document.title = &#x27;taken&#x27;" in shown  # in the legend
    assert "Share by &lt;i&gt;topic" in shown


def test_a_run_that_is_not_finished_has_what_it_has(tmp_path: Path) -> None:
    shown = page(find_runs([str(write_job(tmp_path / "job", {"select": made_lines()}))]))
    assert "30, not finished" in shown
    assert "2.000 so far" in shown
    assert "Test loss over steps" in shown
    assert "Test loss over compute" not in shown  # what it takes is known at the end


def test_runs_have_styles_of_their_own_beyond_the_colours(tmp_path: Path) -> None:
    runs = {f"run{n}": made_lines(3) for n in range(9)} | {"uniform": made_lines(3)}
    styles = run_styles(find_runs([str(write_job(tmp_path / "job", runs))]))
    assert len(set(styles.values())) == 10
    assert sum(style.dash == "solid" for style in styles.values()) == 7
