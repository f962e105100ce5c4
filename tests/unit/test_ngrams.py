"""The hashed n-gram profile against a naive implementation with dictionaries and Python's integers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from weighting_contract import ngrams
from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import count_ngrams, log_ratios, ngram_log_ratio, ngram_statistics, profile_table
from weighting_contract.statistics import RAW_NAMES, standardise

BUCKETS = 1 << 10


def naive_bucket(gram: tuple[int, ...], buckets: int) -> int:
    """As the module's docstring says it, with integers of any size."""
    word = 1 << 32
    if len(gram) == 1:
        h = (gram[0] * 0x9E3779B1 + 0xC2B2AE3D) % word
    else:
        h = (gram[0] * 0x9E3779B1 + gram[1] * 0x85EBCA77 + 0x27D4EB2F) % word
    h ^= h >> 15
    h = h * 0x2C1B3C6D % word
    h ^= h >> 12
    return h * buckets // word


def naive_grams(row: list[int]) -> list[tuple[int, ...]]:
    return [(a,) for a in row] + list(pairwise(row))


def naive_counts(rows: list[list[int]], buckets: int) -> np.ndarray:
    counter = Counter(naive_bucket(gram, buckets) for row in rows for gram in naive_grams(row))
    return np.array([counter[k] for k in range(buckets)])


def random_rows(seed: int, count: int = 20, vocabulary: int = 300) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, rng.integers(1, 30)).tolist() for _ in range(count)]


def padded(rows: list[list[int]], filler: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
    return tokens, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


# ---- Counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [1 << 10, 1 << 16, 1 << 20])
def test_counts_are_those_of_dictionaries(buckets: int) -> None:
    rows = random_rows(0)
    counted = count_ngrams(rows, buckets)
    assert counted.dtype == np.int64
    np.testing.assert_array_equal(counted, naive_counts(rows, buckets))


def test_ids_of_any_integer_type_hash_alike() -> None:
    largest = [4_294_967_295, 70_000, 0, 2_147_483_648]
    np.testing.assert_array_equal(count_ngrams([np.array(largest, np.uint32)]), naive_counts([largest], 1 << 16))
    small = [1, 2, 65_535]
    for dtype in (np.uint16, np.uint32, np.int32, np.int64):
        np.testing.assert_array_equal(count_ngrams([np.array(small, dtype)]), naive_counts([small], 1 << 16))


def test_bigrams_do_not_span_rows_wherever_the_chunks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*random_rows(1), [], [5]]
    whole = count_ngrams(rows, BUCKETS)
    np.testing.assert_array_equal(whole, naive_counts(rows, BUCKETS))
    for tokens in (1, 17, 64):
        monkeypatch.setattr(ngrams, "_TOKENS_PER_CHUNK", tokens)
        np.testing.assert_array_equal(count_ngrams(iter(rows), BUCKETS), whole)


def test_a_matrix_is_its_rows_and_no_rows_are_zeros() -> None:
    matrix = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.testing.assert_array_equal(count_ngrams(matrix, BUCKETS), naive_counts(matrix.tolist(), BUCKETS))
    assert not count_ngrams([], BUCKETS).any()


def test_buckets_are_filled_as_if_at_random() -> None:
    """Ids are small and regular; their n-grams must not pile up for that."""
    pairs = np.stack(np.meshgrid(np.arange(128), np.arange(128)), -1).reshape(-1, 2)
    unigrams = count_ngrams(pairs[:, :1], len(pairs)) + count_ngrams(pairs[:, 1:], len(pairs))
    bigrams = count_ngrams(pairs, len(pairs)) - unigrams
    assert bigrams.sum() == len(pairs)
    assert (bigrams > 0).mean() == pytest.approx(1 - math.exp(-1), abs=0.01)
    assert bigrams.var() == pytest.approx(1, abs=0.05)  # Poisson of mean 1


# ---- Log ratios -----------------------------------------------------------------------------------------------------


def test_log_ratios_are_of_frequencies_scaled_to_the_smaller_table_and_smoothed() -> None:
    target, pool = naive_counts(random_rows(2, 5), BUCKETS), naive_counts(random_rows(3, 40), BUCKETS)
    ratios = log_ratios(target, pool, smoothing=0.5)
    assert ratios.dtype == np.float16
    scale = target.sum() / pool.sum()
    expected = [math.log((t + 0.5) / (scale * p + 0.5)) for t, p in zip(target, pool, strict=True)]
    np.testing.assert_allclose(ratios, expected, atol=2e-3)
    np.testing.assert_allclose(log_ratios(pool, target, smoothing=0.5), -ratios, atol=2e-3)


def test_equal_distributions_and_unseen_ngrams_are_neutral() -> None:
    pool = naive_counts(random_rows(4), BUCKETS)
    assert not log_ratios(pool, 5 * pool).any()
    target = np.zeros(BUCKETS)
    target[0] = 10
    ratios = log_ratios(target, pool)
    assert ratios[0] > 1
    assert not ratios[(pool == 0) & (target == 0)].any()


# ---- The statistic --------------------------------------------------------------------------------------------------


