"""`python -m trainer_client.reference` on small files: what it makes, that a service takes it, and how it says no."""

from __future__ import annotations

import json
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer_client.reference.__main__ import main
from trainer_client.reference.config import PROGRAM, ReferenceConfig, parse
from trainer_client.reference.train import load_pool
from trainer_client.run.data import load_documents, make_samples, unigram_counts
from trainer_client.run.models import SIZES, build_model, count_parameters
from trainer_client.run.tokenizer import load_tokenizer
from weighting_contract.ngrams import BUCKETS, count_ngrams
from weighting_contract.reference import FILES, MODEL, check_reference, read_counts, reference_files
from weighting_contract.statistics import RAW_NAMES, standardise
from weighting_service.reference import load_reference

SEQ_LEN, STEPS = 16, 30
WORDS = {
    "prose": "the weights of a batch say how much each sample counts when the loss of the model is taken".split(),
    "tables": [str(n) for n in range(100, 140)],
}


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, each a chain of its own words: there is something to learn about their order."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def document(source: str) -> str:
        return json.dumps({"text": " ".join(rng.choices(WORDS[source], k=120)), "source": source}) + "\n"

    (folder / "pool.jsonl").write_text("".join(document(s) for _ in range(30) for s in WORDS))
    (folder / "val.jsonl").write_text("".join(document("prose") for _ in range(4)))
    return folder / "pool.jsonl"


@pytest.fixture(scope="module")
def flags(pool: Path) -> list[str]:
    small = f"--size pico --vocab-size 300 --seq-len {SEQ_LEN} --batch-size 8 --steps {STEPS} --threads 1 --device cpu"
    return ["--data", str(pool), *small.split()]


