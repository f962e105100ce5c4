"""Numpy arrays on the wire: dtype name, shape, raw little-endian bytes in C order. Never pickle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import InvalidArgument

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "uint32", "uint16", "uint8")


def to_message(array: np.ndarray) -> pb.Tensor:
    """The message for `array`. Raises InvalidArgument for a dtype that the contract does not carry."""
    if array.dtype.name not in DTYPES:
        raise InvalidArgument(f"tensor dtype {array.dtype.name} can't be sent; expected one of {', '.join(DTYPES)}")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return pb.Tensor(dtype=array.dtype.name, shape=array.shape, data=little.tobytes())


def from_message(message: pb.Tensor, field: str) -> np.ndarray:
    """A read-only view of the message's bytes. Raises InvalidArgument, naming `field`, where it doesn't add up."""
    if message.dtype not in DTYPES:
        raise InvalidArgument(f"{field}.dtype is {message.dtype!r}, expected one of {', '.join(DTYPES)}")
    dtype = np.dtype(message.dtype).newbyteorder("<")
    shape = tuple(message.shape)
    if any(n < 0 for n in shape):
        raise InvalidArgument(f"{field}.shape is {list(shape)}, expected sizes of 0 or more")
    expected = math.prod(shape) * dtype.itemsize
    if len(message.data) != expected:
        raise InvalidArgument(
            f"{field}.data has {len(message.data)} bytes, but {message.dtype} of shape {list(shape)} takes {expected}"
        )
    try:
        return np.frombuffer(message.data, dtype).reshape(shape)
    except ValueError as exc:  # too many dimensions, or one of 0 beside others that are too large
        raise InvalidArgument(f"{field}.shape is {list(shape)[:8]}..., which no array can have: {exc}") from exc


def as_array(values: Any, field: str) -> np.ndarray:
    """`values` (torch tensor on any device, numpy array, nested lists) as a numpy array, without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
        return np.asarray(values.cpu().numpy())
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise InvalidArgument(f"{field} is ragged: {exc}") from exc
    if array.dtype == object:
        raise InvalidArgument(f"{field} holds values that are not numbers")
    return array
