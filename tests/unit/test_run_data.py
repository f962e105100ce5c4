"""Corpora without overlap, samples of one document each, and a batch order that needs nothing but the step."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from trainer_client.run.data import (
    BatchOrder,
    CandidateOrder,
    Corpus,
    Document,
    load_corpus,
    load_documents,
    make_samples,
    unigram_counts,
)
from trainer_client.run.tokenizer import Tokenizer, train_tokenizer
from weighting_contract.errors import InvalidArgument


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts(documents: tuple[Document, ...]) -> list[str]:
    return [document.text for document in documents]


@pytest.fixture(scope="module")
def builtin() -> Corpus:
    return load_corpus("builtin")


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """A token a byte: sizes can be counted by hand."""
    return train_tokenizer(["ab"], 256)


# ---- Corpora ---------------------------------------------------------------------------------------------------------


def test_builtin_corpus_by_name(builtin: Corpus) -> None:
    assert {document.source for document in builtin.train} == {"prose", "code", "tables", "noise"}
    assert {document.source for document in (*builtin.validation, *builtin.test)} == {"prose"}
    assert tuple(load_documents("builtin")) == builtin.train


def test_own_data_towards_the_builtin_target(tmp_path: Path, builtin: Corpus) -> None:
    corpus = load_corpus(["builtin", write(tmp_path / "train.jsonl", ["mine"])], ["builtin"])
    assert corpus.train == (*builtin.train, Document("mine", "train"))
    assert (corpus.validation, corpus.test) == (builtin.validation, builtin.test)


def test_validation_is_split_in_two_halves_that_share_nothing(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["t"])
    val = write(tmp_path / "val.jsonl", [f"v{i}" for i in range(10)] + ["v0", "v1 "])
    corpus = load_corpus(train, val)
    assert sorted(texts(corpus.validation) + texts(corpus.test)) == sorted(f"v{i}" for i in range(10))
    assert len(corpus.validation) == len(corpus.test) == 5
    reordered = write(tmp_path / "reordered.jsonl", [f"v{i}" for i in reversed(range(10))])
    again = load_corpus(train, reordered)
    assert (texts(again.validation), texts(again.test)) == (texts(corpus.validation), texts(corpus.test))


def test_splits_never_overlap_and_the_count_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", ["a", "b", "c", "d  d\n", "a"])
    val = write(tmp_path / "val.jsonl", ["b", "x", "y"])
    test = write(tmp_path / "test.jsonl", ["d d", "y"])
    corpus = load_corpus(train, val, test)
    assert texts(corpus.train) == ["a", "c", "a"]
    assert texts(corpus.validation) == ["b", "x"]
    assert texts(corpus.test) == ["d d", "y"]
    of_validation, of_train = corpus.warnings
    assert of_train.startswith("2 of 5 documents removed from train: they are in validation or test too")
    assert of_validation.startswith("1 of 3 documents removed from validation: they are in test too")
    assert ("take them out of --data" in of_train, "take them out of --val" in of_validation) == (True, True)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", w) for w in corpus.warnings]
    assert load_corpus(write(tmp_path / "other.jsonl", ["c"]), val, write(tmp_path / "t.jsonl", ["z"])).warnings == ()


@pytest.mark.parametrize(
    ("train", "val", "test", "message"),
    [
        (["a"], None, None, "val is missing"),
        (["a"], ["v"], None, "val has only one document"),
        (["a"], ["v", " v"], None, "val has only one document"),
        (["v", "w"], ["v", "w"], None, "train is empty: all 2 of its documents are in validation or test"),
        (["a"], ["v"], ["v"], "validation is empty: all 1 of its documents are in test"),
        ([], ["v"], ["w"], "holds no documents"),
    ],
)
def test_corpora_that_cannot_be(
    tmp_path: Path, train: list[str], val: list[str] | None, test: list[str] | None, message: str
) -> None:
    names = [
        None if t is None else write(tmp_path / f"{n}.jsonl", t) for n, t in (("t", train), ("v", val), ("e", test))
    ]
    assert names[0] is not None
    with pytest.raises(InvalidArgument, match=message):
        load_corpus(names[0], names[1], names[2])


def test_no_names_at_all() -> None:
    with pytest.raises(InvalidArgument, match="names nothing"):
        load_corpus([], "builtin")


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_windows_cover_a_document_and_never_cross_into_another(byte_tokenizer: Tokenizer) -> None:
    documents = [Document("abcdefghij", "s"), Document("xyz", "r"), Document("ABCDE", "r")]
    samples = make_samples(documents, byte_tokenizer, 4)
    decoded = [byte_tokenizer.decode(row.tolist()) for row in samples.tokens]
    assert decoded == ["abcde", "efghi", "ABCDE"]
    assert samples.sources == ("r", "s")
    assert [samples.sources[i] for i in samples.source_index] == ["s", "s", "r"]
    assert (samples.dropped_documents, samples.dropped_tokens) == (1, 1 + 3)
    assert samples.tokens.dtype == np.uint16
    np.testing.assert_array_equal(samples.inputs[:, 1:], samples.labels[:, :-1])
    assert samples.inputs.shape == samples.labels.shape == (3, 4)


def test_dropped_documents_are_logged_and_progress_is_reported(
    byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO):
        make_samples(
            [Document("x" * (i + 1), "s") for i in range(100)], byte_tokenizer, 50, progress=lambda *a: seen.append(a)
        )
    assert "50 of 100 documents are shorter than a sample" in caplog.text
    assert seen == [(64, 100, "tokenizing"), (100, 100, "tokenizing")]


@pytest.mark.parametrize(("seq_len", "message"), [(0, "--seq-len is 0"), (9, "none of 1 documents has the 10 tokens")])
def test_no_samples(byte_tokenizer: Tokenizer, seq_len: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_samples([Document("abc", "s")], byte_tokenizer, seq_len)


def test_unigram_counts_are_those_of_the_labels(byte_tokenizer: Tokenizer) -> None:
    samples = make_samples([Document("aabab" * 20, "s")], byte_tokenizer, 7)
    counts = unigram_counts(samples, 256)
    assert counts.shape == (256,)
    assert counts.sum() == samples.labels.size
    for token in range(256):
        assert counts[token] == (samples.labels == token).sum()
    with pytest.raises(InvalidArgument, match="vocab_size is 10, but the samples hold token id"):
        unigram_counts(samples, 10)


def test_large_vocabularies_take_wider_ids() -> None:
    backend = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    samples = make_samples([Document("w69999 w1 w65536", "s")], Tokenizer(backend), 2)
    assert samples.tokens.dtype == np.uint32
    assert samples.tokens.tolist() == [[69_999, 1, 65_536]]


# ---- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (10, 4), (7, 7), (5, 3)])
def test_every_sample_comes_once_an_epoch(count: int, batch_size: int) -> None:
    order = BatchOrder(range(count), batch_size, seed=3)
    stream = np.concatenate([order.indices(step) for step in range(3 * count)])
    epochs = stream[: len(stream) // count * count].reshape(-1, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs[:3]}) == 3


def test_the_order_needs_only_the_step() -> None:
    first, second = BatchOrder(range(50), 8, seed=1), BatchOrder(range(50), 8, seed=1)
    expected = [first.indices(step) for step in range(40)]
    for step in (39, 0, 6, 20, 6):
        np.testing.assert_array_equal(second.indices(step), expected[step])
    other = BatchOrder(range(50), 8, seed=2)
    assert any((other.indices(step) != expected[step]).any() for step in range(3))


def test_a_batch_may_be_changed_by_its_caller() -> None:
    order = BatchOrder(range(10), 4, seed=0)
    before = order.indices(0).copy()
    order.indices(0)[:] = -1
    np.testing.assert_array_equal(order.indices(0), before)


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "message"),
    [
        (3, 4, 0, "there are 3 samples, fewer than one batch of 4"),
        (3, 0, 0, "--batch-size is 0"),
        (3, 2, -1, "seed is -1"),
    ],
)
def test_impossible_orders(count: int, batch_size: int, seed: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        BatchOrder(range(count), batch_size, seed)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="step is -1"):
        BatchOrder(range(4), 2, 0).indices(-1)


def test_the_demo_has_about_an_epoch_of_data(builtin: Corpus) -> None:
    tokenizer = train_tokenizer(texts(builtin.train), 1024)
    samples = make_samples(builtin.train, tokenizer, 64)
    assert 0.8 < 600 * 32 / len(samples) < 1.3
    prose = np.mean(samples.source_index == samples.sources.index("prose"))
    assert 0.15 < prose < 0.25
    assert len(make_samples(builtin.test, tokenizer, 64)) > 300


# ---- Groups and lengths ---------------------------------------------------------------------------------------------


def test_training_documents_must_have_the_field_that_they_are_grouped_by(tmp_path):
    rows = [{"text": f"document {n}", "topic": "odd" if n % 2 else "even"} for n in range(4)]
    pool, val = tmp_path / "pool.jsonl", write(tmp_path / "val.jsonl", ["one", "two"])
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(pool), val, group_by="topic")
    assert [document.source for document in corpus.train] == ["even", "odd", "even", "odd"]
    assert {document.source for document in corpus.validation} == {"no topic"}  # only the pool is asked to have it
    with pytest.raises(
        InvalidArgument, match="--group-by is colour, but none of the 4 training documents has that field"
    ):
        load_corpus(str(pool), val, group_by="colour")


def test_documents_keep_their_tokens_with_the_rests(byte_tokenizer):
    documents = [Document("abcdefghij", "s"), Document("xyz", "r"), Document("ABCDEFG", "r")]
    samples = make_samples(documents, byte_tokenizer, 4)
    assert samples.document_tokens.tolist() == [10, 7]  # the second is too short for a sample
    assert samples.document_tokens[samples.document_index].tolist() == [10, 10, 7]


@pytest.mark.parametrize("count", [20, 21, 1000])
def test_candidates_are_the_batch_without_a_choice_and_others(count: int) -> None:
    order, without = CandidateOrder(range(count), 4, candidates=5, seed=3), BatchOrder(range(count), 4, seed=3)
    again = CandidateOrder(range(count), 4, candidates=5, seed=3)
    assert order.batch_size == 20
    others = []
    for step in range(60):
        indices = order.indices(step)
        assert len(indices) == 20
        assert indices[:4].tolist() == without.indices(step).tolist()
        assert len(set(indices[4:].tolist()) - set(indices[:4].tolist())) == 16, "none of the others comes twice"
        others += indices[4:].tolist()
    assert order.indices(7).tolist() == again.indices(7).tolist()
    other_seed = CandidateOrder(range(count), 4, candidates=5, seed=4)
    assert order.indices(0).tolist() != other_seed.indices(0).tolist()
    often = np.bincount(others, minlength=count)
    assert often.min() >= (0 if count == 1000 else 30), "the others come from all samples alike"
    assert often.max() <= (6 if count == 1000 else 60)


def test_all_candidates_in_the_order_they_come_first() -> None:
    order = CandidateOrder(range(50), 4, candidates=3, seed=0)
    naive = list(dict.fromkeys(int(i) for step in range(3) for i in order.indices(step)))
    assert order.drawn(3).tolist() == naive
    assert sorted(order.drawn(1000).tolist()) == list(range(50))
    assert order.drawn(0).tolist() == []


def test_candidates_of_one_batch_are_the_batch() -> None:
    order, without = CandidateOrder(range(9), 4, candidates=1, seed=3), BatchOrder(range(9), 4, seed=3)
    assert [order.indices(step).tolist() for step in range(5)] == [without.indices(step).tolist() for step in range(5)]


def test_fewer_samples_than_candidates_are_an_error() -> None:
    with pytest.raises(InvalidArgument, match="there are 19 samples, fewer than the 5 x 4 candidates of a step"):
        CandidateOrder(range(19), 4, candidates=5, seed=0)