@pytest.fixture(scope="module")
def made(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "reference"
    assert main([*flags, "--out", str(out)]) == 0
    return out


# ---- What it makes --------------------------------------------------------------------------------------------------


def test_the_reference_says_what_it_is(made: Path, flags: list[str], pool: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    files = reference_files(made)
    info = check_reference(files, "here")
    assert (info.seq_len, info.steps, info.vocab_size) == (SEQ_LEN, STEPS, load_tokenizer(made).vocab_size)
    assert info.tokenizer_checksum == load_tokenizer(made).checksum
    assert f"samples of {SEQ_LEN} tokens" in info.trained_on
    program, given = shlex.split(info.command)[:3], shlex.split(info.command)[3:]
    assert program == PROGRAM.split()
    assert parse(given) == parse(flags)


def test_counts_are_those_of_the_pool(made: Path, pool: Path) -> None:
    tokenizer = load_tokenizer(made)
    samples = make_samples(load_documents(str(pool)), tokenizer, SEQ_LEN)
    counts = read_counts(reference_files(made))
    np.testing.assert_array_equal(counts.unigrams, unigram_counts(samples, tokenizer.vocab_size))
    np.testing.assert_array_equal(counts.ngrams, count_ngrams(samples.tokens, BUCKETS))


def test_a_service_scores_with_it_and_it_has_learned(made: Path, pool: Path) -> None:
    hosted = load_reference(made)
    texts = [document.text for document in load_documents(str(pool))]
    raw = hosted.raw_statistics(hosted.tokenize(texts))
    loss, unigram = raw[:, RAW_NAMES.index("loss_mean")], raw[:, RAW_NAMES.index("unigram_mean")]
    assert loss.mean() < np.log(hosted.vocab_size)
    assert abs(float(loss.mean()) - hosted.info.loss) < 0.3
    assert standardise(raw).isfinite().all()
    assert (unigram > 0).all()


def test_the_same_command_gives_the_same_bytes(made: Path, flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--out", str(tmp_path / "again")]) == 0
    assert reference_files(tmp_path / "again") == reference_files(made)
    assert main([*flags, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other, first = (check_reference(reference_files(p), "here") for p in (tmp_path / "other", made))
    assert other.checksum != first.checksum
    assert other.tokenizer_checksum == first.tokenizer_checksum


def test_what_is_shown_and_how_large_it_is(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "r"
    assert main([*flags, "--vocab-size", "1024", "--steps", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for words in ("parameters", "loss on its pool", "time", "size of the folder", "step 2 of 2"):
        assert words in shown
    assert str(out) in shown.replace("\n", "")
    assert sum(path.stat().st_size for path in out.iterdir()) < 1_000_000


def test_by_default_nothing_is_trained(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "counted"
    counted = f"--data {pool} --vocab-size 300 --seq-len {SEQ_LEN} --threads 1 --device cpu --out {out}"
    assert main(counted.split()) == 0
    assert "none, it is counted" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == set(FILES) - set(MODEL)
    assert check_reference(reference_files(out), "here").steps == 0
    reference = load_reference(out)
    texts = [" ".join(random.Random(5).choices(WORDS["prose"], k=12)), " ".join(WORDS["tables"][:12])]
    mixed = " ".join(a for pair in zip(WORDS["prose"], WORDS["tables"], strict=False) for a in pair)
    statistics = reference.raw_statistics(reference.tokenize([*texts, mixed]))
    mean_loss = dict(zip(RAW_NAMES, statistics.unbind(1), strict=True))["loss_mean"]
    assert mean_loss.max() == mean_loss[2], "words of two sources do not follow each other"


def test_the_smallest_model_is_small() -> None:
    pico, nano = (count_parameters(build_model(size, 1024, 64, seed=0)) for size in ("pico", "nano"))
    assert pico < 20_000
    assert pico < nano / 8
    assert SIZES["pico"].layers == 1


def test_a_model_of_ones_own_is_taken_as_it_is(made: Path, pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    own = ["--size", str(made), "--tokenizer", str(made), "--steps", "0"]
    assert main(["--data", str(pool), *own, "--seq-len", str(SEQ_LEN), "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    rows = np.random.default_rng(0).integers(0, 250, (5, SEQ_LEN + 1))
    assert torch.equal(load_reference(out).raw_statistics(rows), load_reference(made).raw_statistics(rows))
    assert str(made) not in (out / "config.json").read_text()


def test_validation_documents_are_kept_out_of_the_pool(pool: Path, tmp_path: Path) -> None:
    val = pool.with_name("val.jsonl")
    (tmp_path / "both.jsonl").write_text(pool.read_text() + val.read_text())
    config = ReferenceConfig(data=(str(tmp_path / "both.jsonl"),), val=(str(val),))
    assert [d.text for d in load_pool(config)] == [d.text for d in load_documents(str(pool))]


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--data missing.jsonl", "missing.jsonl"),
        ("--size huge", "model 'huge' is neither a size"),
        ("--tokenizer missing.json", "missing.json"),
        ("--vocab-size 10", "--vocab-size is 10"),
        ("--batch-size 50000", "fewer than one batch of 50000"),
        ("--seq-len 5000", "none of 60 documents has the 5001 tokens"),
        ("--steps -1", "--steps is -1, expected 0 or more"),
        ("--size counts", "--steps is for training a model, but --size counts trains none: name a size, such as pico"),
        ("--lr 0", "--lr is 0"),
        ("--ngram-buckets 1000", "--ngram-buckets is 1000, expected a power of two"),
        ("--device abacus", "--device is 'abacus'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, given: str, words: str
) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out), *given.split()]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_a_taken_folder_is_refused_before_training(
    made: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = reference_files(made)
    assert main([*flags, "--steps", "1000000", "--out", str(made)]) == 2
    assert "holds another reference" in capsys.readouterr().err
    assert reference_files(made) == before
    out = tmp_path / "r"
    for seed in ("1", "2"):
        assert main([*flags, "--steps", "1", "--seed", seed, "--out", str(out), "--overwrite"]) == 0
    assert "--seed 2" in check_reference(reference_files(out), "here").command


def test_an_interrupted_command_leaves_nothing(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer_client.reference", *flags, "--steps", "1000000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "r")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs without it
    )
    try:
        assert process.stdout is not None
        assert "step 100 of 1000000" in process.stdout.readline()  # training
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "trainer_client.reference: interrupted\n")
    assert list(tmp_path.iterdir()) == []
