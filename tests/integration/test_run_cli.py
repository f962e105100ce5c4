"""`python -m trainer_client.run` on small files: what it leaves, how it resumes, and how it answers mistakes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer_client.run.__main__ import main
from trainer_client.run.metrics import read_metrics
from trainer_client.run.recorder import read_records

BATCH, STEPS = 8, 24
WORDS = {
    "prose": "the weights of a batch say how much each sample counts when the loss of the model is taken".split(),
    "tables": [str(n) for n in range(100, 140)],
}


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small job: two sources to train on, the target is one of them."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def document(source: str) -> str:
        return json.dumps({"text": " ".join(rng.choices(WORDS[source], k=120)), "source": source}) + "\n"

    (folder / "train.jsonl").write_text("".join(document(s) for _ in range(30) for s in WORDS))
    (folder / "val.jsonl").write_text("".join(document("prose") for _ in range(6)))
    (folder / "test.jsonl").write_text("".join(document("prose") for _ in range(6)))
    files = {"--data": "train.jsonl", "--val": "val.jsonl", "--test": "test.jsonl"}
    flags = [item for flag, name in files.items() for item in (flag, str(folder / name))]
    small = f"--vocab-size 300 --seq-len 16 --batch-size {BATCH} --steps {STEPS} --meta-batch 4 --val-batch 4"
    return [*flags, *small.split(), *"--warmup-steps 2 --eval-every 6 --checkpoint-every 7 --threads 1".split()]


@pytest.fixture(scope="session")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted job: dwm compared with uniform."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main([*data, "--compare", "uniform", "--out", str(out)]) == 0
    return out


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _final(out: Path, method: str = "dwm") -> dict[str, torch.Tensor]:
    return load_file(out / method / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors")


def _assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimiser, weights and metrics of two runs are the same, bit by bit; only times differ."""
    first, second = _final(a), _final(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for x, y in zip(*(read_records(out / "dwm" / "weights.record", BATCH) for out in (a, b)), strict=True):
        assert (x.step, x.position, x.fallback) == (y.step, y.position, y.fallback)
        np.testing.assert_array_equal(x.weights, y.weights)
    lines = [[{**line, "seconds": 0} for line in read_metrics(out / "dwm" / "metrics.jsonl")] for out in (a, b)]
    assert lines[0] == lines[1]


# ---- What a job leaves ----------------------------------------------------------------------------------------------


def test_summary_has_both_runs(finished):
    summary = _read(finished / "summary.json")
    uniform = summary["compare"]["uniform"]
    assert (summary["method"], uniform["method"]) == ("dwm", "uniform")
    for run in (summary, uniform):
        assert (run["seed"], run["steps"], run["tokens_seen"]) == (0, STEPS, STEPS * BATCH * 16)
        assert np.isfinite([run["val_loss"], run["test_loss"]]).all()
        assert run["wall_seconds"] > run["train_seconds"] > run["score_seconds"] + run["meta_seconds"]
        assert run["fallback_steps"] == 0
    assert set(summary["weights_by_source"]) == set(WORDS)
    assert uniform["weights_by_source"] == dict.fromkeys(WORDS, 1.0)
    assert uniform["weighter"] is None
    assert summary["weighter"]["name"] == "default"
    assert summary["meta_updates"] == STEPS // 4
    assert summary["weighter"]["version"] == summary["weighter"]["applied_updates"] == STEPS // 4
    assert "steps_to_uniform_loss" in summary


def test_metrics_have_one_line_a_step_and_weights_of_mean_1(finished):
    lines = read_metrics(finished / "dwm" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "test_loss" in line] == [6, 12, 18, 24]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(lines))
    for record, line in zip(read_records(finished / "dwm" / "weights.record", BATCH), lines, strict=True):
        assert record.weights.mean() == pytest.approx(1, abs=1e-5)
        assert line["effective_sample_size"] == pytest.approx(BATCH**2 / (record.weights**2).sum(), rel=1e-4)


