"""How often a content was trained on, against plain counting, and what that takes off a weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from trainer_client.select.seen import TimesSeen, content_keys, keys_of, text_keys, worn
from weighting_contract.errors import InvalidArgument


def test_equal_contents_have_equal_keys_and_others_have_others() -> None:
    rows = np.random.default_rng(0).integers(0, 50_000, (20_000, 33))
    keys = content_keys(rows)
    assert len(np.unique(keys)) == len(rows)
    np.testing.assert_array_equal(content_keys(rows.astype(np.uint16)), keys)
    near = rows.copy()
    near[np.arange(len(rows)), np.arange(len(rows)) % 33] += 1  # one token each
    assert not np.isin(content_keys(near), keys).any()


def test_padding_is_no_content() -> None:
    short = np.array([[7, 8, 9]])
    padded = np.array([[7, 8, 9, 0, 0], [7, 8, 9, 5, 6], [7, 8, 9, 0, 1]])
    keys = content_keys(padded, np.array([3, 3, 5]))
    assert keys[0] == keys[1] == content_keys(short)[0]
    assert keys[2] != keys[0]


def test_what_a_selector_takes_has_keys() -> None:
    ids = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(keys_of(torch.from_numpy(ids), None), content_keys(ids))
    np.testing.assert_array_equal(keys_of(ids, torch.tensor([2, 4, 3])), content_keys(ids, np.array([2, 4, 3])))
    texts = ["one", "two", "one"]
    keys = keys_of(texts, None)
    assert keys is not None
    assert keys[0] == keys[2] != keys[1]
    np.testing.assert_array_equal(keys, text_keys(texts))
    for other in ([["one"]], np.ones((2, 2)), np.ones(3, np.int64), [1, "two"]):
        assert keys_of(other, None) is None


def test_counts_are_those_of_all_steps_but_the_last_ones() -> None:
    rng = np.random.default_rng(1)
    contents = rng.integers(0, 1 << 63, 300, np.uint64)
    batches = [rng.choice(contents, 32) for _ in range(40)]
    seen = TimesSeen(ahead=3)
    for step, batch in enumerate(batches):
        counted = Counter(int(key) for earlier in batches[: max(0, step - 3)] for key in earlier)
        np.testing.assert_array_equal(seen.counts(step, contents), [counted[int(key)] for key in contents])
        seen.trained(step, batch)
        seen.trained(step, batch)  # told again, as after a resume
        seen.trained(step - 5, batch)


def test_a_sketch_that_is_full_counts_no_less_than_there_was() -> None:
    keys = content_keys(np.arange(2_000_000).reshape(-1, 2))
    seen = TimesSeen(ahead=0)
    for step in range(10):
        seen.trained(step, keys)
    counts = seen.counts(10, keys)
    assert counts.min() >= 10
    assert (seen.wear(10, keys) == 0).mean() > 0.97  # few are taken for repeated ones


def test_a_state_goes_on_where_it_was() -> None:
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, 99, 16, np.uint64) for _ in range(12)]
    one, other = TimesSeen(ahead=2), TimesSeen(ahead=2)
    for step, batch in enumerate(batches):
        if step == 7:
            other.load_state_dict(one.state_dict())
        np.testing.assert_array_equal(one.wear(step, batch), (one if step < 7 else other).wear(step, batch))
        one.trained(step, batch)
        if step >= 7:
            other.trained(step, batch)
    keys = np.arange(99, dtype=np.uint64)
    np.testing.assert_array_equal(other.counts(12, keys), one.counts(12, keys))
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_a_state_says_no_more_to_the_steps_that_come_than_they_had_been_told(ahead: int) -> None:
    rng = np.random.default_rng(4)
    contents = rng.integers(0, 40, (60, 16)).astype(np.uint64)
    whole, worn_at, states = TimesSeen(ahead), {}, {}
    for step in range(50):
        for later in range(len(worn_at), step + ahead + 1):  # as they are submitted
            worn_at[later] = whole.wear(later, contents[later]), whole.counts(later, contents[later])
        whole.trained(step, contents[step][:8])
        states[step] = whole.state_dict()
    for last in (0, 3, 11, 30):
        resumed = TimesSeen(ahead)
        resumed.load_state_dict(states[last])
        assert resumed.state_dict() == states[last]
        for step in range(last + 1, 50):
            np.testing.assert_array_equal(resumed.counts(step, contents[step]), worn_at[step][1])
            np.testing.assert_array_equal(resumed.wear(step, contents[step]), worn_at[step][0])
            resumed.trained(step, contents[step][:8])


@pytest.mark.parametrize("state", [None, {}, "no base64", "AAAA", 3])
def test_what_is_no_state_is_refused_and_changes_nothing(state: object) -> None:
    seen, keys = TimesSeen(ahead=0), np.arange(5, dtype=np.uint64)
    seen.trained(0, keys)
    with pytest.raises(InvalidArgument, match=r"times seen are not what SelectedBatches\.state_dict returned"):
        seen.load_state_dict(state)
    np.testing.assert_array_equal(seen.counts(1, keys), np.ones(5))


@pytest.mark.parametrize("times", [0.0, 2.5])
def test_contents_wear_as_the_formula_says(times: float) -> None:
    rng = np.random.default_rng(3)
    seen, counted = TimesSeen(ahead=1, times=times), Counter[int]()
    batches: list[np.ndarray] = []
    contents = np.arange(60, dtype=np.uint64) * np.uint64(977)
    found_worn = 0
    for step in range(50):
        for earlier in batches[max(0, step - 2) : max(0, step - 1)]:  # one more step may be known
            counted.update(earlier.tolist())
        found = seen.wear(step, contents)
        known = batches[max(0, step - 9) : max(0, step - 1)]
        usual = np.median([counted[int(key)] for batch in known for key in batch]) if known else 0
        expected = [max(0, counted[int(key)] - 2 * usual) / times if times and known else 0 for key in contents]
        np.testing.assert_allclose(found, expected)
        found_worn += int((found > 0).sum())
        batches.append(np.where(rng.random(16) < 0.2, contents[:1], rng.choice(contents, 16)))  # one again and again
        seen.trained(step, batches[-1])
    assert (found_worn > 0) == (times > 0)


def test_what_is_seen_as_often_as_its_like_does_not_wear() -> None:
    seen, contents = TimesSeen(ahead=0), np.arange(64, dtype=np.uint64)
    for step in range(40):
        assert not seen.wear(step, contents).any()
        seen.trained(step, np.random.default_rng(step // 2).permutation(contents)[32 * (step % 2) :][:32])


def test_wear_is_taken_off_the_logs_of_weights() -> None:
    weights, wear = np.array([4, 2, 1, 1, 0], np.float32), np.array([0.5, 0, 1, 0, 0])
    expected = weights * np.exp(-wear)
    np.testing.assert_allclose(worn(weights, wear), expected * 5 / expected.sum(), rtol=1e-6)
    assert worn(weights, np.zeros(5)) is weights
    everything = worn(np.array([1, 1, 0], np.float32), np.array([5000.0, 5001.0, 0]))  # what has no weight gets none
    np.testing.assert_allclose(everything, np.array([1, np.exp(-1), 0]) * 3 / (1 + np.exp(-1)), rtol=1e-6)
