"""Every judged method in each of its modes on a small cut of the built-in corpus: what it promises, exact resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer_client.run import builtin_corpus
from trainer_client.run.__main__ import main
from trainer_client.run.compute import scoring_flops, training_flops
from trainer_client.run.config import load, parse
from trainer_client.run.data import CandidateOrder
from trainer_client.run.forward import sample_losses
from trainer_client.run.methods.judge import Sharpness
from trainer_client.run.methods.judges import lin_upper
from trainer_client.run.methods.names import JUDGED
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import build_model
from trainer_client.run.recorder import Record, read_records
from trainer_client.run.runner import prepare
from trainer_client.run.task import build_task
from trainer_client.run.tokenizer import load_tokenizer
from trainer_client.select.choice import choose

BATCH, CANDIDATES, LENGTH, STEPS, CHECKPOINT = 8, 3, 32, 30, 20
SELECTING = tuple(JUDGED)
WEIGHING = tuple(f"{name}-weight" for name, judged in JUDGED.items() if judged.weighs)
LABELS = (*SELECTING, *WEIGHING)
RECORDED = tuple(label for label in LABELS if label != "oracle")


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Flags of a small job; tokenizers and models are cached apart."""
    folder = tmp_path_factory.mktemp("methods")
    corpus = builtin_corpus.build(pool_characters=240_000)
    splits = {"data": corpus.train, "val": corpus.validation[:6], "test": corpus.test[:2]}
    flags = []
    for name, documents in splits.items():
        lines = (json.dumps({"text": d.text, "source": d.source}) + "\n" for d in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        flags += [f"--{name}", str(folder / f"{name}.jsonl")]
    small = f"--model tiny --vocab-size 400 --seq-len {LENGTH} --batch-size {BATCH} --candidates {CANDIDATES}"
    rest = f"--steps {STEPS} --lr 8e-3 --warmup-steps 2 --eval-every {STEPS} --checkpoint-every {CHECKPOINT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield [*flags, *small.split(), *rest.split(), "--meta-batch", "4"]


@pytest.fixture(scope="module")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted job of all methods; the main run is rho's."""
    out = tmp_path_factory.mktemp("finished") / "out"
    others = [label for label in ("uniform", *LABELS) if label != "rho"]
    assert main([*data, "--method", "rho", "--compare", *others, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def summaries(finished: Path) -> dict[str, dict[str, Any]]:
    return {label: json.loads((finished / label / "summary.json").read_text()) for label in ("uniform", *LABELS)}


def lines(out: Path, label: str) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(out / label / "metrics.jsonl")]


def records(out: Path, label: str) -> list[Record]:
    if label.endswith("-weight"):
        return read_records(out / label / "weights.record", BATCH, BATCH)
    return read_records(out / label / "selection.record", BATCH, CANDIDATES * BATCH)


def mean_share(out: Path, label: str, source: str, steps: slice) -> float:
    return float(np.mean([line["trained_share"][source] for line in lines(out, label)[steps]]))


# ---- What each method promises --------------------------------------------------------------------------------------


def test_each_run_is_called_after_its_method_and_mode(summaries: dict[str, dict[str, Any]]) -> None:
    for label in LABELS:
        run = summaries[label]
        method, _, mode = label.partition("-")
        assert (run["label"], run["method"], run["mode"]) == (label, method, mode or "select")
        assert np.isfinite([run["val_loss"], run["test_loss"]]).all()
        assert run["candidates"] == (CANDIDATES if label in SELECTING and label != "oracle" else 1)
        assert (run["trust"], run["weighter"], run["meta_updates"], run["fallback_steps"]) == (None, None, 0, 0)
        assert sum(run["shares_by_source"].values()) == pytest.approx(1)


@pytest.mark.parametrize("label", [label for label in WEIGHING if label != "oracle-weight"])
def test_weights_have_mean_1_and_the_effective_sample_size_of_the_guard(finished: Path, label: str) -> None:
    for record, line in zip(records(finished, label), lines(finished, label), strict=True):
        assert record.weights.mean() == pytest.approx(1, abs=1e-5)
        assert line["effective_sample_size"] == pytest.approx(
            record.weights.sum() ** 2 / (record.weights**2).sum(), rel=1e-4
        )
        assert line["effective_sample_size"] >= 0.6 * BATCH * (1 - 1e-4)


def test_chance_is_as_uneven_as_the_guard_lets_it(summaries: dict[str, dict[str, Any]]) -> None:
    assert summaries["random-weight"]["effective_sample_size"] == pytest.approx(0.6 * BATCH, rel=1e-3)
    assert summaries["random"]["weights_by_source"] == dict.fromkeys(summaries["uniform"]["weights_by_source"], 1.0)


@pytest.mark.parametrize("label", [label for label in SELECTING if label != "oracle"])
def test_candidates_are_kept_without_repeats(finished: Path, label: str) -> None:
    for record in records(finished, label):
        assert len(set(record.kept)) == BATCH
        assert record.kept.max() < CANDIDATES * BATCH


def test_the_oracle_trains_on_the_target_alone(finished: Path, summaries: dict[str, dict[str, Any]]) -> None:
    for label in ("oracle", "oracle-weight"):
        last = summaries[label]["shares_by_source"]
        assert last["prose"] > 0.8
    assert {line["trained_share"]["prose"] for line in lines(finished, "oracle")} == {1}
    for line in lines(finished, "oracle-weight"):
        weights = line["mean_weight"]
        others = {weight for source, weight in weights.items() if source != "prose"}
        assert others == ({0} if "prose" in weights else {1})  # a batch without the target counts evenly


def test_the_first_step_s_weights_and_choice_follow_from_the_fresh_trainer(finished: Path) -> None:
    config = load(finished / "config.json")
    task = build_task(config, tokenizer=load_tokenizer(str(finished / "tokenizer.json")))
    model = build_model(config.model, task.tokenizer.vocab_size, LENGTH, config.seed).eval()

    def logits(indices: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return lin_upper(sample_losses(model, task.tokens(indices, torch.device("cpu"))).numpy())

    weights = Sharpness(0.5, 0.6).weights(logits(task.order.indices(0)), 0)
    np.testing.assert_allclose(records(finished, "loss-weight")[0].weights, weights, rtol=1e-3)
    over_candidates = Sharpness(0.5, config.select_min_share).weights(logits(task.candidate_order.indices(0)), 0)
    kept, _ = choose(over_candidates, BATCH, 0, (config.seed, 0), from_first=True)
    assert sorted(records(finished, "loss")[0].kept) == sorted(kept)


def test_reducible_loss_prefers_what_can_be_learned_to_noise(finished: Path) -> None:
    late = slice(STEPS // 2, None)
    assert mean_share(finished, "rho", "noise", late) < 0.5 * mean_share(finished, "random", "noise", late)
    assert mean_share(finished, "rho", "prose", late) > mean_share(finished, "random", "prose", late)


def test_the_difference_of_two_models_finds_the_target(finished: Path) -> None:
    every = slice(None)
    assert mean_share(finished, "difference", "prose", every) > 1.8 * mean_share(finished, "random", "prose", every)
    assert mean_share(finished, "difference", "noise", every) < mean_share(finished, "random", "noise", every)


def test_the_same_candidates_are_judged_differently(finished: Path) -> None:
    kept = {label: [tuple(sorted(r.kept)) for r in records(finished, label)] for label in RECORDED[:-6]}
    assert set(kept) == {label for label in SELECTING if label != "oracle"}
    assert len({str(choices) for choices in kept.values()}) == len(kept)


# ---- What it costs --------------------------------------------------------------------------------------------------


def test_what_judges_take_is_counted(summaries: dict[str, dict[str, Any]], finished: Path) -> None:
    compute = {label: run["compute"] for label, run in summaries.items()}
    a_token = compute["uniform"]["training_flops"] / (6 * STEPS * BATCH * LENGTH)  # parameters of the trainer
    forward = scoring_flops(int(a_token), LENGTH)  # of a sample
    drawn, batch = STEPS * CANDIDATES * BATCH, STEPS * BATCH
    validation = training_flops(int(a_token), 8 * LENGTH) * STEPS
    scoring = {label: run["scoring_flops"] for label, run in compute.items()}
    for label in ("uniform", "random", "random-weight", "oracle", "oracle-weight", "loss-weight"):
        assert scoring[label] == 0, label
    assert scoring["loss"] == forward * drawn
    assert scoring["similarity"] == forward * (drawn + BATCH * STEPS)
    assert scoring["similarity-weight"] == forward * (batch + BATCH * STEPS)
    assert scoring["alignment"] == 2 * forward * drawn + validation
    assert scoring["alignment-weight"] == forward * batch + validation
    pool = json.loads((finished / "samples.json").read_text())["train"]["samples"]
    order = CandidateOrder(range(pool), BATCH, CANDIDATES, seed=0)
    different = len({int(i) for step in range(STEPS) for i in order.indices(step)})
    a_sample = scoring["rho-weight"] / min(batch, pool)  # the holdout model has read each one that was drawn, once
    assert scoring["rho"] == pytest.approx(a_sample * different + forward * drawn)
    assert scoring["difference"] == pytest.approx(2 * a_sample * different)
    for label, run in summaries.items():
        reads = label in ("rho", "rho-weight", "difference")
        assert (run["compute"]["reference_flops"] > 0) == reads
        assert (run["reference"] is not None) == reads
        spent = run["compute"]["training_flops"] + run["compute"]["scoring_flops"]
        assert run["compute"]["relative"] == pytest.approx(spent / run["compute"]["training_flops"])


def test_what_a_run_is_compared_with_does_not_change_its_reference(data: list[str]) -> None:
    config = parse([*data, "--method", "dwm", "--mode", "select", "--compare", "rho", "uniform", "--out", "nowhere"])
    job = prepare(config, torch.device("cpu"), lambda *_: None)
    chooser, rho, uniform = (job.reference_of(variant) for variant in config.variants)
    assert chooser is not None
    assert rho is not None
    assert (chooser.parameters, uniform) == (0, None)
    assert rho.parameters > 0
    alone = prepare(replace(config, compare=()), torch.device("cpu"), lambda *_: None)
    assert alone.reference is not None
    assert (alone.reference.checksum, alone.judging) == (chooser.checksum, None)


# ---- Again ----------------------------------------------------------------------------------------------------------


def cut(out: Path, label: str) -> None:
    """As if the run had been killed some steps after its checkpoint, before anything of those reached the disk."""
    folder = out / label
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors").unlink()
    for path in folder.glob("*.record"):
        size = len(path.read_bytes())
        header = 20
        a_step = (size - header) // STEPS
        with path.open("r+b") as file:
            file.truncate(header + CHECKPOINT * a_step + 3)


def assert_same(a: Path, b: Path, label: str) -> None:
    first, second = (load_file(out / label / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors") for out in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), label
    assert lines(a, label) == lines(b, label)
    if label in RECORDED:
        for x, y in zip(records(a, label), records(b, label), strict=True):
            np.testing.assert_array_equal(x.kept, y.kept)
            np.testing.assert_array_equal(x.weights, y.weights)


def test_every_run_resumes_bit_by_bit_without_its_records(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for label in LABELS:
        cut(out, label)
    assert main(["--resume", "--out", str(out)]) == 0
    for label in LABELS:
        assert_same(out, finished, label)


@pytest.mark.parametrize("label", ["rho", "alignment-weight"])
def test_a_run_on_record_is_replayed_bit_by_bit(finished: Path, tmp_path: Path, label: str) -> None:
    out = tmp_path / "out"
    method, _, mode = label.partition("-")
    flags = ["--replay-weights", str(finished), "--method", method, "--mode", mode or "select", "--out", str(out)]
    assert main(flags) == 0
    ends = [
        load_file(folder / label / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors") for folder in (out, finished)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_plan_says_what_judges(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    compare = ["--compare", "oracle", "similarity-weight"]
    assert main([*data, "--method", "difference", *compare, "--dry-run", "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for label, way in (
        ("difference", f"of {CANDIDATES} candidates a place those that are best by {JUDGED['difference'].about}"),
        ("oracle, compared with it", f"batches chosen by {JUDGED['oracle'].about}"),
        ("similarity-weight, compared with it", f"weights inside the batch by {JUDGED['similarity'].about}"),
    ):
        assert f"{label}: {way}" in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method loss --mode both", "--mode is both, but --method loss goes with --mode select or weight only"),
        ("--method difference --mode weight", "--method difference goes with --mode select only"),
        ("--method oracle --oracle-source poems", "--oracle-source is 'poems', but the training documents are of code"),
        ("--method loss --oracle-source prose", "--oracle-source is for the method oracle"),
        ("--method loss --judge-temperature nan", "--judge-temperature is nan"),
        ("--method loss --judge-temperature -1", "--judge-temperature is -1.0, expected 0 or more"),
    ],
)
def test_mistakes_are_one_sentence(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main([*data, *flags.split(), "--out", str(tmp_path / "out")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "config.json").exists()
