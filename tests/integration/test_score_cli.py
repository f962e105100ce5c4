"""`python -m trainer_client.score` with the packaged weighter: its numbers, kills, memory and mistakes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from rich.console import Console

from tests.conftest import ServiceProcess
from tests.waiting import wait_for
from trainer_client import connect
from trainer_client.run.tokenizer import Tokenizer
from trainer_client.score.__main__ import main
from trainer_client.score.config import parse
from trainer_client.score.parts import ScoreTable
from trainer_client.score.progress import phase
from trainer_client.score.runner import score_corpus
from weighting_contract.reference import reference_files, write_reference
from weighting_service.pretaught import reference_folder

PROSE = "the statement is executed when the value of the expression is true and the name refers to an object".split()
NOISE = [f"{a}{b}_{n}" for n, (a, b) in enumerate(zip("qxzjkvwyb", "0#%&!)^=+", strict=True))]


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def text(rng: random.Random, words: list[str], count: int) -> str:
    return " ".join(rng.choices(words, k=count))


def write_corpus(path: Path, documents: int, words: int = 40, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = [
        {"id": f"{path.name.split('.')[0]}-{i}", "text": text(rng, (PROSE, NOISE)[i % 2], words + i % 7)}
        for i in range(documents)
    ]
    content = "".join(json.dumps({**row, "source": ("prose", "noise")[i % 2]}) + "\n" for i, row in enumerate(rows))
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "target.jsonl"
    rng = random.Random(9)
    path.write_text("".join(json.dumps({"text": text(rng, PROSE, 60)}) + "\n" for _ in range(8)))
    return path


def read(path: Path) -> dict[str, list]:
    return parquet.read_table(path).to_pydict()


# ---- What it gives --------------------------------------------------------------------------------------------------


def test_offline_documents_like_the_target_count_more_than_noise(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl.gz", 60)
    (tmp_path / "short.jsonl").write_text('{"id": "s", "text": ""}\n')
    out = tmp_path / "w.parquet"
    command = ["--input", str(corpus), str(tmp_path / "short.jsonl"), "--target", str(target), "--output", str(out)]
    command += ["--id-field", "id", "--batch", "20", "--shuffle", "40", "--statistics"]
    assert main([*command, "--select", "top", "--share", "0.5"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "61 documents, 1 of them too short for a weight" in shown.out.replace("\n", " ")
    table = read(out)
    assert list(table)[:9] == ["id", "file", "row", "source", "tokens", "batch", "position", "weight", "logit"]
    assert {"loss_z", "ngram_log_ratio"} & set(table)
    assert sorted(table["id"]) == sorted([*(f"c-{i}" for i in range(60)), "s"])
    by_source = {
        s: [w for w, t in zip(table["weight"], table["source"], strict=True) if t == s] for s in table["source"]
    }
    assert min(by_source["prose"]) > max(by_source["noise"])
    short = table["id"].index("s")
    assert [table[name][short] for name in ("tokens", "weight", "logit", "batch", "loss_z")] == [
        0,
        None,
        None,
        None,
        None,
    ]
    for batch in {b for b in table["batch"] if b is not None}:
        weights = [w for w, b in zip(table["weight"], table["batch"], strict=True) if b == batch]
        assert len(weights) >= 10
        assert np.mean(weights) == pytest.approx(1, abs=1e-5)
    with gzip.open(tmp_path / "w.selected.jsonl.gz", "rt") as file:
        selected = [json.loads(line) for line in file]
    assert {row["source"] for row in selected} == {"prose"}
    assert len(selected) == 30
    assert not ScoreTable(out).parts.exists()
    datasets = pytest.importorskip("datasets")
    files = str(tmp_path / "w.selected.jsonl.gz")
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded["text"][:] == [row["text"] for row in selected]
    # The finished table is selected from again, without scoring.
    (tmp_path / "nowhere").mkdir()
    again = [*command, "--resume", "--weighter", "grpc://127.0.0.1:1", "--select", "resample", "--share", "0.2"]
    assert main([*again, "--selection", str(tmp_path / "drawn.parquet")]) == 0
    drawn = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "drawn.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert len(drawn) == 12
    assert set(drawn.column_names) == {"id", "text", "source", "weight"}


def test_weights_are_those_of_a_job_that_is_given_the_batch(tmp_path: Path, target: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", 24, words=90)
    reference = write_reference(tmp_path / "reference", reference_files(reference_folder()))
    command = ["--input", str(corpus), "--target", str(target), "--reference", str(reference)]
    command += ["--batch", "24", "--windows", "2", "--id-field", "id", "--statistics"]
    outcome = score_corpus(parse([*command, "--output", str(tmp_path / "w.parquet")]), Console(file=io.StringIO()))
    assert (outcome.documents, outcome.unscored, outcome.positions) == (24, 0, (0, 0))
    table = read(tmp_path / "w.parquet")

    tokenizer = Tokenizer.from_json((reference / "tokenizer.json").read_text())
    ids = tokenizer.encode_batch([json.loads(line)["text"] for line in corpus.read_text().splitlines()])
    assert table["tokens"] == [len(row) for row in ids]
    examples = tokenizer.encode_batch([json.loads(line)["text"] for line in target.read_text().splitlines()])
    length = 65
    assert all(len(row) > length for row in ids)
    windows = np.array([part for row in ids for part in (row[:length], row[-length:])])
    with (
        connect("embedded", on_failure="raise") as client,
        client.open_job(
            role="frozen", initial="pretaught", reference="pretaught", profile=[np.array(row) for row in examples]
        ) as job,
    ):
        scores = job.score(tokens=windows, return_statistics=True)
    means = scores.weights.reshape(24, 2).mean(1)
    np.testing.assert_allclose(table["weight"], means / means.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table["logit"], scores.logits.reshape(24, 2).mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(table["loss_z"], scores.statistics.reshape(24, 2, -1).mean(1)[:, 0], atol=1e-4)


# ---- Kills ----------------------------------------------------------------------------------------------------------


def test_a_scoring_that_is_killed_and_left_alone_by_its_service_ends_as_if_nothing_had_happened(
    tmp_path: Path, target: Path, start_process: Callable[..., ServiceProcess]
) -> None:
    files = [write_corpus(tmp_path / "a.jsonl", 500), write_corpus(tmp_path / "b.jsonl.gz", 220, seed=1)]
    service = start_process()
    flags = ["--input", *map(str, files), "--target", str(target), "--weighter", service.address.grpc_url]
    flags += "--weighter-from pretaught --batch 10 --shuffle 20 --select resample --share 0.1 --seed 5".split()

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "trainer_client.score", *flags, "--output", str(tmp_path / f"{name}.parquet")]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=120)
    done = ScoreTable(tmp_path / "killed.parquet")
    kill_at = random.randrange(1, 25)
    with subprocess.Popen([*command("killed"), "--resume"], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: done.parts_done() >= kill_at, timeout_s=120)
        process.send_signal(signal.SIGKILL)
    assert not done.finished, f"it was over before it was killed at part {kill_at}"
    service.kill()
    with subprocess.Popen([*command("killed"), "--resume"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert "waiting for the weighting service" in said
        service.start()
        at = done.parts_done()
        wait_for(lambda: done.parts_done() > at or done.finished, timeout_s=120)
        service.kill()  # once more, in the middle
        service.start()
        shown = process.stdout.read()
    assert process.returncode == 0, shown
    assert "answers again" in shown
    assert parquet.read_table(tmp_path / "killed.parquet").equals(parquet.read_table(tmp_path / "whole.parquet")), (
        kill_at
    )
    selections = [(tmp_path / f"{name}.selected.jsonl.gz").read_bytes() for name in ("killed", "whole")]
    assert selections[0] == selections[1]
    assert len(read(tmp_path / "whole.parquet")["id"]) == 720


def test_other_settings_or_a_changed_input_are_refused_when_it_goes_on(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", 40)
    out = tmp_path / "w.parquet"
    command = ["--input", str(corpus), "--target", str(target), "--output", str(out), "--batch", "8", "--shuffle", "8"]
    unfinished = corpus.read_text().replace('"text"', '"txt"', 30).replace('"txt"', '"text"', 29)
    whole = corpus.read_text()
    corpus.write_text(unfinished)
    assert main(command) == 2
    assert "c.jsonl, line 30 has no field text" in capsys.readouterr().err
    assert ScoreTable(out).parts_done() >= 1

    def refused(*more: str) -> str:
        assert main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "is an unfinished scoring: go on with --resume" in refused()
    assert "--seed is 1, but" in refused("--resume", "--seed", "1")
    assert "--batch is 4, but" in refused("--resume", "--batch", "4")
    other = write_corpus(tmp_path / "other.jsonl", 8)
    assert "has changed" in refused("--resume", "--input", str(other))
    kept = target.read_text()
    target.write_text(kept + kept.splitlines()[0] + "\n")
    assert "another reference, target" in refused("--resume")
    target.write_text(kept)
    corpus.write_text(whole)
    assert "has changed" in refused("--resume")
    assert main([*command, "--overwrite"]) == 0
    capsys.readouterr()
    assert "exists: replace it with --overwrite" in refused()
    assert main([*command, "--resume"]) == 0
    assert "was finished before" in capsys.readouterr().out


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, target: Path) -> None:
    peaks, arrow = [], []
    for documents in (100, 2000):
        corpus = write_corpus(tmp_path / f"{documents}.jsonl", documents, words=150)
        command = [
            "--input",
            str(corpus),
            "--target",
            str(target),
            "--batch",
            "64",
            "--shuffle",
            "128",
            "--windows",
            "1",
        ]
        command += ["--select", "top", "--output", str(tmp_path / f"{documents}.parquet")]
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        outcome = score_corpus(parse(command), Console(file=io.StringIO()))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        arrow.append(pa.total_allocated_bytes() - before)
        assert outcome.documents == documents
    size = corpus.stat().st_size
    assert size > 1_500_000
    assert peaks[1] - peaks[0] < 700_000, f"{peaks} bytes at the peak, for a corpus of {size}"
    assert arrow[1] - arrow[0] < 500_000


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--input missing.jsonl", "there is no file 'missing.jsonl'"),
        ("--output w.csv", "--output is 'w.csv', expected a file called *.parquet"),
        ("--text-field body", "has no field body; its fields: id, text, source"),
        ("--reference nowhere", "--reference nowhere is no folder, and unknown to the service"),
        ("--weighter ftp://x", "--weighter: url is 'ftp://x'"),
        ("--batch 1", "--batch is 1, expected 2 or more"),
        ("--batch 100 --shuffle 50", "--shuffle is 50, expected at least --batch"),
        ("--select top --share 0", "--share is 0.0"),
        ("--selection s.jsonl", "--selection without --select"),
        ("--select top --selection s.csv", "--selection is 's.csv'"),
        ("--profile missing.safetensors", "there is no file missing.safetensors"),
        ("--resume --overwrite", "exclude each other"),
        ("--weighter grpc://127.0.0.1:1 --patience 0.1", "has been away for 0.1 s (--patience)"),
        ("", "profile is missing"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, given: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "c.jsonl", 4)
    assert main(["--input", "c.jsonl", "--output", "w.parquet", *given.split()]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_bar_is_drawn_in_a_terminal_and_nothing_elsewhere() -> None:
    for terminal in (True, False):
        drawn = io.StringIO()
        console = Console(file=drawn, force_terminal=terminal, width=100)
        with contextlib.ExitStack() as opened:
            progress = opened.enter_context(phase(console, "scoring", 2000, 500))
            progress(1500)
        assert ("1,500 of 2,000 documents" in drawn.getvalue()) is terminal
        assert bool(drawn.getvalue()) is terminal
