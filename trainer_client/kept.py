"""The newest meta-updates that a service has acknowledged, kept for one that comes back without them.

Knows messages of the contract and nothing of transports, threads or policies.
"""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from typing import Any

from google.protobuf.message import DecodeError

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import InvalidArgument

MOST_BYTES = 4 * 1024 * 1024  # of all that is kept: it is part of every checkpoint


class KeptUpdates:
    """In the order of the log, one of each update id; the oldest go where there are more than `most`, or MOST_BYTES.

    Args:
        most: 0 keeps none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, pb.MetaUpdateRequest] = OrderedDict()
        self._bytes = 0

    def add(self, update: pb.MetaUpdateRequest) -> None:
        """Keeps an update that was acknowledged; one that was sent once more stays as it was, and where it was."""
        if self._most == 0 or update.update_id in self._kept:
            return
        self._kept[update.update_id] = update
        self._bytes += update.ByteSize()
        while len(self._kept) > self._most or self._bytes > MOST_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.ByteSize()

    def all(self) -> list[pb.MetaUpdateRequest]:
        """Copies: what is sent may be changed."""
        return [pb.MetaUpdateRequest.FromString(update.SerializeToString()) for update in self._kept.values()]

    def state(self) -> list[str]:
        """JSON values."""
        return [base64.b64encode(update.SerializeToString()).decode() for update in self._kept.values()]

    def load(self, state: Any) -> None:
        """Keeps what `state` says from now on. Raises InvalidArgument where it says nothing of the kind."""
        try:
            updates = [pb.MetaUpdateRequest.FromString(base64.b64decode(each, validate=True)) for each in state]
        except (TypeError, ValueError, binascii.Error, DecodeError) as exc:
            raise InvalidArgument(f"state['kept'] is not what Job.state_dict returned: {exc!r}") from exc
        self._kept.clear()
        self._bytes = 0
        for update in updates:
            self.add(update)
