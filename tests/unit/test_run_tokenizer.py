"""Tokenizers: deterministic training, lossless round trips, a cache that can be damaged but never lies."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from trainer_client.run.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer, train_tokenizer
from weighting_contract.errors import InvalidArgument

TEXTS = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("test_run_*.py"))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 512)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 512).checksum == tokenizer.checksum
    assert train_tokenizer(TEXTS, 500).checksum != tokenizer.checksum
    assert tokenizer.vocab_size == 512


@pytest.mark.parametrize("text", ["", " ", "plain words", "\n\n\tx  y ", "Grüße, 世界 🎲", "\x00\x7f", TEXTS[0]])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_it_compresses(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(TEXTS[:1])
    assert len(ids) < len(TEXTS[0]) / 1.8


def test_progress_covers_all_texts() -> None:
    seen: list[tuple[int, int, str]] = []
    train_tokenizer(["a b"] * 600, 260, progress=lambda *args: seen.append(args))
    assert seen[0][:2] == (0, 600)
    assert seen[-1][:2] == (600, 600)


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--vocab-size is 255, expected 256 or more"):
        train_tokenizer(TEXTS, 255)


# ---- Cache -----------------------------------------------------------------------------------------------------------


def test_the_second_call_reads_the_cache(tmp_path: Path) -> None:
    trained = cached_tokenizer(TEXTS, 300, cache_dir=tmp_path / "new" / "folder")
    (file,) = (tmp_path / "new" / "folder").iterdir()
    seen: list[tuple[int, int, str]] = []
    again = cached_tokenizer(TEXTS, 300, cache_dir=file.parent, progress=lambda *args: seen.append(args))
    assert again.checksum == trained.checksum
    assert seen == []  # nothing was trained


def test_the_key_is_texts_and_vocabulary(tmp_path: Path) -> None:
    for texts, size in ((TEXTS, 300), (TEXTS, 301), (TEXTS[1:], 300), (["".join(TEXTS)], 300)):
        cached_tokenizer(texts, size, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def _other_tokenizer(text: str) -> str:
    entry = json.loads(text)
    return json.dumps({**entry, "tokenizer": train_tokenizer(TEXTS, 290).to_json()})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"a": 1}',
        _other_tokenizer,
    ],
    ids=["cut", "empty", "list", "keys", "checksum"],
)
def test_a_damaged_cache_is_trained_again(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    assert callable(damage)
    trained = cached_tokenizer(TEXTS, 300, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    with caplog.at_level(logging.WARNING):
        again = cached_tokenizer(TEXTS, 300, cache_dir=tmp_path)
    assert "is damaged" in caplog.text
    assert again.checksum == trained.checksum
    assert file.read_text() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tokenizer = cached_tokenizer(TEXTS, 300, cache_dir=tmp_path / "file")
    assert tokenizer.vocab_size == 300
    assert "could not be cached" in caplog.text


def test_the_default_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_tokenizer(TEXTS, 300)
    assert len(os.listdir(tmp_path / "weighbridge")) == 1


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_save_and_load_from_file_and_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.checksum == tokenizer.checksum
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    values = json.loads(tokenizer.to_json())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    texts = ["a few words of text", "b"]
    assert load_tokenizer(tmp_path).encode_batch(texts) == tokenizer.encode_batch(texts)


def test_a_transformers_folder_of_an_older_format(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == len(words)
    assert loaded.encode_batch(["hello world"]) == [[5, 6]]


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no tokenizer at .*absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InvalidArgument, match="has no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
        load_tokenizer(tmp_path)
