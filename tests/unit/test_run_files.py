"""Metrics lines, progress lines and the --out folder."""

from __future__ import annotations

import io
import json
import os

import pytest
from rich.console import Console

from trainer_client.run.config import RunConfig
from trainer_client.run.metrics import Metrics, read_metrics
from trainer_client.run.progress import JobProgress
from trainer_client.run.workspace import Workspace, check_workspace, open_workspace
from weighting_contract.errors import FailedPrecondition, InvalidArgument


def _line(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 5.0 / step, "seconds": float(step), "mean_weight": {"prose": 1.2}, **more}


def test_metrics_of_replayed_steps_are_not_written_twice(tmp_path):
    path = tmp_path / "m.jsonl"
    with Metrics(path, tmp_path / "events", 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(_line(step, val_loss=None))
    with open(path, "a") as f:
        f.write('{"step": 4, "lo')  # a kill in the middle of a line
    with Metrics(path, tmp_path / "events", 1) as metrics:
        assert (metrics.last_step, metrics.last_seconds) == (3, 3.0)
        for step in (2, 3, 4, 5):
            metrics.write(_line(step))
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0] == {"step": 1, "loss": 5.0, "seconds": 1.0, "mean_weight": {"prose": 1.2}}


def test_tensorboard_events_are_readable(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path / "m.jsonl", tmp_path / "events", 0) as metrics:
        for step in (1, 2):
            metrics.write(_line(step, test_loss=4.5 if step == 2 else None))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 5.0), (2, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("test_loss")] == [(2, 4.5)]
    assert len(events.Scalars("mean_weight/prose")) == 2


def test_without_a_terminal_evaluations_are_plain_lines():
    output = io.StringIO()
    with JobProgress(Console(file=output, width=120), total_steps=20, batch_size=32) as progress:
        progress.start("select", 10, 0)
        for step in range(1, 5):
            evaluated = {"val_loss": 4.321} if step % 2 == 0 else {}
            progress.update({"step": step, "loss": 5.0, "effective_sample_size": 14.25, **evaluated})
    lines = output.getvalue().splitlines()
    assert lines == [
        "select: step 2 (12 of 20)  loss 5.000  val 4.321  ess 14.2/32",
        "select: step 4 (14 of 20)  loss 5.000  val 4.321  ess 14.2/32",
    ]


def test_in_a_terminal_a_bar_shows_the_step_s_numbers():
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True)
    with JobProgress(console, total_steps=20, batch_size=32) as progress:
        progress.start("select", 10, 0)
        progress.update({"step": 4, "loss": 5.125, "effective_sample_size": 14.25, "val_loss": 4.321})
    shown = output.getvalue()
    for text in ("select", "14/20", "5.125", "4.321", "14.2/32", "left"):
        assert text in shown


def _opened(config: RunConfig) -> Workspace:
    with open_workspace(config) as workspace:
        return workspace


def test_a_folder_with_a_run_is_refused_continued_or_replaced(tmp_path):
    out = tmp_path / "my run"
    first = _opened(RunConfig(out=str(out)))
    (out / "select").mkdir()
    (out / "dwm").mkdir()  # of an earlier version
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FailedPrecondition, match=r"already holds a run: add --resume .* --overwrite"):
        _opened(RunConfig(out=str(out)))
    assert _opened(RunConfig(out=str(out), resume=True)).job_id == first.job_id
    assert (out / "select").exists()
    replaced = _opened(RunConfig(out=str(out), overwrite=True, seed=4))
    assert replaced.job_id != first.job_id
    assert sorted(p.name for p in out.iterdir()) == [".lock", "config.json", "notes.txt"]
    assert json.loads((out / "config.json").read_text())["config"]["seed"] == 4


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InvalidArgument, match="is a file"):
        check_workspace(RunConfig(out=str(tmp_path / "f")))


def test_checking_changes_nothing(tmp_path):
    check_workspace(RunConfig(out=str(tmp_path / "new")))
    assert list(tmp_path.iterdir()) == []
    _opened(RunConfig(out=str(tmp_path / "old")))
    before = (tmp_path / "old" / "config.json").read_bytes()
    check_workspace(RunConfig(out=str(tmp_path / "old"), overwrite=True, seed=4))
    assert (tmp_path / "old" / "config.json").read_bytes() == before


def test_results_of_somebody_else_are_not_removed(tmp_path):
    (tmp_path / "summary.json").write_text("mine")
    _opened(RunConfig(out=str(tmp_path), overwrite=True))
    assert (tmp_path / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path, flags):
    with open_workspace(RunConfig(out=str(tmp_path))) as workspace:
        before = (tmp_path / "config.json").read_bytes()
        message = rf"--out .* is in use by another run \(process {os.getpid()}\)"
        with pytest.raises(FailedPrecondition, match=message):
            check_workspace(RunConfig(out=str(tmp_path), **flags))
        with pytest.raises(FailedPrecondition, match=message):
            _opened(RunConfig(out=str(tmp_path), **flags))
        assert (tmp_path / "config.json").read_bytes() == before
    assert _opened(RunConfig(out=str(tmp_path), resume=True)).job_id == workspace.job_id


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not the settings"), ("[]", "not the settings"), ('{"job_id": 3}', "job_id is 3")]
)
def test_a_damaged_job_id_is_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument, match=words):
        check_workspace(RunConfig(out=str(tmp_path), resume=True))
