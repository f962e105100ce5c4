"""gRPC: the fast path. The only module of the client that knows gRPC; errors are mapped here, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from trainer_client.transports.base import MAX_MESSAGE_BYTES, Transport
from weighting_contract.errors import (
    BY_CODE,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)

RETRY_AFTER_KEY = "retry-after-s"  # trailing metadata of RESOURCE_EXHAUSTED
LEAST_TIMEOUT_S = 0.001  # gRPC takes a timeout of 0 for none

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Only a call that is under way (WatchWeighter) is kept alive; idle connections are left to the service.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The breaker decides when to try again; gRPC's own waiting (up to two minutes) would only come on top.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # of one connection attempt
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcTransport(Transport):
    """Calls the first of `addresses` (host:port) that is there, and stays with it until it isn't."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)
        self._channels = [grpc.insecure_channel(a, options=CHANNEL_OPTIONS) for a in self._addresses]
        self._stubs = [WeightingServiceStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._current = 0

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise InvalidArgument(f"{method} takes {size} bytes, but a message has at most {MAX_MESSAGE_BYTES}")
        deadline = time.monotonic() + timeout_s
        failure: WeighbridgeError | None = None
        for index in self._order():
            try:
                return self._call_one(index, method, request, deadline)
            except Unavailable as exc:  # every call of the contract is idempotent, so the next address may have it
                failure = failure or exc
                self._current = (index + 1) % len(self._addresses)
            except DeadlineExceeded as exc:
                self._current = (index + 1) % len(self._addresses)
                raise failure or exc from exc
        assert failure is not None
        raise failure

    def watch(self, name: str) -> Iterator[pb.Weighter]:
        index = self._current
        try:
            call = self._stubs[index].WatchWeighter(pb.WatchWeighterRequest(name=name))
        except ValueError as exc:
            raise Unavailable("the client is closed") from exc
        try:
            yield from call
        except grpc.RpcError as exc:
            raise self._error(exc, "WatchWeighter", index) from exc
        finally:
            call.cancel()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _order(self) -> list[int]:
        first, count = self._current, len(self._addresses)
        return [(first + i) % count for i in range(count)]

    def _call_one(self, index: int, method: str, request: Message, deadline: float) -> Any:
        timeout_s = max(deadline - time.monotonic(), LEAST_TIMEOUT_S)
        try:
            return getattr(self._stubs[index], method)(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            raise self._error(exc, method, index) from exc
        except ValueError as exc:  # "Cannot invoke RPC on closed channel!"
            raise Unavailable("the client is closed") from exc

    def _error(self, exc: grpc.RpcError, method: str, index: int) -> WeighbridgeError:
        assert isinstance(exc, grpc.Call)  # what stubs raise is both
        code, details = exc.code().name, exc.details() or ""
        where = f"the weighting service at grpc://{self._addresses[index]}"
        if code in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(f"{where} is not reachable or not ready ({method}): {details or 'cancelled'}")
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{where} did not answer {method} in time: {details}")
        if code == "RESOURCE_EXHAUSTED":
            return ResourceExhausted(details, _retry_after_s(exc))
        if code in BY_CODE:
            return BY_CODE[code](details)
        return Internal(f"{where} answered {method} with {code}: {details}")


def _retry_after_s(exc: grpc.RpcError) -> float:
    assert isinstance(exc, grpc.Call)
    for key, value in exc.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY:
            try:
                return float(value)
            except ValueError:
                break
    return 1.0
