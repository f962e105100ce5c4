"""gRPC around the use cases: status codes, streams, health and reflection. Thin; everything it does is in `rpc`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import (
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WeighbridgeError,
)
from weighting_contract.tracing import TRACEPARENT
from weighting_service import rpc
from weighting_service.auth import Authenticator, Caller
from weighting_service.calls import call
from weighting_service.logs import REQUEST_ID, begin_request
from weighting_service.service import WeightingService
from weighting_service.tenancy import TenantService
from weighting_service.tls import Tls
from weighting_service.tracing import TRACER

Context = grpc.aio.ServicerContext[Any, Any]

# Calls of one connection that are open at a time; further ones wait on the client's side. What is open is taken up in
# the order of arrival, so that a burst of one client's would be in front of everybody's next call.
STREAMS_PER_CONNECTION = 32

MAX_MESSAGE = 2000  # characters; it travels in the trailing metadata, where peers accept no more than 8 KB

SERVICE = pb.DESCRIPTOR.services_by_name["WeightingService"]
SERVICE_NAME = SERVICE.full_name

M = TypeVar("M", bound=Message)


class GrpcServer:
    """A listening gRPC server on one event loop; not serving by the health protocol until `set_serving(True)`.

    Health and reflection are open to callers without a token.
    """

    def __init__(
        self,
        service: WeightingService,
        host: str,
        port: int,
        *,
        max_message_bytes: int,
        auth: Authenticator,
        tls: Tls | None = None,
    ) -> None:
        """Binds at once. Raises Unavailable when the address can't be had. `port` 0 takes a free one."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", 30_000),  # clients keep long watches alive
                ("grpc.so_reuseport", 0),  # else a second service would share the port unnoticed
                ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
                ("grpc.http.overload_protection", 0),  # it refuses some calls of clients that keep to the limit
            ]
        )
        self._server.add_generic_rpc_handlers((_Door(_handler(_Servicer(service, auth)), service, auth),))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, tls.grpc_credentials())
        except RuntimeError as exc:
            raise Unavailable(
                f"can't listen for gRPC on {address}: the port is in use or the address is not this machine's; "
                "choose another with --grpc-port or --host"
            ) from exc

    async def start(self) -> None:
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls and waits for those under way, at most `grace_s`."""
        await self._server.stop(grace_s)


class _Servicer:
    """Method names are those of the contract; unary ones are made of `rpc.UNARY`."""

    def __init__(self, service: WeightingService, auth: Authenticator) -> None:
        self._service = service
        self._auth = auth
        for method, function in rpc.UNARY.items():
            setattr(self, method, self._unary(method, function))

    def _unary(self, method: str, function: rpc.Unary) -> Any:
        async def handle(request: Any, context: Context) -> Any:
            async with _answering(context):
                with call(self._service.metrics, method):
                    return await function(self._for_caller(context), _whole(request))

        return handle

    async def StreamScore(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in self._stream("StreamScore", rpc.score, requests, context):
            yield response

    async def StreamMetaUpdate(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in self._stream("StreamMetaUpdate", rpc.meta_update, requests, context):
            yield response

    async def _stream(
        self, method: str, function: rpc.Unary, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        """Answers in order; the first error ends the stream with its status. Each request is one of today's caller."""
        async with _answering(context):
            self._for_caller(context).allow(method)  # nobody else is listened to
            async for request in requests:
                with call(self._service.metrics, method):
                    response = await function(self._for_caller(context), _whole(request))
                yield response

    async def WatchWeighter(self, request: pb.WatchWeighterRequest, context: Context) -> AsyncIterator[pb.Weighter]:
        async with _answering(context):
            with call(self._service.metrics, "WatchWeighter"):
                caller = self._caller(context)
                async for message in rpc.watch_weighter(TenantService(self._service, caller), _whole(request)):
                    if self._caller(context) != caller:
                        raise Unauthenticated("the token means something else by now; watch again")
                    yield message

    def _for_caller(self, context: Context) -> TenantService:
        return TenantService(self._service, self._caller(context))

    def _caller(self, context: Context) -> Caller:
        return self._auth.caller(_value(context.invocation_metadata(), "authorization"))


class _Door(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it takes none at run time
    """Refuses whoever has no valid token before his message is read: it may be large, and there may be many."""

    def __init__(
        self, methods: grpc.GenericRpcHandler[Any, Any], service: WeightingService, auth: Authenticator
    ) -> None:
        self._methods = methods
        self._service = service
        self._auth = auth

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._methods.service(handler_call_details)
        try:
            self._auth.caller(_value(handler_call_details.invocation_metadata, "authorization"))
        except Unauthenticated as exc:
            return handler and self._refusing(exc, handler_call_details.method.rpartition("/")[2])
        return handler

    def _refusing(self, exc: Unauthenticated, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_: AsyncIterator[Any], context: Context) -> None:
            async with _answering(context):
                with call(self._service.metrics, method):
                    raise exc

        # Whatever the method is: a stream's messages are read on request only.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _handler(servicer: _Servicer) -> grpc.GenericRpcHandler[Any, Any]:
    """The contract's methods. Unlike the generated code it hands on what is no message, to be refused like the rest."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    handlers = {
        method.name: kinds[method.client_streaming, method.server_streaming](
            getattr(servicer, method.name),
            request_deserializer=_reader(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in SERVICE.methods
    }
    return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)


def _reader(kind: type[Message]) -> Callable[[bytes], Message | InvalidArgument]:
    def read(content: bytes) -> Message | InvalidArgument:
        try:
            return kind.FromString(content)
        except DecodeError as exc:
            return InvalidArgument(f"the request is no {kind.DESCRIPTOR.name}: {exc}")

    return read


def _whole(request: M | InvalidArgument) -> M:
    """The message that came. Raises InvalidArgument where the bytes that came are none."""
    if isinstance(request, InvalidArgument):
        raise request
    return request


@asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Gives the call its id, and ends it with the status of a WeighbridgeError."""
    sent = context.invocation_metadata()
    identified = (REQUEST_ID, begin_request(_value(sent, REQUEST_ID)))
    context.set_trailing_metadata((identified,))
    TRACER.begin(_value(sent, TRACEPARENT))
    try:
        yield
    except WeighbridgeError as exc:
        retry = (("retry-after-s", f"{exc.retry_after_s:g}"),) if isinstance(exc, ResourceExhausted) else ()
        await context.abort(grpc.StatusCode[exc.code], exc.message[:MAX_MESSAGE], (identified, *retry))


def _value(metadata: Any, key: str) -> str | None:
    """The last value that the caller sent for `key`."""
    found = None
    for name, value in metadata or ():
        if name == key and isinstance(value, str):
            found = value
    return found