def test_the_statistic_is_the_mean_over_the_ngrams_of_a_sample() -> None:
    rows = random_rows(5)
    table = np.random.default_rng(0).normal(size=BUCKETS).astype(np.float16)
    given = ngram_log_ratio(*padded(rows), profile_table(table))
    expected = [np.mean([float(table[naive_bucket(gram, BUCKETS)]) for gram in naive_grams(row)]) for row in rows]
    assert given.dtype == torch.float32
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert torch.equal(given, ngram_log_ratio(*padded(rows, filler=0), profile_table(table)))
    half = ngram_log_ratio(*padded(rows), torch.from_numpy(table))
    assert torch.equal(given, half)


def test_the_target_scores_above_the_pool() -> None:
    rng = np.random.default_rng(0)
    target, other = rng.integers(0, 40, (50, 20)), rng.integers(20, 60, (50, 20))
    table = profile_table(log_ratios(count_ngrams(target[:25]), count_ngrams([*target[25:], *other])))
    tokens = torch.from_numpy(np.concatenate([target[25:], other]))
    given = ngram_log_ratio(tokens, torch.ones_like(tokens, dtype=torch.bool), table)
    assert given[:25].min() > given[25:].max()


def test_columns_are_standardised_as_the_portable_statistics_are() -> None:
    rows = random_rows(6)
    tokens, mask = padded([*rows, [1]])
    mask[-1] = False
    table = profile_table(np.random.default_rng(1).normal(size=BUCKETS))
    given = ngram_statistics(tokens, mask, table)
    raw = ngram_log_ratio(tokens, mask, table)
    assert given.shape == (len(rows) + 1, len(ngrams.NGRAM_NAMES))
    assert torch.equal(given[:, 0], raw)
    assert not given[-1].any()
    portable = torch.zeros(len(raw), len(RAW_NAMES))
    portable[:, RAW_NAMES.index("tokens")] = mask.sum(1)
    portable[:, RAW_NAMES.index("loss_mean")] = raw
    assert torch.equal(given[:, 1], standardise(portable)[:, 0])
    expected = (raw[:-1].double() - raw[:-1].double().mean()) / raw[:-1].double().std(correction=0)
    torch.testing.assert_close(given[:-1, 1].double(), expected, atol=1e-5, rtol=1e-5)


def test_values_are_bounded() -> None:
    tokens = torch.arange(8)[:, None]
    far = ngram_statistics(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.full((BUCKETS,), -500.0))
    assert far[:, 0].tolist() == [-10] * 8
    assert not far[:, 1].any()


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [0, 512, 1000, 1 << 21, -4])
def test_wrong_numbers_of_buckets(buckets: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"buckets is {buckets}, expected a power of two from 1024 to 1048576"):
        count_ngrams([[1]], buckets)


@pytest.mark.parametrize("row", [[1.5], [-1], [[1, 2]], 3, ["a"]])
def test_rows_that_are_none(row: object) -> None:
    with pytest.raises(InvalidArgument, match=r"rows\[1\] is no row of token ids"):
        count_ngrams([[1], row], BUCKETS)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("target", "pool", "smoothing", "words"),
    [
        (np.ones(1000), np.ones(1024), 1.0, r"target_counts has shape \[1000\], expected \[buckets\], a power of two"),
        (np.ones(1024), np.ones((1, 1024)), 1.0, r"pool_counts has shape \[1, 1024\]"),
        (np.ones(1024), np.ones(2048), 1.0, "target_counts has 1024 buckets and pool_counts 2048"),
        (np.zeros(1024), np.ones(1024), 1.0, "target_counts is all zeros"),
        (-np.ones(1024), np.ones(1024), 1.0, "target_counts holds values that are negative"),
        (np.ones(1024), np.full(1024, np.nan), 1.0, "pool_counts holds values that are negative or not finite"),
        (np.ones(1024), np.ones(1024), 0.0, r"smoothing is 0\.0, expected a finite number above 0"),
        (np.ones(1024), np.ones(1024), math.inf, "smoothing is inf"),
    ],
)
def test_counts_without_a_ratio(target: np.ndarray, pool: np.ndarray, smoothing: float, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        log_ratios(target, pool, smoothing)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros(1000, np.float16), r"profile has shape \[1000\], expected \[buckets\], a power of two"),
        (np.zeros((2, 1024), np.float16), r"profile has shape \[2, 1024\]"),
        (np.zeros(1024, np.int32), "profile is int32, expected floating log ratios"),
        (np.where(np.arange(1024) == 3, np.inf, 0), r"profile\[3\] is inf, expected finite"),
    ],
)
def test_tables_from_outside_are_checked(values: np.ndarray, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        profile_table(values)


@pytest.mark.parametrize(
    ("tokens", "mask", "table", "words"),
    [
        (torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(1024), r"tokens is float32 of shape \[2\]"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), torch.ones(1024), "tokens is float32"),
        (torch.ones(0, 2).long(), torch.ones(0, 2).bool(), torch.ones(1024), "with B and T of 1 or more"),
        (torch.ones(2, 2).long(), torch.ones(2, 2), torch.ones(1024), "mask is float32"),
        (torch.ones(2, 2).long(), torch.ones(2, 3).bool(), torch.ones(1024), r"mask is bool of shape \[2, 3\]"),
        (torch.ones(2, 2).long(), torch.ones(2, 2).bool(), torch.ones(1023), r"table has shape \[1023\]"),
        (torch.ones(2, 2).long(), torch.ones(2, 2).bool(), torch.ones(1024).long(), "table is int64"),
    ],
)
def test_batches_that_do_not_fit(tokens: torch.Tensor, mask: torch.Tensor, table: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ngram_log_ratio(tokens, mask, table)
