"""`python -m trainer_client.run` on small files: what it leaves, and how it answers mistakes."""

from __future__ import annotations

import json
import shutil
import socket
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_job import (
    BATCH,
    CANDIDATES,
    STEPS,
    WARM_UP,
    WORDS,
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

from trainer_client import connect
from trainer_client.profile import main as make_profile_file
from trainer_client.run.__main__ import main
from trainer_client.run.data import CandidateOrder
from trainer_client.run.metrics import read_metrics
from trainer_client.run.tokenizer import load_tokenizer, train_tokenizer
from trainer_client.select.choice import evenly_in_warm_up
from weighting_contract.reference import check_reference, reference_files
from weighting_contract.spec import FeatureSpec, WeighterSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


# ---- What a job leaves ----------------------------------------------------------------------------------------------


def test_the_summary_has_all_runs(finished):
    summary = read(finished / "summary.json")
    runs = {"both": summary, **summary["compare"]}
    assert {label: (run["label"], run["method"], run["mode"]) for label, run in runs.items()} == {
        "both": ("both", "dwm", "both"),
        "uniform": ("uniform", "uniform", ""),
        "dsir": ("dsir", "dsir", ""),
        "weight": ("weight", "dwm", "weight"),
        "weight-scratch": ("weight-scratch", "dwm", "weight"),
    }
    for run in runs.values():
        assert (run["seed"], run["steps"], run["tokens_seen"]) == (0, STEPS, STEPS * BATCH * 16)
        assert np.isfinite([run["val_loss"], run["test_loss"]]).all()
        assert run["wall_seconds"] > run["train_seconds"] > run["score_seconds"] + run["meta_seconds"]
        assert run["fallback_steps"] == 0
        assert set(run["shares_by_source"]) == set(WORDS)
        assert sum(run["shares_by_source"].values()) == pytest.approx(1)
    assert runs["uniform"]["weights_by_source"] == dict.fromkeys(WORDS, 1.0)
    assert runs["dsir"]["shares_by_source"]["prose"] > 0.9
    assert {label: run["candidates"] for label, run in runs.items() if run["candidates"] > 1} == {"both": 3, "dsir": 3}
    assert "steps_to_uniform_loss" in summary


def test_each_run_has_a_weighter_of_its_own(finished):
    summary = read(finished / "summary.json")
    runs = {"both": summary, **summary["compare"]}
    names = {label: run["weighter"]["name"] for label, run in runs.items() if run["weighter"]}
    assert names == {"both": "default", "weight": "default-weight", "weight-scratch": "default-weight-scratch"}
    assert summary["weighter"]["inner"]["name"] == "default-inner"
    for run in (runs["both"], runs["both"]["weighter"]["inner"], runs["weight"], runs["weight-scratch"]):
        weighter = run.get("weighter", run)
        assert weighter["version"] == weighter["applied_updates"] == STEPS // 4
    assert {label: run["meta_updates"] for label, run in runs.items() if run["meta_updates"]} == dict.fromkeys(
        names, STEPS // 4
    )


def test_the_summary_counts_compute_and_names_the_reference(finished):
    summary = read(finished / "summary.json")
    uniform, compute = summary["compare"]["uniform"]["compute"], summary["compute"]
    assert uniform["relative"] == 1
    assert compute["training_flops"] == uniform["training_flops"]
    parameters = summary["reference"]["parameters"]
    pool = read(finished / "samples.json")["train"]["samples"]
    computed = sum(record.computed for record in selected(finished, "both"))
    order = CandidateOrder(range(pool), BATCH, CANDIDATES, seed=0)
    assert computed == len(order.drawn(STEPS))  # each sample once
    assert (parameters, compute["scoring_flops"], compute["reference_flops"]) == (0, 0, 0)  # it is counted
    spent = sum(compute[f"{name}_flops"] for name in ("training", "teaching", "scoring"))
    assert compute["relative"] == pytest.approx(spent / compute["training_flops"])
    info = check_reference(reference_files(finished / "reference"), "here")
    assert summary["reference"]["checksum"] == info.checksum
    assert summary["reference"]["name"] == f"run-{info.checksum[:16]}"
    assert info.tokenizer_checksum == load_tokenizer(finished / "tokenizer.json").checksum


def test_metrics_have_one_line_a_step_and_weights_of_mean_1(finished):
    lines = read_metrics(finished / "weight-scratch" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "test_loss" in line] == [6, 12, 18, 24]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(lines))
    for record, line in zip(weighed(finished, "weight-scratch"), lines, strict=True):
        assert record.weights.mean() == pytest.approx(1, abs=1e-5)
        assert line["effective_sample_size"] == pytest.approx(BATCH**2 / (record.weights**2).sum(), rel=1e-4)


