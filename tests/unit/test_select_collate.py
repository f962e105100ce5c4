"""Batches of all structures: put together, picked from, and their tokens found."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest

from trainer_client.select.collate import count_rows, find_tokens, join, pick
from weighting_contract.errors import InvalidArgument

torch = pytest.importorskip("torch")
from torch.utils.data import default_collate  # noqa: E402


class Pair(NamedTuple):
    ids: Any
    names: Any


class Encoding(UserDict[str, Any]):
    """Like transformers' BatchEncoding: a mapping that is no dict."""


def ids(rows: int, length: int, start: int = 0) -> Any:
    return torch.arange(start, start + rows * length).view(rows, length)


def same(left: Any, right: Any) -> bool:
    """Whether structures, types and values are equal."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor | np.ndarray):
        return left.dtype == right.dtype and left.tolist() == right.tolist()
    if isinstance(left, dict | UserDict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize(
    "samples",
    [
        [torch.tensor([i, i + 1]) for i in range(6)],
        [{"ids": torch.tensor([i]), "source": f"s{i}", "n": i} for i in range(6)],
        [(torch.tensor([i]), f"s{i}") for i in range(6)],
        [Pair(torch.tensor([i]), f"s{i}") for i in range(6)],
        [{"a": {"b": [torch.tensor([i]), i]}, "c": (f"s{i}", f"t{i}")} for i in range(6)],
        [f"text {i}" for i in range(6)],
        [(f"s{i}", f"t{i}") for i in range(6)],
        [{"x": np.float64(i), "y": f"s{i}"} for i in range(6)],
    ],
    ids=["tensor", "dict", "tuple", "namedtuple", "nested", "strings", "pairs of strings", "scalars"],
)
def test_picking_is_collating_the_picked_samples(samples: list[Any]) -> None:
    batches = [default_collate(samples[:3]), default_collate(samples[3:])]
    joined = join(batches)
    assert count_rows(joined) == 6
    assert same(joined, default_collate(samples))
    assert same(pick(joined, np.array([4, 0, 5])), default_collate([samples[i] for i in (4, 0, 5)]))


def test_types_and_values_of_the_whole_batch_stay() -> None:
    batches = [
        Encoding(ids=ids(2, 3, start), array=np.full(2, start), spans=[[1], [2, 3]], epoch=4, nothing=None)
        for start in (0, 6)
    ]
    picked = pick(join(batches), np.array([3, 0]))
    assert isinstance(picked, Encoding)
    assert picked["ids"].tolist() == [[9, 10, 11], [0, 1, 2]]
    assert isinstance(picked["array"], np.ndarray)
    assert (picked["array"].tolist(), picked["spans"]) == ([6, 0], [[2, 3], [1]])
    assert (picked["epoch"], picked["nothing"]) == (4, None)
    assert batches[0]["ids"].tolist() == ids(2, 3).tolist(), "the loader's batches stay as they are"


def test_rows_of_different_lengths_are_padded_on_the_right() -> None:
    batches = [
        {
            "input_ids": ids(2, n, 1),
            "attention_mask": torch.ones(2, n, dtype=torch.bool),
            "labels": ids(2, n, 1),
            "array": np.ones((2, n), np.float32),
        }
        for n in (2, 4)
    ]
    joined = join(batches)
    assert joined["input_ids"][1].tolist() == [3, 4, 0, 0]
    assert joined["labels"][1].tolist() == [3, 4, -100, -100]
    assert joined["attention_mask"].sum(1).tolist() == [2, 2, 4, 4]
    assert joined["array"].sum(1).tolist() == [2, 2, 4, 4]
    tokens, lengths = find_tokens(joined, None)
    assert tokens is joined["input_ids"]
    assert lengths.tolist() == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([{"a": ids(2, 2)}, {"b": ids(2, 2)}], "batch has different keys"),
        ([{"a": ids(2, 2)}, ids(2, 2)], "batch is .* in different batches"),
        ([{"a": ids(2, 2)}, {"a": ids(2, 2)[0]}], r"batch\['a'\] has different numbers of dimensions"),
        ([[ids(2, 2)], [ids(2, 2)] * 2], "different numbers of fields"),
        ([{"a": ids(2, 2), "s": ["x"]}, {"a": ids(2, 2), "s": ["x", "y"]}], r"batch\['s'\] has 1 rows in a batch of 2"),
        ([{"a": ids(2, 2), "s": "x"}, {"a": ids(2, 2), "s": "y"}], r"batch\['s'\] is 'x' in one batch"),
        ([7, 7], "batches of int without any tensor"),
    ],
)
def test_batches_that_do_not_fit_together_are_named(batches: list[Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        join(batches)


def test_tokens_are_found_named_or_made() -> None:
    batch = {"weights": torch.ones(2, 3), "y": torch.tensor([1, 2]), "deep": [ids(2, 3)], "t": ["a", "b"]}
    assert find_tokens(batch, None)[0] is batch["deep"][0]
    assert find_tokens(batch, "t") == (["a", "b"], None)
    assert find_tokens((ids(2, 2), ids(2, 3)), 1)[0].shape == (2, 3)
    assert find_tokens({"input_ids": ["a", "b"], "x": ids(2, 2)}, None) == (["a", "b"], None)
    made, lengths = find_tokens(batch, lambda b: (b["deep"][0] + 1, [3, 2]))
    assert (made[0].tolist(), lengths) == ([1, 2, 3], [3, 2])
    assert find_tokens(np.ones((2, 2), np.uint16), None)[1] is None


def test_lengths_come_from_the_mask_beside_the_tokens() -> None:
    batch = {"x": {"ids": ids(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}}
    assert find_tokens(batch, None)[1].tolist() == [2, 3]
    as_numpy = {"input_ids": np.ones((2, 2), int), "attention_mask": np.array([[1, 0], [1, 1]])}
    assert find_tokens(as_numpy, "input_ids")[1].tolist() == [1, 2]
    for mask in ([[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]]):
        batch["x"]["attention_mask"] = torch.tensor(mask)
        with pytest.raises(InvalidArgument, match="attention_mask has rows that are not padded on the right; pass tok"):
            find_tokens(batch, None)


def test_tokens_that_are_not_there_are_asked_for() -> None:
    with pytest.raises(InvalidArgument, match="no integer tensor of two dimensions; pass tokens="):
        find_tokens({"x": torch.ones(2, 3), "m": torch.ones(2, 3, dtype=torch.bool)}, None)
    with pytest.raises(InvalidArgument, match=r"tokens is 'ids'.*no such field"):
        find_tokens({"x": ids(2, 2)}, "ids")
