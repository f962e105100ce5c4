"""The service inside this process: no sockets, no second command. The only module that touches weighting_service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.tracing import TRACER
from trainer_client.transports.base import Transport
from weighting_contract.errors import InvalidArgument, Unavailable


class EmbeddedTransport(Transport):
    """Starts a service that lives as long as the transport.

    Args:
        state_dir: where weighters are kept; None: nowhere, they end with the client.

    Raises:
        InvalidArgument: the parts that a service needs are not installed.
    """

    def __init__(self, state_dir: Path | None) -> None:
        try:
            from weighting_service.embedded import EmbeddedService
        except ImportError as exc:
            raise InvalidArgument(
                f"an embedded weighter needs the service and torch, but {exc.name or exc} is missing; "
                "pip install 'weighbridge[server,torch]'"
            ) from exc
        self._service = EmbeddedService(state_dir)
        self._closed = False

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        if self._closed:
            raise Unavailable("the client is closed")
        with TRACER.span(method, "CLIENT"):  # the service's event loop takes the trace over with the context
            return self._service.call(method, request, timeout_s)

    def watch(self, name: str) -> Iterator[pb.Weighter]:
        yield from self._service.watch(name)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._service.close()
