"""Batches of a loader as structures of fields: put together to candidates, picked from, and their tokens found.

A batch is what torch's `default_collate` makes: a tensor or array, a list with one value a sample, or any nesting of
mappings, lists and (named) tuples of these. What is no such thing, like a number, belongs to the whole batch. Knows
nothing of jobs; imports torch only where it meets tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from weighting_contract.errors import InvalidArgument

Tokens = Callable[[Any], Any] | str | int | None

IGNORED_LABEL = -100  # of torch's cross entropy


def count_rows(batch: Any) -> int:
    """Samples of a batch. Raises InvalidArgument where there is nothing to count."""
    for _, array in _arrays(batch):
        return len(array)
    for values in _values(batch):
        return len(values)
    raise InvalidArgument(
        f"the loader gives batches of {type(batch).__name__} without any tensor, array or list, expected fields with "
        "one row a sample"
    )


def join(batches: Sequence[Any]) -> Any:
    """One batch with the samples of all, in order; fields whose rows differ in length are padded on the right.

    Padding is 0, and -100 in fields called "labels".

    Raises:
        InvalidArgument: batches of different structure, or fields with another number of samples than their batch.
    """
    if len(batches) == 1:
        return batches[0]
    return _map(list(batches), [count_rows(batch) for batch in batches], "batch", _joined)


def pick(batch: Any, indices: np.ndarray) -> Any:
    """The batch with only these samples, in this order; structure and types stay. Raises as `join`."""
    return _map([batch], [count_rows(batch)], "batch", lambda parts, _: _picked(parts[0], indices))


def find_tokens(batch: Any, tokens: Tokens) -> tuple[Any, Any]:
    """What of a batch is to be scored: (token ids [N, T] or texts, lengths [N] or None).

    Args:
        tokens: a callable that takes the batch and returns the ids, or ids and lengths; the key of a field; None:
            "input_ids", or the first integer tensor of two dimensions. An "attention_mask" beside gives the lengths.

    Raises:
        InvalidArgument: no such field, or rows that are not padded on the right.
    """
    if callable(tokens):
        given = tokens(batch)
        return given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if tokens is not None:
        try:
            return batch[tokens], _lengths(batch, batch[tokens])
        except (KeyError, IndexError, TypeError) as exc:
            raise InvalidArgument(
                f"tokens is {tokens!r}, but the loader's batches have no such field: {exc!r}"
            ) from exc
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return batch["input_ids"], _lengths(batch, batch["input_ids"])
    for holder, array in _arrays(batch):
        if array.ndim == 2 and _is_integer(array):
            return array, _lengths(holder, array)
    raise InvalidArgument(
        "the loader's batches have no integer tensor of two dimensions; pass tokens=, the key of the token ids or a "
        "callable that returns them"
    )


# ---- Fields ---------------------------------------------------------------------------------------------------------


def _map(parts: list[Any], rows: list[int], path: str, field: Callable[[list[Any], str], Any]) -> Any:
    """The structure that all parts have, each of its fields made by `field` from theirs."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        kinds = " and ".join(sorted({type(part).__name__ for part in parts}))
        raise InvalidArgument(f"{path} is {kinds} in different batches of the loader, expected one kind")
    if (_is_array(first) and first.ndim) or _is_values(first, rows[0]):
        for part, count in zip(parts, rows, strict=True):
            if len(part) != count:
                raise InvalidArgument(
                    f"{path} has {len(part)} rows in a batch of {count} samples, expected one a sample"
                )
        return field(parts, path)
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise InvalidArgument(f"{path} has different keys in different batches of the loader, expected the same")
        return _with_items(
            first, {key: _map([part[key] for part in parts], rows, f"{path}[{key!r}]", field) for key in first}
        )
    if isinstance(first, list | tuple):
        if any(len(part) != len(first) for part in parts):
            raise InvalidArgument(f"{path} has different numbers of fields in different batches of the loader")
        return _sequence(first, [_map([p[i] for p in parts], rows, f"{path}[{i}]", field) for i in range(len(first))])
    if any(part is not first and not bool(part == first) for part in parts):
        raise InvalidArgument(
            f"{path} is {first!r} in one batch of the loader and something else in another: make it one value a sample"
        )
    return first


def _joined(parts: list[Any], path: str) -> Any:
    first = parts[0]
    if not _is_array(first):
        return _sequence(first, [value for part in parts for value in part])
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len({len(shape) for shape in shapes}) > 1:
        raise InvalidArgument(f"{path} has different numbers of dimensions in different batches of the loader")
    if len(set(shapes)) == 1:
        return _torch().cat(parts) if _is_tensor(first) else np.concatenate(parts)
    shape = (sum(map(len, parts)), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    fill = IGNORED_LABEL if path.endswith("['labels']") else 0
    whole = first.new_full(shape, fill) if _is_tensor(first) else np.full(shape, fill, first.dtype)
    row = 0
    for part in parts:
        whole[(slice(row, row + len(part)), *map(slice, part.shape[1:]))] = part
        row += len(part)
    return whole


def _picked(values: Any, indices: np.ndarray) -> Any:
    if _is_tensor(values):
        return values[_torch().from_numpy(indices).to(values.device)]
    return values[indices] if _is_array(values) else _sequence(values, [values[i] for i in indices])


def _arrays(batch: Any, holder: Any = None) -> Iterator[tuple[Any, Any]]:
    """(what holds it, array) of every array with rows, from the first on."""
    if _is_array(batch):
        if batch.ndim:
            yield holder, batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _arrays(value, batch)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _arrays(value, batch)


def _values(batch: Any) -> Iterator[Sequence[Any]]:
    """Every list with one value a sample, in a batch without arrays."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _values(value)
    elif isinstance(batch, list | tuple):
        if any(isinstance(value, list | tuple | Mapping) for value in batch):
            for value in batch:
                yield from _values(value)
        else:
            yield batch


def _is_values(part: Any, rows: int) -> bool:
    """Whether a list holds one value a sample, not one field each."""
    if not isinstance(part, list | tuple) or hasattr(part, "_fields") or next(_arrays(part), None) is not None:
        return False
    nested = any(isinstance(value, list | tuple | Mapping) for value in part)
    return not nested or len(part) == rows


def _with_items(mapping: Any, items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    like = copy.copy(mapping)  # keeps what subclasses add, as torch's default_collate does
    like.update(items)
    return like


def _sequence(like: Any, values: list[Any]) -> Any:
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def _lengths(holder: Any, tokens: Any) -> Any:
    """[N] real tokens a row by the attention mask beside the tokens; None where there is none."""
    mask = holder.get("attention_mask") if isinstance(holder, Mapping) else None
    if mask is None or not _is_array(tokens) or tuple(mask.shape) != tuple(tokens.shape):
        return None
    real = mask != 0
    lengths = real.sum(1)
    places = _torch().arange(real.shape[1], device=real.device) if _is_tensor(real) else np.arange(real.shape[1])
    if bool((real != (places < lengths[:, None])).any()):
        raise InvalidArgument(
            "attention_mask has rows that are not padded on the right; pass tokens=, a callable that returns the ids "
            "padded on the right and the length of each row"
        )
    return lengths


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def _is_array(value: Any) -> bool:
    return _is_tensor(value) or isinstance(value, np.ndarray)


def _is_integer(array: Any) -> bool:
    if _is_tensor(array):
        return not (array.is_floating_point() or array.is_complex() or array.dtype == _torch().bool)
    return bool(array.dtype.kind in "iu")


def _torch() -> Any:
    import torch

    return torch
