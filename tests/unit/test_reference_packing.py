"""Packs: every row once, within the budget, little padding, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from weighting_service.reference.packing import PackReport, pack_rows


def rows_of(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 100, length) for length in lengths]


def any_lengths(seed: int, count: int = 300, longest: int = 500) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest, count).tolist()


@pytest.mark.parametrize("budget", [1, 500, 4096, 10**9])
def test_every_row_is_in_one_pack_as_it_was_given(budget: int) -> None:
    rows = rows_of(any_lengths(0))
    packs = pack_rows(rows, budget)
    assert sorted(i for pack in packs for i in pack.indices) == list(range(len(rows)))
    for pack in packs:
        assert pack.tokens.shape == (len(pack.indices), pack.lengths.max())
        for place, i in enumerate(pack.indices):
            assert pack.lengths[place] == len(rows[i])
            np.testing.assert_array_equal(pack.tokens[place, : len(rows[i])], rows[i])
            assert not pack.tokens[place, len(rows[i]) :].any()
        assert pack.padded_tokens <= budget or len(pack.indices) == 1
    assert sum(pack.real_tokens for pack in packs) == sum(len(row) - 1 for row in rows)


def test_packs_do_not_depend_on_the_order() -> None:
    rows = rows_of([5] * 50 + any_lengths(1, 50, 20))
    shuffled = [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]
    for one, other in zip(pack_rows(rows, 200), pack_rows(shuffled, 200), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_little_is_padding_whatever_the_lengths() -> None:
    for lengths in (any_lengths(3), [2] * 200 + [900] * 10, [64] * 100):
        packs = pack_rows(rows_of(lengths), 4096)
        padded = sum(pack.padded_tokens for pack in packs)
        assert sum(n - 1 for n in lengths) / padded > 0.9


def test_a_few_short_rows_share_a_pass() -> None:
    assert len(pack_rows(rows_of([2, 3, 5, 9, 17, 33]), 8192)) == 1
    assert pack_rows([], 8192) == []


def test_efficiency() -> None:
    assert PackReport(1, 2, 30, 40, 0, (1, 1)).efficiency == 0.75
    assert PackReport(0, 0, 0, 0, 0, ()).efficiency == 1
