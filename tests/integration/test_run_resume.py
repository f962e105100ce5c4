"""A run that was killed, stopped or lost files goes on bit by bit; a recorded one is repeated without a service."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from small_job import (
    BATCH,
    STEPS,
    WORDS,
    assert_same_run,
    assert_same_tensors,
    contents,
    count_lines,
    exported_weighter,
    final,
    read,
    selected,
    start,
    weighed,
    when,
)

from tests.conftest import Address
from trainer_client.reference.__main__ import main as make_reference
from trainer_client.run.__main__ import main
from trainer_client.run.data import CandidateOrder
from trainer_client.run.metrics import read_metrics
from trainer_client.run.recorder import Record, read_records
from trainer_client.run.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("same_threads_after")


# ---- Killed, stopped, lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "seed"), [("embedded", 0), ("grpc", 2)])
def test_a_run_killed_at_a_random_step_resumes_bit_by_bit(data, finished, service: Address, tmp_path, where, seed):
    """The service, which goes on, has the updates of rolled-back steps already: it learns nothing twice."""
    url = {"embedded": "embedded", "grpc": service.grpc_url}[where]
    step = random.Random(seed).randrange(1, STEPS)
    out = tmp_path / "out"
    process = start([*data, "--mode", "both", "--weighter", url, "--out", str(out)])
    when(lambda: count_lines(out / "both" / "metrics.jsonl") >= step, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, finished)
    about = read(out / "summary.json")["weighter"]
    assert about["applied_updates"] == about["inner"]["applied_updates"] == STEPS // 4
    assert_same_tensors(exported_weighter(out), exported_weighter(finished))


def test_what_the_service_remembers_of_samples_changes_costs_alone(data, tmp_path, monkeypatch):
    """Remembered or computed again, by a run in one piece or one that was killed: bit by bit the same."""
    several = 9  # candidates a place, so that the pool is passed several times
    reference = tmp_path / "reference"
    made = f"--vocab-size 300 --seq-len 16 --batch-size {BATCH} --size pico --steps 2 --threads 1 --out {reference}"
    assert make_reference([*data[:6], *made.split()]) == 0
    flags = [*data, "--mode", "select", "--candidates", str(several), "--reference", str(reference)]

    def out(name: str, samples: int) -> Path:
        monkeypatch.setenv("WEIGHBRIDGE_CACHED_SAMPLES", str(samples))
        return tmp_path / name

    def records(folder: Path) -> list[Record]:
        return read_records(folder / "select" / "selection.record", BATCH, several * BATCH)

    nothing, everything, killed = out("nothing", 0), tmp_path / "everything", tmp_path / "killed"
    assert main([*flags, "--out", str(nothing)]) == 0
    out("everything", 10_000)
    assert main([*flags, "--out", str(everything)]) == 0
    out("killed", 150)
    process = start([*flags, "--out", str(killed)])
    when(lambda: count_lines(killed / "select" / "metrics.jsonl") >= 11, process)
    process.kill()
    process.communicate()
    assert main(["--resume", "--out", str(killed)]) == 0

    for other in (everything, killed):
        assert_same_tensors(final(other, "select"), final(nothing, "select"))
        assert_same_tensors(exported_weighter(other), exported_weighter(nothing))
        for x, y in zip(records(other), records(nothing), strict=True):
            np.testing.assert_array_equal(x.kept, y.kept)
            assert (x.position, x.probes, x.trust, x.taught) == (y.position, y.probes, y.trust, y.taught)
    computed = [sum(record.computed for record in records(folder)) for folder in (nothing, killed, everything)]
    pool = read(nothing / "samples.json")["train"]["samples"]
    order = CandidateOrder(range(pool), BATCH, several, seed=0)
    drawn = sum(len(set(order.indices(step))) for step in range(STEPS))  # a batch may hold a sample of two passes
    assert drawn == computed[0] > computed[1] > computed[2] == pool
    least, most = (read(folder / "summary.json") for folder in (everything, nothing))
    assert least["compute"]["scoring_flops"] == 2 * least["reference"]["parameters"] * pool * 16 > 0
    assert least["compute"]["scoring_flops"] == pytest.approx(most["compute"]["scoring_flops"] * pool / drawn)
    for summary in (least, most):
        spent = sum(summary["compute"][f"{name}_flops"] for name in ("training", "teaching", "scoring"))
        assert summary["spent_curve"][-1] == pytest.approx(spent)
    first, last = least["spent_curve"][0], least["spent_curve"][-1]
    assert first / last > least["test_curve"][0][0] / STEPS  # most is scored early


def test_the_records_alone_make_a_resume_exact(finished, tmp_path):
    out = _without_checkpoints(finished, tmp_path)
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, finished)
    client = read(out / "summary.json")["weighter"]["client"]
    assert client["selected"] == client["updates_sent"] == 0  # nothing was scored, and all was taught before


def test_updates_that_got_lost_are_taught_again_from_the_records(finished, tmp_path):
    out = _without_checkpoints(finished, tmp_path)
    shutil.rmtree(out / "weighters")  # the service has lost everything
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, finished)
    assert read(out / "summary.json")["weighter"]["applied_updates"] == STEPS // 4
    assert_same_tensors(exported_weighter(out), exported_weighter(finished))


def _without_checkpoints(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished job that has its main run's records, and has to go through all of it again."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "both" / "checkpoints")
    (out / "both" / "summary.json").unlink()
    return out


def test_ctrl_c_saves_and_says_how_to_go_on(data, finished, tmp_path):
    out = tmp_path / "out"
    process = start([*data, "--mode", "both", "--out", str(out)])
    when(lambda: count_lines(out / "both" / "metrics.jsonl") >= 4, process)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert f"--resume --out {out}" in shown
    done = count_lines(out / "both" / "metrics.jsonl")
    assert (out / "both" / "checkpoints" / f"checkpoint-{done:08d}.safetensors").exists()
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, finished)


def test_resuming_a_finished_job_changes_nothing(finished):
    before = contents(finished)
    assert main(["--resume", "--out", str(finished)]) == 0
    assert contents(finished) == before


# ---- What can't be resumed ------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_job_is_refused(data, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*data, "--method", "uniform", "--steps", "4", "--out", str(out)]) == 0
    (out / "uniform" / "summary.json").unlink()
    shutil.rmtree(out / "uniform" / "checkpoints")
    shutil.copytree(finished / "uniform" / "checkpoints", out / "uniform" / "checkpoints")
    _refused(["--resume", "--out", str(out)], "is a checkpoint of another job ('run-out-", capsys)


@pytest.mark.parametrize(("flag", "split"), [("--data", "train"), ("--val", "validation"), ("--test", "test")])
def test_data_that_changed_since_are_refused(data, finished, tmp_path, capsys, flag, split):
    """Under their old names: only their contents tell."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    _name_data(out, data, tmp_path)
    assert main(["--resume", "--out", str(out)]) == 0
    with open(tmp_path / Path(data[data.index(flag) + 1]).name, "a") as file:
        file.write(json.dumps({"text": " ".join(WORDS["tables"] * 9)}) + "\n")
    capsys.readouterr()
    _refused(["--resume", "--out", str(out)], f"{flag} gives other {split} samples than the run in {out}", capsys)


