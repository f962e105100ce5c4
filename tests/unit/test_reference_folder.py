"""References as folders: what is written is what is read, and each kind of damage is one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from reference_models import GPT2, LLAMA, SEQ_LEN, VOCABULARY, counted_reference, counts, random_rows, reference

from trainer_client.run.tokenizer import train_tokenizer
from weighting_contract.counted import CountedModel
from weighting_contract.errors import AlreadyExists, InvalidArgument
from weighting_contract.reference import (
    CONTENT,
    FILES,
    MODEL,
    check_reference,
    read_counts,
    reference_checksum,
    reference_files,
    write_reference,
)
from weighting_contract.statistics import raw_statistics, unigram_nll_table
from weighting_service.reference import load_reference

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def files() -> Files:
    return reference()


def put(folder: Path, files: Files) -> Path:
    """The files as they are, unchecked."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def signed(files: Files, **info: Any) -> Files:
    """With a manifest that fits the changed contents: damage that no checksum shows."""
    values = {**json.loads(files["reference.json"]), **info}
    values["tokenizer_checksum"] = hashlib.sha256(files["tokenizer.json"]).hexdigest()
    values["checksum"] = reference_checksum(files, values["seq_len"])
    return {**files, "reference.json": json.dumps(values).encode()}


# ---- Reading and writing --------------------------------------------------------------------------------------------


def test_a_folder_holds_what_was_written(tmp_path: Path, files: Files) -> None:
    folder = write_reference(tmp_path / "deep" / "reference", files)
    assert reference_files(folder) == files
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert [p.name for p in folder.parent.iterdir()] == ["reference"]
    np.testing.assert_array_equal(read_counts(files).unigrams, counts().unigrams)
    np.testing.assert_array_equal(read_counts(files).ngrams, counts().ngrams)


def test_the_checksum_is_as_documented(files: Files) -> None:
    text = f"weighbridge-reference-1;seq_len={SEQ_LEN};".encode()
    for name in ("config.json", "counts.safetensors", "model.safetensors", "tokenizer.json"):
        text += f"{name}:{len(files[name])};".encode() + files[name]
    info = check_reference(files, "here")
    assert info.checksum == hashlib.sha256(text).hexdigest()
    assert info.tokenizer_checksum == hashlib.sha256(files["tokenizer.json"]).hexdigest()
    assert check_reference(reference(seed=1), "here").checksum != info.checksum
    assert check_reference(reference(seq_len=SEQ_LEN - 1), "here").checksum != info.checksum


def test_writing_again_changes_nothing_and_another_one_is_refused(tmp_path: Path, files: Files) -> None:
    folder = write_reference(tmp_path / "r", files)
    before = folder.stat().st_ino
    write_reference(folder, files)
    assert folder.stat().st_ino == before
    other = reference(seed=1)
    with pytest.raises(AlreadyExists, match="holds another reference"):
        write_reference(folder, other)
    assert reference_files(folder) == files
    write_reference(folder, other, replace=True)
    assert reference_files(folder) == other
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_damaged_folder_may_be_replaced_and_other_things_never(tmp_path: Path, files: Files) -> None:
    damaged = put(tmp_path / "damaged", {**files, "model.safetensors": b""})
    write_reference(damaged, files, replace=True)
    assert reference_files(damaged) == files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(AlreadyExists, match=r"holds something else than a reference \(thesis\.txt\)"):
        write_reference(tmp_path / "mine", files, replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["../escape", "pytorch_model.bin", "model.py"])
