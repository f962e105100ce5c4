"""What makes a run good to use: settings from a file, a dry run, W&B, evaluation tasks, and the exported model."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_job import BATCH, CANDIDATES, STEPS, WORDS, contents, count_lines, read

from tests.conftest import Address
from trainer_client import connect
from trainer_client.run import dry_run
from trainer_client.run.__main__ import main
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import build_model, count_parameters
from trainer_client.run.session import SELECT_SPEC
from trainer_client.run.tokenizer import load_tokenizer
from weighting_contract.spec import FeatureSpec, WeighterSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a mistake is answered with."""
    capsys.readouterr()
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    return errors


# ---- Settings from a file -------------------------------------------------------------------------------------------


def _as_settings(flags: list[str]) -> dict[str, Any]:
    return {name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(flags[::2], flags[1::2], strict=True)}


def test_a_run_from_a_file_is_the_run_of_the_flags(data, finished, tmp_path):
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**_as_settings(data), "mode": "weight", "out": "elsewhere", "seed": 4}))
    assert main(["--config", str(file), "--seed", "0", "--out", str(out)]) == 0
    settings, others = read(out / "config.json")["config"], read(finished / "config.json")["config"]
    own = {"mode": "weight", "out": str(out), "compare": []}
    assert settings == {**others, **own}
    lines = [[line["loss"] for line in read_metrics(run / "weight" / "metrics.jsonl")] for run in (out, finished)]
    assert lines[0] == lines[1]
    assert main(["--config", str(file), "--seed", "0", "--out", str(out), "--resume"]) == 0


