"""Statistics by a reference model against a naive computation: each sample alone, all of its logits, float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_models import GPT2, LLAMA, SEQ_LEN, TEXTS, VOCABULARY, causal_model, counts, random_rows, reference
from tokenizers import Tokenizer

from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import check_reference, write_reference
from weighting_contract.statistics import RAW_NAMES, raw_statistics, unigram_nll_table
from weighting_service.reference import PackReport, Reference, causal, load_reference

FAMILIES = {"llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hosted(family: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = write_reference(tmp_path_factory.mktemp("models") / family, reference(FAMILIES[family]))
    return load_reference(folder)


@torch.no_grad()
def naive(config: dict[str, Any], row: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[len(RAW_NAMES)] of one sample: the whole model on it alone, all logits at once."""
    model = causal_model(config).to(dtype)
    tokens = torch.from_numpy(np.asarray(row, np.int64))
    logits = model(input_ids=tokens[None, :-1]).logits[0].to(dtype)
    losses = -logits.log_softmax(1)[torch.arange(len(tokens) - 1), tokens[1:]]
    unigram = unigram_nll_table(torch.from_numpy(counts().unigrams))[tokens[1:]]
    return raw_statistics(losses[None], unigram[None])[0]


# ---- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_those_of_each_sample_alone(hosted: Reference, family: str, dtype: torch.dtype) -> None:
    rows = random_rows(0, 12)
    given = hosted.raw_statistics(rows)
    assert (given.shape, given.dtype, given.device.type) == ((12, len(RAW_NAMES)), torch.float32, "cpu")
    assert given[:, RAW_NAMES.index("tokens")].tolist() == [len(row) - 1 for row in rows]
    expected = torch.stack([naive(FAMILIES[family], row, dtype) for row in rows])
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_companions_and_padding_do_not_matter(hosted: Reference) -> None:
    rows = random_rows(1, 40)
    together = hosted.raw_statistics(rows)
    alone = torch.cat([hosted.raw_statistics([row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_order_does_not_matter_to_the_last_bit(hosted: Reference) -> None:
    rows = [*random_rows(2, 40, longest=6), *random_rows(2, 10)]  # many of one length, in packs that differ
    given = hosted.raw_statistics(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert torch.equal(hosted.raw_statistics([rows[i] for i in order]), given[torch.from_numpy(order)])


def test_packs_of_any_size_give_the_same(hosted: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(3, 30)
    expected = hosted.raw_statistics(rows)
    for tokens in (1, 40, 200):
        monkeypatch.setattr(hosted, "tokens_per_pack", tokens)
        torch.testing.assert_close(hosted.raw_statistics(rows), expected, rtol=1e-5, atol=1e-5)
        assert hosted.last_report.packs > 1


def test_logits_are_held_for_a_chunk_only(hosted: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4, 30)
    expected = hosted.raw_statistics(rows)
    seen: list[int] = []
    hook = hosted._model._head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.numel()))
    monkeypatch.setattr(causal, "_LEAST_PLACES", 1)
    monkeypatch.setattr(causal, "_LOGIT_BYTES_CPU", 4 * 7 * hosted._model._head.weight.shape[0])
    torch.testing.assert_close(hosted.raw_statistics(rows), expected, rtol=1e-5, atol=1e-5)
    hook.remove()
    labels = sum(len(row) - 1 for row in rows)
    assert max(seen) == 7 * hosted._model._head.weight.shape[0]
    assert sum(seen) == labels * hosted._model._head.weight.shape[0]  # none for padding


def test_several_callers_get_their_own_rows(hosted: Reference) -> None:
    batches = [random_rows(5, 4), random_rows(6, 1), [], random_rows(7, 9)]
    given = hosted.raw_statistics_of([hosted.check_rows(batch) for batch in batches])
    assert [len(part) for part in given] == [4, 1, 0, 9]
    assert torch.equal(torch.cat(given), hosted.raw_statistics([row for batch in batches for row in batch]))
    assert hosted.raw_statistics_of([]) == []


def test_longer_samples_are_cut_and_counted(hosted: Reference) -> None:
    long = np.random.default_rng(0).integers(0, VOCABULARY, 3 * SEQ_LEN)
    given = hosted.raw_statistics([long, long[: SEQ_LEN + 1], long[: SEQ_LEN + 2]])
    assert hosted.max_tokens == SEQ_LEN + 1
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    assert hosted.last_report == PackReport(1, 3, SEQ_LEN, SEQ_LEN, cut_samples=2, computed_samples=(1,))


def test_rows_may_be_lists_or_arrays_of_any_integer_type(hosted: Reference) -> None:
    rows = random_rows(8, 5, longest=9)
    expected = hosted.raw_statistics(rows)
    for convert in (np.ndarray.tolist, lambda r: r.astype(np.uint16), lambda r: r.astype(np.int32)):
        assert torch.equal(hosted.raw_statistics([convert(row) for row in rows]), expected)
    matrix = np.stack([row[:2] for row in rows]).astype(np.uint16)
    assert torch.equal(hosted.raw_statistics(matrix), hosted.raw_statistics(list(matrix)))


def test_results_may_be_learned_from(hosted: Reference) -> None:
    """Scoring runs without autograd, but what comes out is an input of weighters that learn."""
    weight = torch.ones(len(RAW_NAMES), requires_grad=True)
    given = hosted.raw_statistics(random_rows(9, 3))
    (given @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, given.sum(0))


# ---- Everything else ------------------------------------------------------------------------------------------------


def test_it_says_what_it_is(hosted: Reference, family: str) -> None:
    info = check_reference(reference(FAMILIES[family]), "here")
    assert (hosted.name, hosted.vocab_size, hosted.info) == (family, VOCABULARY, info)
    assert (hosted.checksum, hosted.tokenizer_checksum) == (info.checksum, info.tokenizer_checksum)
    np.testing.assert_array_equal(hosted.ngram_counts, counts().ngrams)


def test_texts_are_tokenized_whole_by_its_own_tokenizer(hosted: Reference) -> None:
    ids = hosted.tokenize([*TEXTS[:3], "", TEXTS[0] * 50])
    backend = Tokenizer.from_str(reference()["tokenizer.json"].decode())
    assert ids == [encoding.ids for encoding in backend.encode_batch([*TEXTS[:3], "", TEXTS[0] * 50])]
    assert ids[3] == []
    assert len(ids[4]) > hosted.max_tokens
    assert backend.decode(ids[0]) == TEXTS[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([5], r"rows\[1\] has 1 tokens, expected 2 or more"),
        ([], r"rows\[1\] has 0 tokens, expected 2 or more"),
        ([1, VOCABULARY], r"rows\[1\] has the token id 300, but the reference 'llama' knows ids from 0 to 299"),
        ([1, -1], r"rows\[1\] has the token id -1"),
        ([1.0, 2.0], r"rows\[1\] is float64 of shape \[2\], expected integer token ids"),
        ([[1, 2]], r"rows\[1\] is int64 of shape \[1, 2\]"),
        ([True, False], r"rows\[1\] is bool"),
    ],
)
def test_samples_that_are_none(tmp_path: Path, row: Any, words: str) -> None:
    hosted = load_reference(write_reference(tmp_path / "llama", reference()))
    with pytest.raises(InvalidArgument, match=words):
        hosted.raw_statistics([[1, 2, 3], row])
    with pytest.raises(InvalidArgument, match=words.replace("rows", "texts")):
        hosted.check_rows([[1, 2, 3], row], "texts")
