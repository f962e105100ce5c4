"""`python -m trainer_client.run --weighter-from FOLDER`: a run starts from another one's weighter."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from small_job import (
    assert_same_tensors,
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
from trainer_client import connect
from trainer_client.run.__main__ import main
from trainer_client.run.metrics import read_metrics
from trainer_client.run.tokenizer import load_tokenizer
from weighting_contract.export import check_export, export_files
from weighting_contract.spec import FeatureSpec, HeadSpec, WeighterSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


def export_of(spec: WeighterSpec, folder: Path) -> Path:
    with connect("embedded") as client:
        client.create_weighter("made", spec)
        return client.export_weighter("made", folder)


@pytest.fixture(scope="module")
def continued(data, finished, tmp_path_factory) -> Path:
    """An uninterrupted run that selects by the weighter that another run has taught."""
    out = tmp_path_factory.mktemp("continued") / "out"
    given = ["--weighter-from", str(finished / "weighter-export")]
    assert main([*data, *given, "--compare", "select", "--out", str(out)]) == 0
    return out


def test_a_run_goes_on_with_the_weighter_of_another(finished, continued):
    summary = read(continued / "summary.json")
    assert (summary["label"], summary["weighter_from"]) == ("select-export", str(finished / "weighter-export"))
    begun = check_export(export_files(finished / "weighter-export"), "it")
    assert summary["weighter"]["initial"] == begun.initial
    assert summary["weighter"]["applied_updates"] == summary["meta_updates"] > 0
    assert summary["compare"]["select"]["weighter"]["initial"] == "pretaught"
    assert export_files(continued / "weighter-start") == export_files(finished / "weighter-export")
    moved = exported_weighter(continued)
    assert not all(torch.equal(tensor, moved[name]) for name, tensor in exported_weighter(finished).items())
    assert f"It started from {begun.initial}." in (continued / "weighter-export" / "README.md").read_text()


@pytest.mark.parametrize("where", ["embedded", "grpc"])
def test_killed_and_resumed_it_is_the_same_run(data, finished, continued, service: Address, tmp_path, where):
    """The folder that it was given is not there any more: the run goes on with its own copy."""
    given = tmp_path / "given"
    shutil.copytree(finished / "weighter-export", given)
    url = {"embedded": "embedded", "grpc": service.grpc_url}[where]
    out = tmp_path / "out"
    process = start([*data, "--weighter-from", str(given), "--weighter", url, "--out", str(out)])
    when(lambda: count_lines(out / "select-export" / "metrics.jsonl") >= 11, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    shutil.rmtree(given)
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_tensors(final(out, "select-export"), final(continued, "select-export"))
    assert_same_tensors(exported_weighter(out), exported_weighter(continued))
    for ours, theirs in zip(*(selected(folder, "select-export") for folder in (out, continued)), strict=True):
        assert (ours.kept.tolist(), ours.position) == (theirs.kept.tolist(), theirs.position)
    updates = [read(folder / "summary.json")["weighter"]["applied_updates"] for folder in (out, continued)]
    assert updates[0] == updates[1]


def test_what_it_had_trained_with_is_replayed_without_the_export(continued, tmp_path):
    out = tmp_path / "out"
    assert main(["--replay-weights", str(continued), "--out", str(out)]) == 0
    assert_same_tensors(final(out, "select-export"), final(continued, "select-export"))


@pytest.mark.parametrize("inner", [False, True])
def test_weights_inside_a_batch_are_by_the_columns_that_the_export_reads(data, finished, tmp_path, inner):
    """The inner weighter of `both` reads the trainer's statistics alone, the outer one those against the target too."""
    folder, out = finished / "weighter-export", tmp_path / "out"
    folder = folder / "inner" if inner else folder
    assert main([*data, "--mode", "weight", "--weighter-from", str(folder), "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert (summary["label"], summary["fallback_steps"]) == ("weight-export", 0)
    assert summary["weighter"]["initial"] == check_export(export_files(folder), "it").initial
    assert weighed(out, "weight-export")[0].weights.std() > 0, "a fresh weighter weighs the first batch evenly"
    assert all(
        line["effective_sample_size"] >= 0.4 * 8 - 1e-3
        for line in read_metrics(out / "weight-export" / "metrics.jsonl")
    )


def test_candidates_are_scored_by_the_columns_that_the_export_reads(data, finished, tmp_path):
    """Fewer, and in another order than those of a fresh weighter."""
    names = ("gain_mean", "loss_std", "ngram_log_ratio")
    folder = export_of(WeighterSpec(features=FeatureSpec(names=names), head=HeadSpec(width=8)), tmp_path / "export")
    out = tmp_path / "out"
    assert main([*data, "--weighter-from", str(folder), "--out", str(out)]) == 0
    summary = read(out / "summary.json")
    assert (summary["fallback_steps"], summary["weighter"]["applied_updates"]) == (0, summary["meta_updates"])
    spec = check_export(export_files(out / "weighter-export"), "it").spec
    assert spec.features.names == names


def test_the_weighter_of_a_run_may_replace_that_run(data, finished, tmp_path):
    out = tmp_path / "out"
    assert main([*data, "--mode", "weight", "--weighter-from", "none", "--steps", "6", "--out", str(out)]) == 0
    taught = export_files(out / "weighter-export")
    again = [*data, "--mode", "weight", "--weighter-from", str(out / "weighter-export"), "--steps", "6"]
    assert main([*again, "--overwrite", "--out", str(out)]) == 0
    assert export_files(out / "weighter-start") == taught
    assert not (out / "weight-scratch").exists()


def test_a_plan_names_the_beginning_and_writes_nothing(data, finished, tmp_path, capsys):
    folder, out = finished / "weighter-export", tmp_path / "out"
    assert main([*data, "--weighter-from", str(folder), "--dry-run", "--out", str(out)]) == 0
    assert f"from {folder} where it is new" in capsys.readouterr().out
    assert not out.exists()


# ---- Refused --------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys, *words: str) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_what_is_no_export_is_refused_before_anything_is_written(data, finished, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "given"
    base = [*data, "--out", str(out)]
    refused([*base, "--weighter-from", "pretought"], capsys, "--weighter-from is pretought, neither pretaught nor none")
    shutil.copytree(finished / "weighter-export", folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    refused([*base, "--weighter-from", str(folder)], capsys, f"{folder}: model.safetensors", "truncated or changed")
    (folder / "config.json").unlink()
    refused([*base, "--weighter-from", str(folder)], capsys, f"{folder}: config.json is missing")
    refused([*base, "--weighter-from", ""], capsys, "--weighter-from is empty")
    assert not out.exists()


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (
            FeatureSpec(names=("loss_z",), hidden_size=64),
            ["a pooled hidden state of 64", "does not travel between model"],
        ),
        (FeatureSpec(names=("loss_z", "perplexity")), ["'perplexity' (spec.features.names)", "a run gives loss_z, "]),
        (
            FeatureSpec(names=("loss_z",), tokenizer_checksum="a" * 64),
            ["the tokenizer aaaaaaaaaaaa...", "this run's has"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["select", "weight"])
def test_a_weighter_that_does_not_fit_the_run_is_refused(data, tmp_path, capsys, mode, features, words):
    folder = export_of(WeighterSpec(features=features, head=HeadSpec(width=8)), tmp_path / "export")
    out = tmp_path / "out"
    refused([*data, "--mode", mode, "--weighter-from", str(folder), "--out", str(out)], capsys, *words)
    assert not out.exists()


def test_a_weighter_of_the_name_that_began_otherwise_is_refused(data, finished, service: Address, tmp_path, capsys):
    with connect(service.grpc_url) as client:
        client.create_weighter("default", initial="pretaught")
    out = tmp_path / "out"
    given = ["--weighter-from", str(finished / "weighter-export"), "--weighter", service.grpc_url]
    refused([*data, *given, "--out", str(out)], capsys, "'default' exists", "choose another name")
    assert not out.exists()


def test_the_tokenizer_that_it_names_is_taken(data, tmp_path):
    """A run with a tokenizer of its own, and a weighter for samples of that tokenizer alone."""
    out = tmp_path / "first"
    assert main([*data, "--method", "uniform", "--steps", "2", "--out", str(out)]) == 0
    checksum = load_tokenizer(out / "tokenizer.json").checksum
    spec = WeighterSpec(features=FeatureSpec(names=("loss_z", "loss_std"), tokenizer_checksum=checksum))
    folder = export_of(spec, tmp_path / "export")
    given = ["--mode", "weight", "--weighter-from", str(folder), "--tokenizer", str(out / "tokenizer.json")]
    assert main([*data, *given, "--steps", "6", "--out", str(tmp_path / "second")]) == 0
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert (summary["fallback_steps"], summary["weighter"]["client"]["updates_acknowledged"]) == (
        0,
        summary["meta_updates"],
    )
    assert summary["meta_updates"] > 0
