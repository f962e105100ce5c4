"""The seam between the client and whatever carries its calls. Requests and answers are messages of the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Transport(ABC):
    """Carries unary calls of `weighting.v1.WeightingService`. Thread-safe; connects when it is first needed."""

    @abstractmethod
    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        """The answer to `request`: the message that `method` returns in the contract, e.g. ScoreResponse for "Score".

        Raises:
            WeighbridgeError: and nothing else. The service's own errors keep their kind; Unavailable where it can't be
                reached, DeadlineExceeded where it didn't answer within `timeout_s`.
        """

    @abstractmethod
    def watch(self, name: str) -> Iterator[pb.Weighter]:
        """The state of weighter `name` now, and again whenever its applied position moves; errors as for `call`."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is under way and releases everything; idempotent."""