def test_metrics_of_selection_say_what_was_kept_and_how_stale_its_scores_were(finished):
    lines = read_metrics(finished / "both" / "metrics.jsonl")
    records = selected(finished, "both")
    for line, record in zip(lines, records, strict=True):
        assert sorted(set(record.kept)) == sorted(record.kept)  # without repeats
        assert record.kept.max() < CANDIDATES * BATCH
        assert sum(line["trained_share"].values()) == pytest.approx(1)
        assert (line["selected"], line["position"], line["trust"]) == (1, record.position, record.trust)
        assert record.probes == max(2 if record.step % 4 == 0 else 0, evenly_in_warm_up(record.step, BATCH, WARM_UP))
    # Scored two steps ahead: the two steps after an update were scored before it.
    assert [record.position for record in records] == [(max(0, step - 2) + 3) // 4 for step in range(STEPS)]
    assert [line["staleness"] for line in lines] == [int(step % 4 in (1, 2)) for step in range(STEPS)]


def test_each_score_of_the_trainer_s_losses_sees_the_updates_before_it(finished):
    for label, name in (("weight", "position"), ("weight-scratch", "position"), ("both", "inner_position")):
        positions = [line[name] for line in read_metrics(finished / label / "metrics.jsonl")]
        assert positions == [(step + 3) // 4 for step in range(STEPS)], label


def test_all_runs_begin_with_the_same_model_and_those_as_drawn_with_the_same_batch(finished):
    first = {label: read_metrics(finished / label / "metrics.jsonl")[0] for label in ("weight", "uniform")}
    assert first["weight"]["loss"] == first["uniform"]["loss"]
    assert first["uniform"]["weighted_loss"] == first["uniform"]["loss"]


def test_of_candidates_the_likest_are_kept_once_the_warm_up_is_over(finished):
    lines = read_metrics(finished / "dsir" / "metrics.jsonl")
    prose = [line["trained_share"]["prose"] for line in lines]
    assert max(prose[: WARM_UP - 2]) < 0.9
    assert lines[WARM_UP]["trained_share"] == {"prose": 1.0, "tables": 0.0}
    assert np.mean(prose[WARM_UP:]) > 0.95  # some steps have fewer than a batch of it among their candidates


def test_files_are_there(finished):
    assert (finished / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert any((finished / "weighter-export").glob("*.safetensors"))
    assert any((finished / "weighter-export" / "inner").glob("*.safetensors"))
    for label in ("both", "uniform", "dsir", "weight", "weight-scratch"):
        assert any((finished / label / "tensorboard").glob("events.*"))
        assert not list((finished / label).rglob("*.partial"))


def test_the_table_names_results_and_files(data, tmp_path, capsys):
    assert main([*data, "--steps", "4", "--method", "uniform", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "test loss" in shown
    assert str(tmp_path / "out" / "summary.json") in shown.replace("\n", "")
    assert not (tmp_path / "out" / "reference").exists()  # nobody needed one


# ---- Schedules and failures -----------------------------------------------------------------------------------------


def test_staged_weights_come_from_one_version_a_stage(data, tmp_path):
    out = tmp_path / "out"
    staged = "--mode weight --schedule staged --stages 3 --stage-updates 5".split()
    assert main([*data, *staged, "--out", str(out)]) == 0
    positions = [line["position"] for line in read_metrics(out / "weight" / "metrics.jsonl")]
    assert positions == [0] * 8 + [5] * 8 + [10] * 8


def test_a_degenerate_cotangent_is_counted_and_never_stops_training(data, tmp_path, caplog):
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": " a" * 4000}) + "\n")  # all samples are equal
    out = tmp_path / "out"
    assert main([*data, "--data", str(tmp_path / "same.jsonl"), "--mode", "weight", "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert (summary["meta_updates"], summary["meta_updates_skipped"]) == (0, STEPS // 4)
    assert caplog.text.count("no meta-update") == 1


def test_a_frozen_job_earns_its_trust_and_teaches_nothing(data, finished, tmp_path):
    out = tmp_path / "out"
    assert main([*data, "--role", "frozen", "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert summary["role"] == "frozen"
    assert summary["weighter"]["client"]["updates_acknowledged"] == STEPS // 4
    untaught = tmp_path / "untaught"
    with connect("embedded") as client:
        client.create_weighter("fresh", initial="pretaught")
        client.export_weighter("fresh", untaught)
    pretaught = load_file(untaught / "model.safetensors")
    assert all(torch.equal(tensor, pretaught[name]) for name, tensor in exported_weighter(out).items())
    assert not all(torch.equal(tensor, pretaught[name]) for name, tensor in exported_weighter(finished).items())


def test_without_a_service_every_batch_is_the_first_of_its_candidates(data, tmp_path):
    with socket.socket() as taken:  # bound, never listening: nobody answers here
        taken.bind(("127.0.0.1", 0))
        out, url = tmp_path / "out", f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        assert main([*data, "--weighter", url, "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert summary["fallback_steps"] == STEPS
    assert summary["weighter"]["version"] is None
    assert summary["weighter"]["client"]["unselected"] == STEPS
    assert summary["compute"]["scoring_flops"] == 0
    assert all(record.kept.tolist() == list(range(BATCH)) for record in selected(out, "select"))
    assert {line["selected"] for line in read_metrics(out / "select" / "metrics.jsonl")} == {0}


def test_without_a_service_weights_are_uniform(data, tmp_path, finished):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        out, url = tmp_path / "out", f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        assert main([*data, "--mode", "weight", "--weighter", url, "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert summary["fallback_steps"] == STEPS
    client = summary["weighter"]["client"]
    assert client["updates_sent"] == client["updates_dropped"] == STEPS // 4
    for name, tensor in final(finished, "uniform").items():
        assert torch.equal(final(out, "weight")[name], tensor), name


# ---- References and profiles ----------------------------------------------------------------------------------------


def test_a_reference_that_the_service_has_brings_its_tokenizer(data, finished, tmp_path):
    url, out = f"embedded://{tmp_path / 'state'}", tmp_path / "out"
    files = reference_files(finished / "reference")
    with connect(url) as client:
        client.put_reference("pool", files)
    assert main([*data, "--steps", "4", "--weighter", url, "--reference", "pool", "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert (summary["reference"]["name"], summary["fallback_steps"]) == ("pool", 0)
    assert summary["reference"]["checksum"] == check_reference(files, "here").checksum
    assert (out / "tokenizer.json").read_bytes() == files["tokenizer.json"]


def test_the_packaged_reference_needs_no_training(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main([*data, "--steps", "4", "--reference", "pretaught", "--out", str(out)]) == 0
    assert read(out / "summary.json")["reference"]["name"] == "pretaught"
    assert not (tmp_path / "cache").exists()


def test_a_profile_that_was_made_with_the_tool_is_taken(data, finished, tmp_path):
    val = data[data.index("--val") + 1]
    profile = tmp_path / "p.safetensors"
    making = ["--reference", str(finished / "reference"), "--documents", val, "--out", str(profile)]
    assert make_profile_file(making) == 0
    assert main([*data, "--steps", "4", "--profile", str(profile), "--out", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out" / "summary.json")["fallback_steps"] == 0


def _breaks(name: str, finished: Path, data: list[str]) -> list[str]:
    """Prepares what is wrong, in the working directory; the flags that name it."""
    if name == "truncated reference":
        shutil.copytree(finished / "reference", "r")
        Path("r/counts.safetensors").write_bytes(Path("r/counts.safetensors").read_bytes()[:-9])
        return ["--reference", "r"]
    if name == "empty folder":
        Path("r").mkdir()
        return ["--reference", "r"]
    if name == "another tokenizer":
        train_tokenizer(["something else altogether " * 9], 280).save("t.json")
        return ["--reference", str(finished / "reference"), "--tokenizer", "t.json"]
    val = data[data.index("--test") + 1]
    making = ["--reference", str(finished / "reference"), "--documents", val, "--out", "p.safetensors"]
    assert make_profile_file(making) == 0
    return ["--profile", "p.safetensors"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("truncated reference", "counts.safetensors is truncated or damaged"),
        ("empty folder", "counts.safetensors is missing"),
        ("another tokenizer", "is another tokenizer than that of --reference"),
        ("other documents", "made of other documents than this run's validation set"),
    ],
)
def test_references_and_profiles_that_do_not_fit(data, finished, tmp_path, capsys, monkeypatch, broken, words):
    monkeypatch.chdir(tmp_path)
    flags = _breaks(broken, finished, data)
    capsys.readouterr()
    assert main([*data, *flags, "--out", "out"]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not Path("out").exists()


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
        ("--candidates 0", "--candidates is 0"),
        ("--candidates 200", "fewer than the 200 x 8 candidates of a step"),
        ("--reference missing", "--reference missing is neither a folder nor known to the service"),
        ("--profile missing.safetensors", "there is no file missing.safetensors"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(data, finished, tmp_path, capsys, monkeypatch, flags, words):
    """And they change nothing: no new folder, and an old run stays, whatever --overwrite says."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    before = contents(finished)
    for where in (["--out", "out"], ["--out", str(finished), "--overwrite"]):
        assert main([*data, *where, *flags.split()]) == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1
        assert "Traceback" not in errors
    assert not Path("out").exists()
    assert contents(finished) == before


def test_a_folder_with_a_run_is_refused(data, finished, capsys):
    assert main([*data, "--out", str(finished)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_another_spec_under_the_name_is_a_mistake(data, tmp_path, capsys):
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
    assert read(out / "summary.json")["seed"] == 5


def test_a_run_under_way_keeps_others_out_of_its_folder(data, tmp_path, capsys):
    out = tmp_path / "out"
    process = start([*data, "--steps", "5000", "--out", str(out)])
    when(lambda: count_lines(out / "select" / "metrics.jsonl") >= 1, process)
    assert main([*data, "--out", str(out), "--overwrite"]) == 2
    assert f"is in use by another run (process {process.pid})" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert main([*data, "--out", str(out), "--overwrite", "--steps", "4"]) == 0
