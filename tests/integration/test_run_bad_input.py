"""Data that a run should not be trusted with: a clear error before anything is written, or a warning that is kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_job import WORDS, read

from tests.conftest import ServiceThread
from trainer_client import connect
from trainer_client.run.__main__ import main

pytestmark = pytest.mark.usefixtures("same_threads_after")

SIZES = "--vocab-size 300 --seq-len 16 --batch-size 8 --steps 4 --meta-batch 4 --val-batch 4 --meta-every 2"
REST = "--mode weight --warmup-steps 1 --eval-every 2 --threads 1 --probes 2 --candidates 2"


def documents(path: Path, count: int, words: int = 120, seed: int = 0) -> Path:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS["prose"], k=words)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def files(tmp_path: Path, own_cache: None) -> dict[str, Path]:
    """By flag; each may be replaced."""
    sizes = {"--data": 30, "--val": 6, "--test": 6}
    return {
        flag: documents(tmp_path / f"{flag[2:]}.jsonl", count, seed=seed)
        for seed, (flag, count) in enumerate(sizes.items())
    }


def flags(files: dict[str, Path], out: Path, *more: str) -> list[str]:
    given = [item for flag, path in files.items() for item in (flag, str(path))]
    return [*given, *SIZES.split(), *REST.split(), "--out", str(out), *more]


def warned(files: dict[str, Path], out: Path, caplog: pytest.LogCaptureFixture, *more: str) -> list[str]:
    """The warnings of a run that finishes; the summary has the same."""
    assert main(flags(files, out, *more)) == 0
    summary = read(out / "summary.json")
    assert summary["steps"] == 4
    logged = [
        r.getMessage() for r in caplog.records if r.name in ("trainer_client.run.data", "trainer_client.run.task")
    ]
    assert summary["warnings"] == [message for message in logged if "shorter than a sample" not in message]
    return list(summary["warnings"])


def refused(files: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(flags(files, out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said
    assert not out.exists()


def test_a_run_without_a_fault_warns_of_nothing(files, tmp_path, caplog):
    assert warned(files, tmp_path / "out", caplog) == []
    assert warned(files, tmp_path / "selecting", caplog, "--mode", "select") == []


def test_validation_that_overlaps_training_is_a_warning_with_numbers(files, tmp_path, caplog):
    with files["--data"].open("a") as file:
        file.write(files["--val"].read_text())
    (warning,) = warned(files, tmp_path / "out", caplog)
    assert warning.startswith("6 of 36 documents removed from train: they are in validation or test too")
    assert "take them out of --data" in warning


def test_training_data_that_are_all_validation_data_are_refused(files, tmp_path, capsys):
    files["--val"].write_text(files["--data"].read_text())
    refused(
        files, tmp_path / "out", capsys, "train is empty: all 30 of its documents", "name other documents for --data"
    )


@pytest.mark.parametrize("flag", ["--data", "--val", "--test"])
@pytest.mark.parametrize("content", ["", json.dumps({"text": ""}) + "\n", json.dumps({"text": "too short"}) + "\n"])
def test_a_split_without_a_sample_is_refused_by_name(files, tmp_path, capsys, flag, content):
    files[flag].write_text(content)
    name = flag if "short" in content else str(files[flag])
    refused(files, tmp_path / "out", capsys, name)


def test_fewer_validation_samples_than_a_batch_are_a_warning(files, tmp_path, caplog):
    documents(files["--val"], 1, words=20, seed=7)
    (warning,) = warned(files, tmp_path / "out", caplog)
    assert "fewer than the 4 of --val-batch" in warning
    assert "give more documents to --val" in warning
    caplog.clear()
    assert warned(files, tmp_path / "uniform", caplog, "--method", "uniform") == []


@pytest.mark.parametrize(
    ("count", "words", "expected"),
    [
        (4, 20, "too few to hold some out: cotangents are towards the very documents that the profile is made of"),
        (14, 16, "validation samples are held out to judge the target profile, fewer than the 4 of --val-batch"),
    ],
)
def test_too_few_samples_to_judge_a_profile_are_a_warning(files, tmp_path, caplog, count, words, expected):
    documents(files["--val"], count, words=words, seed=7)
    (warning,) = warned(files, tmp_path / "out", caplog, "--mode", "select")
    assert expected in warning


@pytest.mark.parametrize(
    ("limit", "mode", "what"),
    [
        ("max_weighters_per_tenant", "weight", "1 weighters, as many as a tenant may have"),
        ("max_references_per_tenant", "select", "1 uploaded references, as many as a tenant may have"),
    ],
)
def test_a_service_without_room_for_a_new_run_is_a_mistake(files, tmp_path, capsys, limit, mode, what):
    """It does not pass by itself, and the run would be one without a weighter to its end."""
    service = ServiceThread(tmp_path / "state", **{limit: 1})
    url, more = service.address.grpc_url, ["--mode", mode, "--weighter", service.address.grpc_url]
    try:
        assert main(flags(files, tmp_path / "first", *more)) == 0
        again = flags(files, tmp_path / "second", *more, "--weighter-name", "another", "--seq-len", "12")
        capsys.readouterr()
        assert main(again) == 2
        assert what in capsys.readouterr().err
        assert not (tmp_path / "second" / "summary.json").exists()
        with connect(url) as client:
            client.delete_weighter("default")
            for reference in client.list_references():
                if reference.name.startswith("run-"):
                    client.delete_reference(reference.name)
        assert main([*again, "--overwrite"]) == 0
    finally:
        service.stop()
