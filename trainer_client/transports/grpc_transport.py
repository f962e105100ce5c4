"""gRPC: the fast path. The only module of the client that knows gRPC; errors are mapped here, once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from trainer_client.credentials import Credentials
from trainer_client.tracing import TRACER
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
UNANSWERED = 2  # calls in a row after which a connection is taken for dead
LEAST_TIMEOUT_S = 0.001  # gRPC takes a timeout of 0 for none

# A name may stand for several services: each channel takes one of them at random and stays with it.
SERVICE_CONFIG = {"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": True}}]}

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),  # services come and go faster than gRPC's 30 s
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
    """Calls the first of `addresses` (host:port) that is there, and stays with it until it isn't.

    Args:
        addresses: tried in this order; each may be a name that stands for several services.
        credentials: the token goes with each call, what TLS needs into the connections.
        encrypted: TLS, or nothing of it.
    """

    def __init__(
        self, addresses: Sequence[str], credentials: Credentials | None = None, *, encrypted: bool = False
    ) -> None:
        self._credentials = credentials or Credentials()
        self._scheme = "grpcs" if encrypted else "grpc"
        self._addresses = list(addresses)
        self._channels = [self._channel(a) for a in self._addresses]
        self._stubs = [_stub(channel) for channel in self._channels]
        self._answered = [False] * len(self._addresses)  # each one's last call
        self._unanswered = [0] * len(self._addresses)  # each one's calls in a row that met their deadline
        self._closed = False
        self._changing = threading.Lock()  # of channels
        self._current = 0

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise InvalidArgument(f"{method} takes {size} bytes, but a message has at most {MAX_MESSAGE_BYTES}")
        deadline = time.monotonic() + timeout_s
        failure: WeighbridgeError | None = None
        attempts = self._attempts()
        for made, index in enumerate(attempts):
            shares = self._shares(index, len(attempts) - made)
            try:
                with TRACER.span(method, "CLIENT", address=self._addresses[index]):
                    return self._call_one(index, method, request, (deadline - time.monotonic()) / shares)
            except (Unavailable, DeadlineExceeded) as exc:
                # Every call of the contract is idempotent, so the next address may have it.
                failure = failure or exc
                self._current = (index + 1) % len(self._addresses)
                if isinstance(exc, DeadlineExceeded) and shares == 1:
                    break
        assert failure is not None
        raise failure

    def watch(self, name: str) -> Iterator[pb.Weighter]:
        index = self._current
        try:
            call = self._stubs[index].WatchWeighter(pb.WatchWeighterRequest(name=name), metadata=self._metadata())
        except ValueError as exc:
            raise Unavailable("the client is closed") from exc
        try:
            yield from call
        except grpc.RpcError as exc:
            raise self._error(exc, "WatchWeighter", index) from exc
        finally:
            call.cancel()

    def close(self) -> None:
        with self._changing:
            self._closed = True
            for channel in self._channels:
                channel.close()

    def _channel(self, address: str) -> grpc.Channel:
        """Connects when it is first used."""
        if self._scheme == "grpc":
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        ca, cert, key = self._credentials.tls.read()
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=CHANNEL_OPTIONS)

    def _heard(self, index: int, stub: WeightingServiceStub, error: WeighbridgeError | None) -> None:
        """Counts whether an address answers, and leaves a connection that nothing comes back from.

        A middlebox that has lost a connection may swallow all that goes into it, and gRPC's own keepalive only looks at
        calls that last longer than ours; so it would stay with that connection, and every call meet its deadline.
        """
        self._answered[index] = not isinstance(error, Unavailable | DeadlineExceeded)
        with self._changing:
            if stub is not self._stubs[index] or self._closed:
                return
            self._unanswered[index] = self._unanswered[index] + 1 if isinstance(error, DeadlineExceeded) else 0
            if self._unanswered[index] < UNANSWERED:
                return
            try:
                channel = self._channel(self._addresses[index])
            except WeighbridgeError:  # the files of the credentials are just being replaced
                return
            self._channels[index].close()
            self._channels[index], self._stubs[index] = channel, _stub(channel)
            self._unanswered[index] = 0

    def _attempts(self) -> list[int]:
        """Whom to ask, one after the other. A single name twice: the second time another of its services may answer."""
        first, count = self._current, len(self._addresses)
        return [(first + i) % count for i in range(count)] if count > 1 else [first, first]

    def _shares(self, index: int, attempts_left: int) -> int:
        """Into how many the time left is parted: one that answered before gets it all, so that a slow answer is waited
        for; one that may be a black hole leaves something for the others."""
        return 1 if self._answered[index] or len(self._addresses) == 1 else attempts_left

    def _call_one(self, index: int, method: str, request: Message, timeout_s: float) -> Any:
        timeout_s = max(timeout_s, LEAST_TIMEOUT_S)
        stub = self._stubs[index]
        try:
            answer = getattr(stub, method)(request, timeout=timeout_s, metadata=self._metadata())
        except grpc.RpcError as exc:
            error = self._error(exc, method, index)
            self._heard(index, stub, error)
            raise error from exc
        except ValueError as exc:  # "Cannot invoke RPC on closed channel!"
            raise Unavailable("the client is closed") from exc
        self._heard(index, stub, None)
        if answer is None:  # what gRPC gives for bytes that are no message, where the status came through
            raise Internal(
                f"the weighting service at {self._scheme}://{self._addresses[index]} answered {method} with "
                "something that can't be read"
            )
        return answer

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        authorization = self._credentials.authorization()
        shown = (("authorization", authorization),) if authorization else ()
        return shown + tuple(TRACER.headers().items())

    def _error(self, exc: grpc.RpcError, method: str, index: int) -> WeighbridgeError:
        assert isinstance(exc, grpc.Call)  # what stubs raise is both
        code, details = exc.code().name, exc.details() or ""
        where = f"the weighting service at {self._scheme}://{self._addresses[index]}"
        if code in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(f"{where} is not reachable or not ready ({method}): {details or 'cancelled'}")
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{where} did not answer {method} in time: {details}")
        if code == "RESOURCE_EXHAUSTED" and "message larger than max" in details:  # gRPC's own word; no retry helps
            return InvalidArgument(f"{method} takes a larger message than one may be (--max-message-mb): {details}")
        if code == "RESOURCE_EXHAUSTED":
            return ResourceExhausted(details, _retry_after_s(exc))
        if code in BY_CODE:
            return BY_CODE[code](details)
        return Internal(f"{where} answered {method} with {code}: {details}")


def _stub(channel: grpc.Channel) -> WeightingServiceStub:
    return WeightingServiceStub(channel)  # type: ignore[no-untyped-call]


def _retry_after_s(exc: grpc.RpcError) -> float:
    assert isinstance(exc, grpc.Call)
    for key, value in exc.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY:
            try:
                return float(value)
            except ValueError:
                break
    return 1.0
