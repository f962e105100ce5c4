"""Which candidates are kept: against a naive Plackett-Luce in float64, and what never may happen."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from trainer_client.select import choose
from trainer_client.select.choice import evenly_in_warm_up, keep_highest
from weighting_contract.errors import InvalidArgument

WEIGHTS = np.array([0.4, 1.6, 0.8, 1.2, 0.0, 2.0], np.float32)


def draws(weights: np.ndarray, keep: int, probes: int, count: int = 4000) -> np.ndarray:
    """[count, keep] kept."""
    return np.stack([choose(weights, keep, probes, (7, step))[0] for step in range(count)])


def naive_inclusion(weights: np.ndarray, keep: int) -> np.ndarray:
    """[N] probability of being kept when samples are drawn one after the other in proportion to their weights."""
    included = np.zeros(len(weights))
    for order in permutations(range(len(weights)), keep):
        left, probability = float(weights.sum()), 1.0
        for i in order:
            probability *= weights[i] / left if left > 1e-12 else 0.0
            left -= float(weights[i])
        included[list(order)] += probability
    return included


def test_kept_as_often_as_draws_in_proportion_to_the_weights() -> None:
    kept = draws(WEIGHTS, keep=3, probes=0)
    often = np.bincount(kept.flatten(), minlength=6) / len(kept)
    np.testing.assert_allclose(often, naive_inclusion(WEIGHTS.astype(np.float64), 3), atol=0.03)
    first = np.bincount(kept[:, 0], minlength=6) / len(kept)
    np.testing.assert_allclose(first, WEIGHTS / WEIGHTS.sum(), atol=0.03)


def test_probes_are_drawn_evenly_and_come_first() -> None:
    kept, probes = choose(WEIGHTS, 4, 2, (1, 2))
    assert (kept.dtype, probes.tolist()) == (np.int64, [True, True, False, False])
    assert len(set(kept.tolist())) == 4
    drawn = draws(WEIGHTS, keep=4, probes=2)[:, :2]
    np.testing.assert_allclose(np.bincount(drawn.flatten(), minlength=6) / len(drawn), np.full(6, 2 / 6), atol=0.03)


def test_probes_do_not_change_the_order_of_the_others() -> None:
    kept, probes = choose(WEIGHTS, 5, 2, (3, 4))
    alone, _ = choose(WEIGHTS, 6, 2, (3, 4))
    assert kept.tolist() == alone.tolist()[:5]
    assert probes.sum() == 2


def test_weight_zero_is_kept_only_where_nothing_else_is_left() -> None:
    assert 4 not in draws(WEIGHTS, keep=5, probes=0, count=200)
    zeros = np.array([0, 0, 0, 0, 3.0, 0])
    kept = draws(zeros, keep=3, probes=0, count=2000)
    assert (kept[:, 0] == 4).all()
    often = np.bincount(kept[:, 1:].flatten(), minlength=6) / len(kept)
    np.testing.assert_allclose(np.delete(often, 4), np.full(5, 2 / 5), atol=0.05)


def from_first(weights: np.ndarray, keep: int, probes: int = 0, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """[count, keep] kept and the first, of candidates in another order each time; as indices of the weights."""
    kept, first = [], []
    for step in range(count):
        order = np.random.default_rng([11, step]).permutation(len(weights))
        kept.append(order[choose(weights[order], keep, probes, (7, step), from_first=True)[0]])
        first.append(order[:keep])
    return np.stack(kept), np.stack(first)


def test_from_the_first_candidates_draws_as_often() -> None:
    kept, _ = from_first(WEIGHTS, keep=3)
    often = np.bincount(kept.flatten(), minlength=6) / len(kept)
    np.testing.assert_allclose(often, naive_inclusion(WEIGHTS.astype(np.float64), 3), atol=0.03)
    pairs, expected = np.zeros((6, 6)), np.zeros((6, 6))
    for found, target in ((kept, pairs), (draws(WEIGHTS, keep=3, probes=0), expected)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            np.add.at(target, (found[:, i], found[:, j]), 1 / len(found))
    np.testing.assert_allclose(pairs, expected, atol=0.03)
    probes = from_first(WEIGHTS, keep=4, probes=2)[0][:, :2]
    np.testing.assert_allclose(np.bincount(probes.flatten(), minlength=6) / len(probes), np.full(6, 2 / 6), atol=0.03)


def test_from_the_first_candidates_stays_with_them_as_far_as_nothing_is_preferred() -> None:
    def shared(weights: np.ndarray) -> float:
        kept, first = from_first(weights, keep=4, probes=2, count=500)
        return float(np.mean([len(set(k) & set(f)) / 4 for k, f in zip(kept.tolist(), first.tolist(), strict=True)]))

    assert shared(np.full(20, 0.3, np.float32)) == 1
    assert shared(np.linspace(0.99, 1.01, 20)) > 0.95
    assert shared(np.linspace(0.01, 2, 20) ** 12) < 0.7


def test_the_seed_decides() -> None:
    weights = np.ones(100)
    first = choose(weights, 20, 4, (0, 5))[0].tolist()
    assert choose(weights, 20, 4, (0, 5))[0].tolist() == first
    assert choose(weights, 20, 4, (1, 5))[0].tolist() != first
    assert choose(weights, 20, 4, (0, 6))[0].tolist() != first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.ones((2, 2)), 1, 0), "expected .N., all finite"),
        ((np.array([1, -1.0]), 1, 0), "0 or more"),
        ((np.array([1, np.nan]), 1, 0), "finite"),
        ((np.ones(3), 4, 0), "keep is 4, expected from 1 to 3"),
        ((np.ones(3), 0, 0), "keep is 0"),
        ((np.ones(3), 2, 3), "probes is 3, expected from 0 to 2"),
    ],
)
def test_what_can_not_be_chosen_from_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        choose(*arguments, seed=(0,))


# ---- A new model ---------------------------------------------------------------------------------------------------


def test_three_quarters_are_drawn_evenly_at_first_and_none_after_the_warm_up() -> None:
    assert [evenly_in_warm_up(step, 32, 100) for step in (0, 25, 50, 75, 99, 100, 10**6)] == [24, 18, 12, 6, 0, 0, 0]
    assert [evenly_in_warm_up(step, 1, 100) for step in (0, 99)] == [1, 0]
    assert evenly_in_warm_up(0, 32, 0) == 0


def test_the_highest_come_as_they_came_behind_those_drawn_evenly() -> None:
    scores = np.array([0.1, 5.0, 3.0, 4.0, 2.0, 1.0])
    assert keep_highest(scores, 3, 0, (0, 0)).tolist() == [1, 2, 3]
    for seed in range(50):
        kept = keep_highest(scores, 3, 2, (7, seed)).tolist()
        drawn = kept[:2]
        assert kept[2] == max(set(range(6)) - set(drawn), key=lambda i: scores[i])
        assert len(set(kept)) == 3
    drawn_first = [keep_highest(scores, 3, 1, (7, seed))[0] for seed in range(3000)]
    assert np.bincount(drawn_first, minlength=6) == pytest.approx(500, rel=0.2), "from all candidates alike"