def test_other_names_are_never_written(tmp_path: Path, files: Files, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is no file of a reference"):
        write_reference(tmp_path / "r", {**files, name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_writing_fails(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_reference(tmp_path / "r", files)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_reference(folder, reference(seed=1), replace=True)
    with pytest.raises(OSError, match="No space left"):
        write_reference(tmp_path / "new", files)
    assert reference_files(folder) == files
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_counts_beyond_32_bits_are_stored_as_the_largest() -> None:
    large = replace(counts(), ngrams=np.full(1024, 1 << 40))
    assert (read_counts(reference(counts=large)).ngrams == (1 << 32) - 1).all()


# ---- Without a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted() -> Files:
    return counted_reference()


def test_a_counted_reference_scores_by_its_counts(tmp_path: Path, counted: Files) -> None:
    folder = write_reference(tmp_path / "counted", counted)
    assert sorted(p.name for p in folder.iterdir()) == sorted(set(FILES) - set(MODEL))
    loaded, rows = load_reference(folder), random_rows(0, 12)
    tables = read_counts(counted)
    assert tables.bi_and_trigrams is not None
    model, unigrams = CountedModel(tables.unigrams, tables.bi_and_trigrams), torch.from_numpy(tables.unigrams)
    one_by_one = [
        raw_statistics(model.token_losses(row[None]), unigram_nll_table(unigrams)[row[None, 1:]])
        for row in map(torch.from_numpy, rows)
    ]
    torch.testing.assert_close(loaded.raw_statistics(rows), torch.cat(one_by_one), rtol=1e-5, atol=1e-5)
    write_reference(folder, reference(), replace=True)
    write_reference(folder, counted, replace=True)
    assert reference_files(folder) == counted, "nothing of the other one is left"


def test_a_counted_references_checksum_is_of_what_there_is(counted: Files) -> None:
    text = f"weighbridge-reference-1;seq_len={SEQ_LEN};".encode()
    for name in ("counts.safetensors", "tokenizer.json"):
        text += f"{name}:{len(counted[name])};".encode() + counted[name]
    assert check_reference(counted, "here").checksum == hashlib.sha256(text).hexdigest()
    assert check_reference(counted_reference(seed=1), "here").checksum != hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("name", sorted(set(FILES) - set(MODEL)))
def test_a_counted_reference_misses_what_it_needs(counted: Files, name: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"here: {name} is missing"):
        check_reference({n: content for n, content in counted.items() if n != name}, "here")


def _without_model(files: Files) -> Files:
    return {name: content for name, content in files.items() if name not in MODEL}


def _with_table(files: Files, bi_and_trigrams: np.ndarray) -> Files:
    tables = read_counts(files)
    stored = {"unigrams": tables.unigrams, "ngrams": tables.ngrams, "bi_and_trigrams": bi_and_trigrams}
    return {**files, "counts.safetensors": safetensors.numpy.save(stored)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda model, counted: _without_model(model), "config.json is missing, and so is `bi_and_trigrams`"),
        (lambda model, counted: {**counted, "config.json": model["config.json"]}, "model.safetensors is missing"),
        (
            lambda model, counted: {**model, "counts.safetensors": counted["counts.safetensors"]},
            "`bi_and_trigrams`, which a",
        ),
        (lambda model, counted: _with_table(counted, np.zeros(1000, np.int64)), "shape \\[1000\\], expected"),
        (lambda model, counted: _with_table(counted, np.zeros((4, 4), np.int64)), "shape \\[4, 4\\], expected"),
        (lambda model, counted: _with_table(counted, np.full(1024, -1)), "counts below 0"),
        (lambda model, counted: _with_table(counted, np.zeros(1024)), "counts that are no integers"),
    ],
)
def test_a_model_or_its_counts(
    files: Files, counted: Files, changed: Callable[[Files, Files], Files], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_reference(signed(changed(files, counted)), "here")


# ---- Damage ---------------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no reference at .*absent: expected a folder with config\.json"):
        load_reference(tmp_path / "absent")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(tmp_path: Path, files: Files, name: str) -> None:
    folder = put(tmp_path / "r", {n: content for n, content in files.items() if n != name})
    with pytest.raises(InvalidArgument, match=rf"{name} is missing; a reference is"):
        load_reference(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "counts.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(tmp_path: Path, files: Files, name: str, kept: int) -> None:
    folder = put(tmp_path / "r", {**files, name: files[name][:kept]})
    with pytest.raises(InvalidArgument, match=rf"{name} is truncated or damaged"):
        load_reference(folder)


@pytest.mark.parametrize("name", CONTENT)
def test_a_changed_byte(tmp_path: Path, files: Files, name: str) -> None:
    folder = put(tmp_path / "r", {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])})
    with pytest.raises(InvalidArgument, match=r"checksum [0-9a-f]{12}\.\.\., but reference\.json names"):
        load_reference(folder)


def test_another_seq_len_is_another_reference(tmp_path: Path, files: Files) -> None:
    changed = {**json.loads(files["reference.json"]), "seq_len": SEQ_LEN - 1}
    folder = put(tmp_path / "r", {**files, "reference.json": json.dumps(changed).encode()})
    with pytest.raises(InvalidArgument, match="a file was changed or belongs to another reference"):
        load_reference(folder)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (b"{", r"reference\.json is not the description of a reference"),
        (b"[]", r"reference\.json is not the description of a reference"),
        (b"{}", r"reference\.json is not the description of a reference"),
        (b'{"format": 2}', r"has format 2, this version reads 1"),
        (b'{"format": 1}', r"has checksum None, expected str"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, files: Files, manifest: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        load_reference(put(tmp_path / "r", {**files, "reference.json": manifest}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_len", 0),
        ("seq_len", "64"),
        ("seq_len", 10**30),
        ("steps", True),
        ("steps", -1),
        ("loss", None),
        ("loss", float("nan")),
        ("trained_on", "\ud800"),
    ],
)
def test_a_manifest_with_a_wrong_value(tmp_path: Path, files: Files, field: str, value: Any) -> None:
    changed = {**json.loads(files["reference.json"]), field: value}
    with pytest.raises(InvalidArgument, match=rf"reference\.json(: | has ).*{field}"):
        load_reference(put(tmp_path / "r", {**files, "reference.json": json.dumps(changed).encode()}))


def test_another_tokenizer(tmp_path: Path, files: Files) -> None:
    other = train_tokenizer(["another corpus altogether, " * 9], 280).to_json().encode()
    with pytest.raises(InvalidArgument, match="it is another tokenizer than the reference was made with"):
        load_reference(put(tmp_path / "r", {**files, "tokenizer.json": other}))
    with pytest.raises(InvalidArgument, match=r"the tokenizer has \d+ tokens, but .* are of 300"):
        load_reference(put(tmp_path / "s", signed({**files, "tokenizer.json": other})))


def test_a_model_of_a_smaller_vocabulary(tmp_path: Path) -> None:
    smaller = reference({**LLAMA, "vocab_size": VOCABULARY - 1})
    with pytest.raises(InvalidArgument, match="the model knows 299 tokens, but its tokenizer has 300"):
        load_reference(write_reference(tmp_path / "r", smaller))


def _without_norm(files: Files) -> Files:
    tensors = safetensors.torch.load(files["model.safetensors"])
    del tensors["model.norm.weight"]
    return {**files, "model.safetensors": safetensors.torch.save(tensors)}


def _not_finite(files: Files) -> Files:
    tensors = safetensors.torch.load(files["model.safetensors"])
    tensors["model.norm.weight"][3] = torch.nan
    return {**files, "model.safetensors": safetensors.torch.save(tensors)}


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ({"unigrams": torch.zeros(VOCABULARY, dtype=torch.bfloat16)}, r"counts\.safetensors can't be read"),
        ({"ngrams": torch.full((1024,), torch.nan)}, "counts that are no integers"),
        ({"ngrams": torch.full((1024,), -1)}, "counts below 0"),
        ({"other": torch.zeros(1)}, "lacks 'ngrams'"),
    ],
)
def test_counts_that_are_none(files: Files, counted: dict[str, torch.Tensor], words: str) -> None:
    tensors = {} if "other" in counted else safetensors.torch.load(files["counts.safetensors"])
    changed = {**files, "counts.safetensors": safetensors.torch.save({**tensors, **counted})}
    with pytest.raises(InvalidArgument, match=words):
        check_reference(signed(changed), "here")


def _config(**changes: Any) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        return {**files, "config.json": json.dumps({**json.loads(files["config.json"]), **changes}).encode()}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: {**files, "config.json": b"{"}, r"config\.json is not JSON"),
        (lambda files: {**files, "tokenizer.json": b"{}"}, r"tokenizer\.json is not a tokenizer that can be read"),
        (_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), r"config\.json sets 'auto_map'"),
        (_config(model_type="no-such-model"), "the model can't be loaded"),
        (_config(hidden_size=64), "the model can't be loaded"),
        (_config(max_position_embeddings=SEQ_LEN - 1), r"the model takes at most 23 tokens, but .* seq_len 24"),
        (_without_norm, r"lacks 1 of the model's tensors, the first is 'model\.norm\.weight'"),
        (_not_finite, "gives losses that are not finite"),
    ],
)
def test_contents_that_fit_no_model(tmp_path: Path, files: Files, change: Callable[[Files], Files], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        load_reference(put(tmp_path / "r", signed(change(files))))


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "bert",
            "is_decoder": False,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": SEQ_LEN,
            "initializer_range": 0.3,
        },
        {**LLAMA, "model_type": "granite", "logits_scaling": 4.0},
    ],
    ids=["looks ahead", "scales its logits"],
)
def test_models_whose_losses_would_be_wrong_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_reference(tmp_path / "odd", reference(config))
    with pytest.raises(InvalidArgument, match=f"'odd' is a '{config['model_type']}' whose losses change with padding"):
        load_reference(folder)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_names_are_the_folders_or_given(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_reference(tmp_path / "small-one", reference(config))
    assert load_reference(folder).name == "small-one"
    assert load_reference(folder, name="other", tokens_per_pack=99).tokens_per_pack == 99


def test_references_that_are_loaded_at_the_same_time_are_whole(tmp_path: Path) -> None:
    """transformers builds a model by changing what all threads share; without care tied weights would be missing."""
    folders = [write_reference(tmp_path / str(seed), reference(seed=seed)) for seed in range(2)]
    rows = torch.randint(VOCABULARY, (3, SEQ_LEN))
    alone = [load_reference(folder).raw_statistics(list(rows.numpy())) for folder in folders]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(load_reference, folders * 6))
    for i, loaded in enumerate(together):
        torch.testing.assert_close(loaded.raw_statistics(list(rows.numpy())), alone[i % 2])