def _name_data(out: Path, data: list[str], folder: Path) -> None:
    """Has a run's settings name copies of its data in `folder`."""
    settings = read(out / "config.json")
    for flag, field in (("--data", "data"), ("--val", "val"), ("--test", "test")):
        settings["config"][field] = [shutil.copy(data[data.index(flag) + 1], folder)]
    # The tokenizer is trained on the data: without one of its own the run would have another with other data.
    settings["config"]["tokenizer"] = str(out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(settings))


def _refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1


# ---- Replaying records ----------------------------------------------------------------------------------------------


def _assert_same_training(out: Path, finished: Path, label: str) -> None:
    assert_same_tensors(final(out, label), final(finished, label))
    replayed, recorded = (read_metrics(folder / label / "metrics.jsonl") for folder in (out, finished))
    for line in (*replayed, *recorded):
        line.pop("seconds")
        line.pop("staleness", None)  # of scores: here nothing is scored
        line.pop("cotangent", None)  # here nothing is taught
    assert replayed == recorded


def test_recorded_weights_are_replayed_without_any_service(finished, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.setblocking(False)
        url = f"grpc://127.0.0.1:{service.getsockname()[1]}"
        assert main(["--replay-weights", str(finished), "--weighter", url, "--out", str(out)]) == 0
        with pytest.raises(BlockingIOError):  # nobody has connected
            service.accept()
    _assert_same_training(out, finished, "both")
    summary, original = read(out / "summary.json"), read(finished / "summary.json")
    assert (summary["val_loss"], summary["test_loss"]) == (original["val_loss"], original["test_loss"])
    assert summary["shares_by_source"] == original["shares_by_source"]
    assert (summary["replayed_from"], summary["weighter"]) == (str(finished), None)
    assert summary["compute"]["relative"] == 1
    assert not (out / "weighters").exists()
    # Its own records are as good as those that it was given.
    for records in (selected, weighed):
        for x, y in zip(records(out, "both"), records(finished, "both"), strict=True):
            np.testing.assert_array_equal(x.kept, y.kept)
            np.testing.assert_array_equal(x.weights, y.weights)
    assert main(["--replay-weights", str(out), "--steps", "4", "--out", str(again)]) == 0
    first, steps = (read_metrics(folder / "both" / "metrics.jsonl") for folder in (again, finished))
    assert [line["loss"] for line in first] == [line["loss"] for line in steps[:4]]


def test_a_replay_that_was_stopped_goes_on_without_the_earlier_run(finished, tmp_path):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    shutil.copytree(finished, earlier)
    assert main(["--replay-weights", str(earlier), "--mode", "weight", "--out", str(out)]) == 0
    _assert_same_training(out, finished, "weight")  # that was compared with the main one
    (out / "weight" / "summary.json").unlink()
    shutil.rmtree(out / "weight" / "checkpoints")
    shutil.rmtree(earlier)
    assert main(["--resume", "--out", str(out)]) == 0
    _assert_same_training(out, finished, "weight")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch-size 4", f"--batch-size is 4, but the records of the run in {{run}} are of {BATCH}"),
        ("--seed 5", "--seed is 5, but the records of the run in {run} are of 0"),
        ("--seq-len 8", "--seq-len is 8, but the records"),
        ("--candidates 4", "--candidates is 4, but the records"),
        ("--data other.jsonl", "--data gives other train samples than the run in {run} was made of"),
        ("--tokenizer other.json", "--data gives other train samples than the run in {run} was made of"),
        ("--steps 99", f"selection.record ends too early: it has no record of step {STEPS + 1}, but --steps is 99"),
        ("--mode select", "has no records of a run called select"),
        ("--replay-weights nowhere", "nowhere holds no run to replay"),
        ("--out {run}", "whose records --replay-weights replays"),
    ],
)
def test_what_can_not_be_replayed(finished, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    text = "something else altogether " * 99
    Path("other.jsonl").write_text(json.dumps({"text": text}) + "\n")
    train_tokenizer([text], 280).save("other.json")
    given = ["--replay-weights", str(finished), "--out", "out", *flags.format(run=finished).split()]
    _refused(given, words.format(run=finished), capsys)
    assert not Path("out").exists()
