"""References of runs: trained once and cached, of a folder, or one sentence; and profiles that belong to the run."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer_client.profile import save_profile
from trainer_client.reference.config import COUNTED, SMALLEST, ReferenceConfig
from trainer_client.run import reference as reference_module
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Samples
from trainer_client.run.methods.models import pool_model
from trainer_client.run.models import build_model, count_config_parameters, count_parameters
from trainer_client.run.reference import RunReference, given_reference, made_reference, reference_recipe
from trainer_client.run.target import job_profile
from trainer_client.run.task import Task
from trainer_client.run.tokenizer import train_tokenizer
from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import count_ngrams
from weighting_contract.profile import make_profile
from weighting_contract.reference import FILES, MODEL, check_reference, read_counts, write_reference

CPU = torch.device("cpu")
RECIPE = ReferenceConfig(size=SMALLEST, steps=5)
CONFIG = RunConfig(data=("pool.jsonl",), val=("val.jsonl",), vocab_size=300, seq_len=8, out="nowhere")


@pytest.fixture(scope="module")
def task() -> Task:
    tokenizer = train_tokenizer(["some text"], 300)
    rng = np.random.default_rng(0)
    train, val = (
        Samples(rng.integers(0, 250, (n, 9)).astype(np.uint16), np.zeros(n, np.int64), ("a",)) for n in (40, 6)
    )
    order = BatchOrder(train, 8, seed=0)
    return Task(
        tokenizer, train, val, val, order, order, torch.zeros(tokenizer.vocab_size), seed=0, val_checksum="5" * 64
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(task: Task, cache: Path) -> RunReference:
    return made_reference(CONFIG, task, CPU, None, cache_dir=cache, recipe=RECIPE)


def test_the_job_s_samples_make_its_reference(task: Task, reference: RunReference) -> None:
    assert reference.name == f"run-{reference.checksum[:16]}"
    assert reference.tokenizer_checksum == hashlib.sha256(task.tokenizer.to_json().encode()).hexdigest()
    assert reference.tokenizer.checksum == task.tokenizer.checksum
    assert reference.seq_len == 8
    np.testing.assert_array_equal(reference.ngrams, count_ngrams(task.train.tokens))
    pico = count_parameters(build_model("pico", task.tokenizer.vocab_size, 8, seed=0))
    assert reference.parameters == pico
    assert reference.trained_flops == 6 * pico * 5 * 32 * 8


def test_where_nothing_is_said_it_is_counted(task: Task, tmp_path: Path) -> None:
    counted = made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path)
    assert (counted.parameters, counted.trained_flops) == (0, 0)
    assert counted.files is not None
    assert counted.files.keys() == set(FILES) - set(MODEL)
    info = check_reference(counted.files, "here")
    assert info.steps == 0
    assert 4 < info.loss < np.log(task.tokenizer.vocab_size), "random samples, of which an occurrence is left out"
    assert made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path).files == counted.files
    copied = write_reference(tmp_path / "copied", counted.files)
    given = given_reference(dataclasses.replace(CONFIG, reference=str(copied)))
    assert given is not None
    assert (given.checksum, given.parameters) == (counted.checksum, 0)
    with pytest.raises(InvalidArgument, match=r"is counted, but this job has a method that reads .* a model: name one"):
        pool_model(given)


def test_repeated_samples_are_counted_once(task: Task, tmp_path: Path) -> None:
    order = np.tile(np.arange(len(task.train.tokens)), 3)
    repeated = dataclasses.replace(task.train, tokens=task.train.tokens[order], source_index=np.zeros(len(order), int))
    once, thrice = (
        made_reference(CONFIG, dataclasses.replace(task, train=train), CPU, None, cache_dir=tmp_path).files
        for train in (task.train, repeated)
    )
    assert once is not None
    assert thrice is not None
    a, b = read_counts(once), read_counts(thrice)
    np.testing.assert_array_equal(a.unigrams, b.unigrams)
    np.testing.assert_array_equal(a.bi_and_trigrams, b.bi_and_trigrams)
    np.testing.assert_array_equal(3 * a.ngrams, b.ngrams)  # a profile is against the pool as it is drawn from


def test_of_a_pool_that_is_too_large_to_be_counted_a_model_is_trained(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reference_recipe(task).size == COUNTED
    monkeypatch.setattr(reference_module, "MOST_TOKENS", task.train.tokens.size - 1)
    assert reference_recipe(task).size == SMALLEST


def test_equal_samples_take_it_from_the_cache_and_others_do_not(
    task: Task, reference: RunReference, cache: Path
) -> None:
    (folder,) = cache.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    steps: list[str] = []
    again = made_reference(
        CONFIG, task, CPU, lambda done, total, what: steps.append(what), cache_dir=cache, recipe=RECIPE
    )
    assert again.files == reference.files
    assert steps == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    other = dataclasses.replace(task, train=dataclasses.replace(task.train, tokens=task.train.tokens[::-1].copy()))
    assert made_reference(CONFIG, other, CPU, None, cache_dir=cache, recipe=RECIPE).checksum != reference.checksum


def test_a_damaged_cache_is_trained_anew(
    task: Task, reference: RunReference, cache: Path, tmp_path: Path, caplog
) -> None:
    made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path, recipe=RECIPE)
    (folder,) = tmp_path.iterdir()
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-10])
    assert made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path, recipe=RECIPE).files == reference.files
    assert "the cached reference is damaged" in caplog.text
    assert (
        made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path, recipe=RECIPE).files == reference.files
    )  # whole again


def test_a_cache_that_can_t_be_written_is_a_warning(
    task: Task, reference: RunReference, tmp_path: Path, caplog
) -> None:
    (tmp_path / "file").touch()
    assert made_reference(CONFIG, task, CPU, None, cache_dir=tmp_path / "file", recipe=RECIPE).files == reference.files
    assert "could not be cached" in caplog.text


def test_a_folder_is_taken_with_its_tokenizer(reference: RunReference, tmp_path: Path) -> None:
    write_reference(tmp_path / "r", reference.files)
    config = dataclasses.replace(CONFIG, reference=str(tmp_path / "r"))
    given = given_reference(config)
    assert given is not None
    assert (given.checksum, given.files) == (reference.checksum, reference.files)
    assert given.trained_flops == 0
    assert given_reference(CONFIG) is None  # auto: to be trained


def test_another_tokenizer_is_one_sentence(reference: RunReference, tmp_path: Path) -> None:
    write_reference(tmp_path / "r", reference.files)
    train_tokenizer(["other text, other pieces " * 9], 270).save(tmp_path / "t.json")
    config = dataclasses.replace(CONFIG, reference=str(tmp_path / "r"), tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(InvalidArgument, match="is another tokenizer than that of --reference"):
        given_reference(config)
    reference.tokenizer.save(tmp_path / "t.json")
    assert given_reference(config) is not None


def test_a_resumed_run_goes_on_with_its_own_copy(reference: RunReference, tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", reference.files)
    config = dataclasses.replace(CONFIG, reference="no-such-folder", out=str(tmp_path), resume=True)
    given = given_reference(config)
    assert given is not None
    assert given.checksum == reference.checksum


def test_parameters_are_counted_from_the_config_alone(reference: RunReference) -> None:
    assert count_config_parameters(reference.files["config.json"]) == reference.parameters
    for wrong in (b"{", b"{}", b"[]", b'{"model_type": "no-such-model"}'):
        with pytest.raises(InvalidArgument, match=r"config\.json is not the config of a causal LM"):
            count_config_parameters(wrong)


# ---- Profiles --------------------------------------------------------------------------------------------------------


def _saved(tmp_path: Path, profile, reference: RunReference, **other: str) -> str:
    checksums = {"reference_checksum": reference.checksum, "tokenizer_checksum": reference.tokenizer_checksum, **other}
    save_profile(tmp_path / "p.safetensors", profile, **checksums)
    return str(tmp_path / "p.safetensors")


def test_the_profile_is_that_of_the_validation_samples(task: Task, reference: RunReference, tmp_path: Path) -> None:
    made = job_profile("", task, reference)
    expected = make_profile(task.profile_tokens, reference.ngrams)
    np.testing.assert_array_equal(made.log_ratios, expected.log_ratios)
    of_all = make_profile(task.val.tokens, reference.ngrams)
    read = job_profile(_saved(tmp_path, of_all, reference), task, reference)
    assert read.documents_checksum == of_all.documents_checksum


def test_a_profile_of_the_whole_validation_documents_is_taken(
    task: Task, reference: RunReference, tmp_path: Path
) -> None:
    whole = dataclasses.replace(make_profile(task.val.tokens[:3], reference.ngrams), documents_checksum="5" * 64)
    assert job_profile(_saved(tmp_path, whole, reference), task, reference).documents_checksum == "5" * 64


def test_profiles_of_something_else_are_one_sentence(task: Task, reference: RunReference, tmp_path: Path) -> None:
    other = make_profile(task.val.tokens[:3], reference.ngrams)
    with pytest.raises(InvalidArgument, match="made of other documents than this run's validation set"):
        job_profile(_saved(tmp_path, other, reference), task, reference)
    small = make_profile(task.val.tokens, count_ngrams(task.train.tokens, 1 << 12))
    with pytest.raises(InvalidArgument, match=r"has 4096 buckets, but the reference .* counts 65536"):
        job_profile(_saved(tmp_path, small, reference), task, reference)
    mine = make_profile(task.val.tokens, reference.ngrams)
    with pytest.raises(InvalidArgument, match="belongs to the reference checksum 000000000000"):
        job_profile(_saved(tmp_path, mine, reference, reference_checksum="0" * 64), task, reference)
