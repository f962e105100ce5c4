"""Meta-updates as bytes, in the contract's own message: an entry reads back with the same arrays, bit for bit.

Must not know where the bytes are kept.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract import tensors
from weighting_contract.errors import InvalidArgument
from weighting_service.domain import Estimator, Inputs, MetaUpdate

_TO_MESSAGE = {
    Estimator.VJP: pb.ESTIMATOR_VJP,
    Estimator.SCORE_FUNCTION: pb.ESTIMATOR_SCORE_FUNCTION,
}
_FROM_MESSAGE = {message: estimator for estimator, message in _TO_MESSAGE.items()}


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