def test_another_setting_in_the_file_of_a_resumed_run_is_refused(finished, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("steps: 99\n")
    shown = _refused(["--config", str(tmp_path / "run.yaml"), "--resume", "--out", str(finished)], capsys)
    assert f"--steps is 99, but the run in {finished} was started with {STEPS}" in shown


# ---- Dry run --------------------------------------------------------------------------------------------------------


def _plan(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_says_what_will_happen_and_leaves_nothing(data, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = _plan([*data, "--mode", "both", "--compare", "uniform", "dsir", "--out", "out"], capsys)
    assert list(tmp_path.iterdir()) == []
    summary = read(finished / "summary.json")
    compute = summary["compute"]
    parameters = compute["training_flops"] / (6 * STEPS * BATCH * 16)
    assert f"nano: {parameters:,.0f} parameters" in shown
    assert f"{BATCH * 16} a step ({BATCH} samples of 16), in {STEPS} steps" in shown
    assert f"{STEPS * BATCH * 16:,} in all" in shown
    for source in WORDS:
        assert f"{source}: " in shown
    # The plan counts what the run will have counted.
    teaching, scoring = (compute[f"{name}_flops"] / compute["training_flops"] for name in ("teaching", "scoring"))
    assert f"both: teaching {teaching:.1%} ({summary['meta_updates']} meta-updates), scoring {scoring:.1%}" in shown
    assert f"reference     counted; {summary['reference']['name']}" in shown
    size = (finished / "both" / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors").stat().st_size
    planned = 12 * parameters
    assert f"the newest two checkpoints of {planned / 1e6:,.2f} MB each" in shown
    assert planned == pytest.approx(size, rel=0.05)
    assert f"of {CANDIDATES} candidates a place the most alike to the target" in shown


def test_a_dry_run_says_where_a_reference_is_to_be_made(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "reference     counted; will be counted first, then cached" in _plan(data, capsys)
    monkeypatch.setattr("trainer_client.run.reference.MOST_TOKENS", 100)
    assert "parameters; will be trained first (300 steps, then cached)" in _plan(data, capsys)
    assert not list((tmp_path / "cache").rglob("reference-*"))


def test_a_dry_run_asks_the_service_and_changes_nothing_there(data, service: Address, tmp_path, capsys):
    flags = [*data, "--weighter", service.grpc_url, "--out", str(tmp_path / "out")]
    assert f"{service.grpc_url}: answers, weighter 'default' is to be made" in _plan(flags, capsys)
    with connect(service.grpc_url) as client:
        assert client.list_weighters() == []
        client.create_weighter("default", SELECT_SPEC)
        client.create_weighter("other", WeighterSpec(features=FeatureSpec(names=("something",))))
    fresh = [*flags, "--weighter-from", "none"]
    assert "answers, weighter 'default' is at position 0" in _plan(fresh, capsys)
    other = [*fresh, "--weighter-name", "other"]
    assert _refused([*other, "--dry-run"], capsys) == _refused(other, capsys)  # another spec has the name


def test_a_dry_run_says_that_the_service_is_away(data, tmp_path, capsys):
    with socket.socket() as taken:  # bound, never listening: nobody answers here
        taken.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        flags = [*data, "--weighter", url, "--out", str(tmp_path / "out")]
        assert f"{url}: does not answer now" in _plan(flags, capsys)
        assert "is not reachable" in _refused([*flags, "--on-failure", "raise", "--dry-run"], capsys)


def test_a_dry_run_of_a_replay_and_of_a_finished_run(finished, tmp_path, capsys):
    before = contents(finished)
    shown = _plan(["--replay-weights", str(finished), "--out", str(tmp_path / "out")], capsys)
    assert f"both: samples and weights on record in {finished}" in shown
    assert "none is asked" in shown
    assert "the run that is there is continued" in _plan(["--resume", "--out", str(finished)], capsys)
    assert contents(finished) == before


@pytest.mark.parametrize(
    "flags",
    [
        "--data cut.jsonl",
        "--data cut.jsonl.gz",
        "--model no-such-size",
        "--batch-size 5000 --meta-batch 4",
        "--device abacus",
        "--reference missing",
        "--config missing.yaml",
        "--wandb project",
        "--eval-tasks some_task --eval-include missing",
    ],
)
def test_mistakes_are_the_same_sentence_in_a_dry_run(data, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    whole = "".join(json.dumps({"text": f"{i} {hash(i * i)}"}) + "\n" for i in range(2000))
    Path("cut.jsonl").write_text(whole[:-9])
    Path("cut.jsonl.gz").write_bytes(gzip.compress(whole.encode())[:-99])
    given = [*data, "--out", "out", *flags.split()]
    shown = _refused(given, capsys)
    assert shown == _refused([*given, "--dry-run"], capsys)
    assert flags.split()[-1] in shown or "pip install 'weighbridge[wandb]'" in shown or "5000" in shown
    assert not Path("out").exists()


def test_the_memory_estimate_counts_what_autograd_keeps():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 7)
            self.head = torch.nn.Linear(7, 50, bias=False)

        def forward(self, ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": self.head(self.table(ids))})

    model, tokens = Model(), torch.randint(0, 50, (3, 11)).numpy()
    memory = dry_run.estimate_memory(model, tokens, 6, taught=True)
    parameters = 4 * 2 * 50 * 7
    assert (memory.parameters, memory.gradients, memory.moments, memory.teaching) == (
        parameters,
        parameters,
        2 * parameters,
        parameters,
    )
    # The ids, which the labels are of, too; of 10 positions the head's inputs and log-probabilities; some scalars.
    least = 11 * 8 + 10 * (7 * 4 + 50 * 4)
    assert 6 * least <= memory.activations <= 6 * (least + 64)
    assert dry_run.estimate_memory(model, tokens, 12, taught=False).activations == 2 * memory.activations


# ---- W&B ------------------------------------------------------------------------------------------------------------


def _offline_runs(folder: Path) -> list[list[Any]]:
    """Records of the offline runs below a folder, oldest run first."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [[Record.FromString(content) for content in _leveldb_log(path)] for path in sorted(folder.rglob("*.wandb"))]


def _leveldb_log(path: Path, header: int = 7, block: int = 1 << 15) -> Iterator[bytes]:
    """What a file of W&B holds: blocks of fragments, each after its checksum, length and kind (1 whole, 4 the last)."""
    content, at, whole = path.read_bytes(), header, b""
    while at + header <= len(content):
        left = block - at % block
        if left < header:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_gets_the_scalars_and_goes_on_under_the_same_id(data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    short = ["--method", "uniform", "--steps", "10", "--checkpoint-every", "4", "--wandb", "weighing"]
    assert main([*data, *short, "--out", str(out)]) == 0
    (out / "uniform" / "summary.json").unlink()
    (out / "uniform" / "checkpoints" / "checkpoint-00000010.safetensors").unlink()
    assert main(["--resume", "--out", str(out)]) == 0
    wandb.teardown()  # its own process, before anybody complains about it

    runs = _offline_runs(out)
    assert len(runs) == 2
    seen = []
    for records in runs:
        begin = next(r.run for r in records if r.HasField("run"))
        assert (begin.run_id, begin.project) == (read(out / "config.json")["job_id"], "weighing")
        config = {item.key: json.loads(item.value_json) for item in begin.config.update}
        assert (config["batch_size"], config["label"]) == (BATCH, "uniform")
        for record in records:
            if record.HasField("history"):
                items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                seen.append((items["step"], items["loss"]))
    lines = read_metrics(out / "uniform" / "metrics.jsonl")
    assert seen == [(line["step"], line["loss"]) for line in lines]  # those of steps trained again are not sent again
    last = {item.key: item.value_json for record in runs[-1] for item in record.summary.update}
    assert json.loads(last["test_loss"]) == read(out / "summary.json")["test_loss"]


def test_wandb_that_fails_is_said_once_and_stops_nothing(data, tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody is
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    out = tmp_path / "out"
    short = ["--method", "uniform", "--steps", "4", "--wandb", "weighing"]
    assert main([*data, *short, "--out", str(out)]) == 0
    wandb.teardown()
    assert count_lines(out / "uniform" / "metrics.jsonl") == 4
    assert caplog.text.count("nothing more goes to W&B, training goes on") == 1


# ---- Evaluation tasks and the exported model ------------------------------------------------------------------------

QUESTIONS = [
    {"question": "the weights of a", "choices": ["batch", "117"], "answer": 0},
    {"question": "how much each", "choices": ["101 102", "sample counts"], "answer": 1},
    {"question": "when the loss", "choices": ["of", "128"], "answer": 1},
    {"question": "103 117", "choices": ["weights", "model", "121"], "answer": 2},
]
TASK = """
task: small_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file of a task, whose data are local, too."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "small.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return folder


@torch.no_grad()
def _accuracy(folder: Path) -> float:
    """Naively: the choice of the highest log-probability, one after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def log_p(context: str, choice: str) -> float:
        before, ids = len(tokenizer.encode(context)), tokenizer.encode(f"{context} {choice}")
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(before, len(ids)))

    right = 0
    for question in QUESTIONS:
        each = [log_p(question["question"], choice) for choice in question["choices"]]
        right += each.index(max(each)) == question["answer"]
    return right / len(QUESTIONS)


def test_trained_models_are_evaluated_on_tasks(data, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    evaluated = ["--eval-tasks", "small_choice", "--eval-include", str(tasks)]
    assert main([*data, "--method", "uniform", "--compare", "dsir", "--out", str(out)]) == 0
    assert "eval_scores" in read(out / "summary.json")
    assert read(out / "summary.json")["eval_scores"] is None
    assert main(["--resume", "--out", str(out), *evaluated]) == 0  # a finished job can be evaluated later
    summary = read(out / "summary.json")
    accuracy = _accuracy(out / "uniform" / "model")
    assert summary["eval_scores"]["small_choice"]["acc"] == accuracy
    assert 0 < accuracy < 1
    assert set(summary["compare"]["dsir"]["eval_scores"]) == {"small_choice"}
    report = read(out / "uniform" / "eval.json")
    assert report["results"]["small_choice"]["acc,none"] == accuracy
    assert report["n-samples"]["small_choice"]["effective"] == len(QUESTIONS)
    assert "small_choice acc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--eval-tasks small_choices --eval-include {tasks}",
            "no task small_choices, the nearest is small_choice",
        ),
        ("--eval-tasks small_choice --eval-include {tasks}/small.yaml", "small.yaml is no folder"),
        ("--eval-tasks broken --eval-include {tasks}", "--eval-tasks: broken can't be loaded"),
        ("--eval-include {tasks}", "--eval-include without --eval-tasks"),
    ],
)
def test_tasks_that_can_not_be_evaluated_are_refused_before_training(data, tasks, tmp_path, capsys, flags, words):
    broken = TASK.replace("small_choice", "broken").format(data=tasks / "missing.jsonl")
    (tasks / "broken.yaml").write_text(broken)
    given = [*data, "--out", str(tmp_path / "out"), *flags.format(tasks=tasks).split()]
    assert words in _refused(given, capsys)
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_named_with_the_extra(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if they were not installed
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    out = ["--out", str(tmp_path / "out")]
    assert "pip install 'weighbridge[wandb]'" in _refused([*data, *out, "--wandb", "p"], capsys)
    assert "pip install 'weighbridge[eval]'" in _refused([*data, *out, "--eval-tasks", "some"], capsys)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_exported_model_is_the_trained_one(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "both" / "model"
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    own = load_tokenizer(finished / "tokenizer.json")
    model = build_model("nano", own.vocab_size, 16, seed=1)
    tensors = load_file(finished / "both" / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors")
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
    texts = [" ".join(words[:9]) for words in WORDS.values()] + ["line\nafter line\n"]
    for text, ids in zip(texts, own.encode_batch(texts), strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert torch.equal(exported(torch.tensor([ids])).logits, model.eval()(torch.tensor([ids])).logits)
    assert count_parameters(exported) == count_parameters(model)
    assert exported.config.use_cache
    assert not (folder / "generation_config.json").exists()
    assert not (finished / "uniform" / "model").exists()  # the main run's only
