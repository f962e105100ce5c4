"""A counted language model against counts in dictionaries, token by token."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from weighting_contract import counted
from weighting_contract.counted import PRIOR, CountedModel, count_bi_and_trigrams
from weighting_contract.errors import InvalidArgument

VOCABULARY = 40


def samples(seed: int, count: int, length: int = 9) -> np.ndarray:
    """Chains in which each token has few successors, so that there is something to predict."""
    rng = np.random.default_rng(seed)
    rows = np.empty((count, length), np.int64)
    rows[:, 0] = rng.integers(0, VOCABULARY, count)
    for t in range(1, length):
        rows[:, t] = (7 * rows[:, t - 1] + rng.integers(0, 3, count)) % VOCABULARY
    return rows


def counted_of(pool: np.ndarray) -> CountedModel:
    return CountedModel(np.bincount(pool[:, 1:].ravel(), minlength=VOCABULARY), count_bi_and_trigrams(pool))


def naive(pool: np.ndarray, row: np.ndarray) -> list[float]:
    """The losses of a sample by the formulas of the module."""
    one, two, three = Counter[int](), Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for sample in pool.tolist():
        one.update(sample[1:])
        two.update(pairwise(sample))
        three.update(zip(sample, sample[1:], sample[2:], strict=False))
    labels = pool[:, 1:].size

    def alone(c: int) -> float:
        return (one[c] + 1) / (labels + VOCABULARY)

    def given_one(b: int, c: int) -> float:
        pair = min(two[b, c], one[b])
        return (max(pair - 1, 0) + PRIOR * alone(c)) / (max(one[b] - 1, 0) + PRIOR)

    def given_two(a: int, b: int, c: int) -> float:
        pair = min(two[a, b], one[a])
        return (max(min(three[a, b, c], pair) - 1, 0) + PRIOR * given_one(b, c)) / (max(pair - 1, 0) + PRIOR)

    tokens = row.tolist()
    losses = [given_one(*tokens[:2])] + [given_two(*tokens[t - 2 : t + 1]) for t in range(2, len(tokens))]
    return [-math.log(p) for p in losses]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many buckets that no two n-grams share one."""
    monkeypatch.setattr(counted, "MIN_BUCKETS", 1 << 22)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("size", [3, 60, 400])
def test_losses_are_those_of_the_formulas(size: int) -> None:
    pool, rows = samples(0, size), np.concatenate([samples(0, 3), samples(9, 5)])
    losses = counted_of(pool).token_losses(torch.from_numpy(rows))
    np.testing.assert_allclose(losses, [naive(pool, row) for row in rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "buckets"), [(1, 1024), (60, 8192), (400, 32768)])
def test_few_of_the_n_grams_share_a_bucket(size: int, buckets: int) -> None:
    pool = samples(0, size)
    assert len(count_bi_and_trigrams(pool)) == buckets
    losses = counted_of(pool).token_losses(torch.from_numpy(pool))
    assert np.isclose(losses, [naive(pool, row) for row in pool], rtol=1e-4, atol=1e-4).mean() > 0.8


def test_what_the_pool_has_is_likelier_than_what_it_has_not() -> None:
    pool = samples(0, 400)
    losses = counted_of(pool).token_losses(torch.from_numpy(samples(5, 50)))
    shuffled = np.random.default_rng(0).permuted(samples(5, 50), axis=1)
    assert losses.mean() < counted_of(pool).token_losses(torch.from_numpy(shuffled)).mean() - 0.5


@pytest.mark.usefixtures("roomy")
def test_a_pair_that_occurs_once_does_not_predict_itself() -> None:
    common, lonely = samples(0, 400), np.array([[1, 39, 4, 20, 5, 17, 3, 30, 2]])
    model = counted_of(np.concatenate([common, lonely]))
    inside = model.token_losses(torch.from_numpy(lonely))
    outside = counted_of(common).token_losses(torch.from_numpy(lonely))
    torch.testing.assert_close(inside[:, 2:], outside[:, 2:], rtol=0.05, atol=0.05)


def test_a_loss_depends_on_what_is_before_it_alone() -> None:
    model, rows = counted_of(samples(0, 60)), torch.from_numpy(samples(3, 4))
    whole = model.token_losses(rows)
    for length in (2, 3, 6):
        assert torch.equal(model.token_losses(rows[:, :length]), whole[:, : length - 1])


@pytest.mark.usefixtures("roomy")
def test_probabilities_of_all_next_tokens_are_one_together() -> None:
    """Less what is taken off: one for each of them that occurs after the context, a few in K and more."""
    model = counted_of(samples(0, 4000))
    for context in samples(7, 20)[:, :2]:
        rows = torch.from_numpy(np.stack([[*context, token] for token in range(VOCABULARY)]))
        total = float(model.token_losses(rows)[:, 1].neg().exp().sum())
        assert 0.8 < total <= 1.001


def test_in_a_crowded_table_no_probability_is_above_one() -> None:
    pool = np.random.default_rng(0).integers(0, VOCABULARY, (4000, 9))
    table = count_bi_and_trigrams(pool).reshape(1024, -1).sum(1)  # as the highest bits of a hash are the bucket
    model = CountedModel(np.bincount(pool[:, 1:].ravel(), minlength=VOCABULARY), table)
    losses = model.token_losses(torch.from_numpy(pool[:50]))
    assert losses.isfinite().all()
    assert losses.min() >= 0


def test_a_large_table_is_denser() -> None:
    assert len(count_bi_and_trigrams(np.ones((1, 1 << 19), np.uint16))) == 1 << 22
    assert len(count_bi_and_trigrams(np.ones((1, 1 << 21), np.uint16))) == 1 << 22
    assert len(count_bi_and_trigrams(np.ones((1, (1 << 21) + 1), np.uint16))) == 1 << 23


def test_more_than_can_be_told_apart_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = samples(0, 400)
    assert count_bi_and_trigrams(pool).sum() == 400 * (8 + 7)
    monkeypatch.setattr(counted, "MOST_TOKENS", pool.size - 1)
    with pytest.raises(InvalidArgument, match="has 3,600 tokens, of which n-grams can be counted up to 3,599: train a"):
        count_bi_and_trigrams(pool)


def test_ids_below_0_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no row of token ids"):
        count_bi_and_trigrams(np.full((2, 5), -1))