def test_each_score_sees_the_updates_before_it(finished):
    positions = [line["position"] for line in read_metrics(finished / "dwm" / "metrics.jsonl")]
    assert positions == [(step + 3) // 4 for step in range(STEPS)]


def test_both_runs_begin_with_the_same_model_and_batch(finished):
    first, second = (read_metrics(finished / method / "metrics.jsonl")[0] for method in ("dwm", "uniform"))
    assert first["loss"] == second["loss"]
    assert second["weighted_loss"] == second["loss"]


def test_files_are_there(finished):
    assert (finished / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert any((finished / "weighter-export").glob("*.safetensors"))
    for method in ("dwm", "uniform"):
        assert any((finished / method / "tensorboard").glob("events.*"))
        assert not list((finished / method).rglob("*.partial"))


def test_the_table_names_results_and_files(data, tmp_path, capsys):
    assert main([*data, "--steps", "4", "--method", "uniform", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "test loss" in shown
    assert str(tmp_path / "out" / "summary.json") in shown.replace("\n", "")


# ---- Resuming -------------------------------------------------------------------------------------------------------


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer_client.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns once the condition holds; fails where the process ends before."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.002)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_resumes_bit_by_bit(data, finished, tmp_path):
    out = tmp_path / "out"
    process = _start([*data, "--out", str(out)])
    _when(lambda: _lines(out / "dwm" / "metrics.jsonl") >= 11, process)  # some steps behind a checkpoint
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert main(["--resume", "--out", str(out)]) == 0
    _assert_same_run(out, finished)
    weighter = _read(out / "summary.json")["weighter"]
    assert weighter["applied_updates"] == STEPS // 4  # replayed meta-updates were duplicates


def test_without_a_checkpoint_the_record_alone_makes_a_resume_exact(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "dwm" / "checkpoints")
    (out / "dwm" / "summary.json").unlink()
    assert main(["--resume", "--out", str(out)]) == 0
    first, second = _final(out), _final(finished)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert _read(out / "summary.json")["weighter"]["client"]["updates_duplicate"] == STEPS // 4


def test_ctrl_c_saves_and_says_how_to_go_on(data, finished, tmp_path):
    out = tmp_path / "out"
    process = _start([*data, "--out", str(out)])
    _when(lambda: _lines(out / "dwm" / "metrics.jsonl") >= 4, process)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert f"--resume --out {out}" in shown
    done = _lines(out / "dwm" / "metrics.jsonl")
    assert (out / "dwm" / "checkpoints" / f"checkpoint-{done:08d}.safetensors").exists()
    assert main(["--resume", "--out", str(out)]) == 0
    _assert_same_run(out, finished)


def test_resuming_a_finished_job_changes_nothing(finished):
    before = _read(finished / "summary.json")
    assert main(["--resume", "--out", str(finished)]) == 0
    assert _read(finished / "summary.json") == before


# ---- Schedules and failures -----------------------------------------------------------------------------------------


def test_staged_weights_come_from_one_version_a_stage(data, tmp_path):
    out = tmp_path / "out"
    staged = "--schedule staged --stages 3 --stage-updates 5".split()
    assert main([*data, *staged, "--out", str(out)]) == 0
    positions = [line["position"] for line in read_metrics(out / "dwm" / "metrics.jsonl")]
    assert positions == [0] * 8 + [5] * 8 + [10] * 8


def test_a_degenerate_cotangent_is_counted_and_never_stops_training(data, tmp_path, caplog):
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": " a" * 4000}) + "\n")  # all samples are equal
    out = tmp_path / "out"
    assert main([*data, "--data", str(tmp_path / "same.jsonl"), "--out", str(out)]) == 0
    summary = _read(out / "summary.json")
    assert (summary["meta_updates"], summary["meta_updates_skipped"]) == (0, STEPS // 4)
    assert caplog.text.count("no meta-update") == 1


def test_without_a_service_the_run_is_uniform(data, tmp_path, finished):
    with socket.socket() as taken:  # bound, never listening: nobody answers here
        taken.bind(("127.0.0.1", 0))
        out, url = tmp_path / "out", f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        assert main([*data, "--weighter", url, "--out", str(out)]) == 0
    summary = _read(out / "summary.json")
    assert summary["fallback_steps"] == STEPS
    assert summary["weighter"]["version"] is None
    client = summary["weighter"]["client"]
    assert client["updates_sent"] == client["updates_dropped"] == STEPS // 4
    for name, tensor in _final(finished, "uniform").items():
        assert torch.equal(_final(out)[name], tensor), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data missing.jsonl", "missing.jsonl"),
        ("--model no-such-size", "no-such-size"),
        ("--device abacus", "--device is 'abacus'"),
        ("--weighter nowhere", "url is 'nowhere'"),
        ("--batch-size 5000 --meta-batch 4", "fewer than one batch of 5000"),
        ("--vocab-size 10", "--vocab-size is 10"),
        ("--test empty.jsonl", "empty.jsonl"),
        ("--weighter-name a/b", "--weighter-name is 'a/b'"),
        ("--tokenizer missing.json", "missing.json"),
        ("--lr -1", "--lr is -1"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(data, finished, tmp_path, capsys, monkeypatch, flags, words):
    """And they change nothing: no new folder, and an old run stays, whatever --overwrite says."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    before = _contents(finished)
    for where in (["--out", "out"], ["--out", str(finished), "--overwrite"]):
        assert main([*data, *where, *flags.split()]) == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1
        assert "Traceback" not in errors
    assert not Path("out").exists()
    assert _contents(finished) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_with_a_run_is_refused(data, finished, capsys):
    assert main([*data, "--out", str(finished)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_another_spec_under_the_name_is_a_mistake(data, tmp_path, capsys):
    from trainer_client import connect
    from weighting_contract.spec import FeatureSpec, WeighterSpec

    url = f"embedded://{tmp_path / 'state'}"
    with connect(url) as client:
        client.create_weighter("default", WeighterSpec(features=FeatureSpec(names=("something",))))
    assert main([*data, "--weighter", url, "--out", str(tmp_path / "out")]) == 2
    assert "default" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_a_run_by_one_on_its_own_tokenizer(data, tmp_path):
    out = tmp_path / "out"
    short = ["--steps", "4", "--method", "uniform", "--out", str(out)]
    assert main([*data, *short]) == 0
    assert main([*data, *short, "--overwrite", "--seed", "5", "--tokenizer", str(out / "tokenizer.json")]) == 0
    assert _read(out / "summary.json")["seed"] == 5


def test_a_run_under_way_keeps_others_out_of_its_folder(data, tmp_path, capsys):
    out = tmp_path / "out"
    process = _start([*data, "--steps", "5000", "--out", str(out)])
    _when(lambda: _lines(out / "dwm" / "metrics.jsonl") >= 1, process)
    assert main([*data, "--out", str(out), "--overwrite"]) == 2
    assert f"is in use by another run (process {process.pid})" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert main([*data, "--out", str(out), "--overwrite", "--steps", "4"]) == 0
