"""Entries as bytes, meta-updates in the contract's own message: one reads back with the same arrays, bit for bit.

Must not know where the bytes are kept.
"""

from __future__ import annotations

import hashlib
import struct
from enum import StrEnum
from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract import tensors
from weighting_contract.errors import InvalidArgument
from weighting_service.domain import Entry, Estimator, Inputs, MetaUpdate, Rollback

_TO_MESSAGE = {
    Estimator.VJP: pb.ESTIMATOR_VJP,
    Estimator.SCORE_FUNCTION: pb.ESTIMATOR_SCORE_FUNCTION,
}
_FROM_MESSAGE = {message: estimator for estimator, message in _TO_MESSAGE.items()}
_TO_POSITION = struct.Struct("<q")  # what a rollback's payload begins with; its state follows


class Kind(StrEnum):
    """What an entry is, as logs keep it beside the payload."""

    UPDATE = "update"
    ROLLBACK = "rollback"


def kind_of(entry: Entry) -> Kind:
    return Kind.ROLLBACK if isinstance(entry, Rollback) else Kind.UPDATE


def encode_entry(entry: Entry) -> bytes:
    """The payload of an entry; `decode_entry` needs its kind too. Raises as `encode`."""
    if isinstance(entry, Rollback):
        return _TO_POSITION.pack(entry.to_position) + entry.state
    return encode(entry)


def decode_entry(kind: str, payload: bytes) -> Entry:
    """The entry that `encode_entry` made `payload` from. Raises InvalidArgument where it is not one of that kind."""
    if kind == Kind.UPDATE:
        return decode(payload)
    if kind != Kind.ROLLBACK:
        raise InvalidArgument(f"the entry's kind is {kind!r}, expected one of {[str(each) for each in Kind]}")
    if len(payload) < _TO_POSITION.size:
        raise InvalidArgument(f"a rollback's payload has {len(payload)} bytes, expected {_TO_POSITION.size} or more")
    (to_position,) = _TO_POSITION.unpack_from(payload)
    return Rollback(to_position, payload[_TO_POSITION.size :])


def digest_of(entry: Entry) -> bytes:
    """SHA-256 of what the entry does to a weighter."""
    if isinstance(entry, MetaUpdate):
        return entry.digest()
    return hashlib.sha256(b"rollback;" + encode_entry(entry)).digest()


def next_chain(chain: str, digest: bytes) -> str:
    """The chain after an entry of that digest, as Redis can compute it too; `chain` is "" before the first."""
    return hashlib.sha1((chain + digest.hex()).encode(), usedforsecurity=False).hexdigest()


def encode(update: MetaUpdate) -> bytes:
    """`update` as a serialised `MetaUpdateRequest`. Raises InvalidArgument for a dtype the contract doesn't carry."""
    inputs = pb.Inputs()
    for name, array in update.inputs.arrays().items():
        getattr(inputs, name).CopyFrom(tensors.to_message(array))
    message = pb.MetaUpdateRequest(
        job_id=update.job_id,
        update_id=update.update_id,
        step=update.step,
        inputs=inputs,
        cotangent=tensors.to_message(update.cotangent),
        scored_position=update.scored_position,
        estimator=_TO_MESSAGE[update.estimator],
        probes=None if update.probes is None else tensors.to_message(update.probes.astype(np.uint8)),
        trust_only=update.trust_only,
    )
    return message.SerializeToString()


def decode(payload: bytes) -> MetaUpdate:
    """The update that `encode` made `payload` from; its arrays are read-only views of one copy of the bytes.

    Raises:
        InvalidArgument: `payload` is not such an update.
    """
    try:
        message = pb.MetaUpdateRequest.FromString(payload)
    except DecodeError as exc:
        raise InvalidArgument(f"the payload of {len(payload)} bytes is not a meta-update: {exc}") from exc
    if message.estimator not in _FROM_MESSAGE:
        raise InvalidArgument(f"the meta-update's estimator is {message.estimator}, expected one of {_FROM_MESSAGE}")
    return MetaUpdate(
        job_id=message.job_id,
        update_id=message.update_id,
        step=message.step,
        inputs=Inputs(
            features=_array(message.inputs, "features"),
            hidden=_array(message.inputs, "hidden"),
            tokens=_array(message.inputs, "tokens"),
            lengths=_array(message.inputs, "lengths"),
        ),
        cotangent=tensors.from_message(message.cotangent, "cotangent"),
        scored_position=message.scored_position,
        estimator=_FROM_MESSAGE[message.estimator],
        probes=tensors.from_message(message.probes, "probes").astype(bool) if message.HasField("probes") else None,
        trust_only=message.trust_only,
    )


def _array(inputs: pb.Inputs, name: Literal["features", "hidden", "tokens", "lengths"]) -> np.ndarray | None:
    return tensors.from_message(getattr(inputs, name), f"inputs.{name}") if inputs.HasField(name) else None


def profile_bytes(profile: np.ndarray) -> bytes:
    """[buckets] float16 as little-endian bytes. Raises InvalidArgument for an array of another form."""
    if profile.ndim != 1 or profile.dtype != np.float16:
        raise InvalidArgument(
            f"a profile must be [buckets] float16, got {profile.dtype.name} of shape {list(profile.shape)}"
        )
    return profile.astype("<f2").tobytes()


def profile_array(table: bytes) -> np.ndarray:
    """[buckets] float16, read-only: what `profile_bytes` made `table` from."""
    return np.frombuffer(table, "<f2")
