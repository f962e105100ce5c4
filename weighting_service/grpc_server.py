"""gRPC around the use cases: status codes, streams, health and reflection. Thin; everything it does is in `rpc`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1 import weighting_pb2_grpc
from weighting_contract.errors import ResourceExhausted, Unavailable, WeighbridgeError
from weighting_service import rpc
from weighting_service.calls import call
from weighting_service.service import WeightingService

Context = grpc.aio.ServicerContext[Any, Any]

MAX_MESSAGE = 2000  # characters; it travels in the trailing metadata, where peers accept no more than 8 KB

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WeightingService"].full_name


class GrpcServer:
    """A listening gRPC server on one event loop; not serving by the health protocol until `set_serving(True)`."""

    def __init__(self, service: WeightingService, host: str, port: int, *, max_message_bytes: int) -> None:
        """Binds at once. Raises Unavailable when the address can't be had. `port` 0 takes a free one."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", 30_000),  # clients keep long watches alive
                ("grpc.so_reuseport", 0),  # else a second service would share the port unnoticed
            ]
        )
        weighting_pb2_grpc.add_WeightingServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _Servicer(service), self._server
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
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

    def __init__(self, service: WeightingService) -> None:
        self._service = service
        for method, function in rpc.UNARY.items():
            setattr(self, method, self._unary(method, function))

    def _unary(self, method: str, function: rpc.Unary) -> Any:
        async def handle(request: Any, context: Context) -> Any:
            async with _aborting(context):
                with call(self._service.metrics, method):
                    return await function(self._service, request)

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
        """Answers in order; the first error ends the stream with its status."""
        async with _aborting(context):
            async for request in requests:
                with call(self._service.metrics, method):
                    response = await function(self._service, request)
                yield response

    async def WatchWeighter(self, request: pb.WatchWeighterRequest, context: Context) -> AsyncIterator[pb.Weighter]:
        async with _aborting(context):
            with call(self._service.metrics, "WatchWeighter"):
                async for view in rpc.watch_weighter(self._service, request):
                    yield view


@asynccontextmanager
async def _aborting(context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of a WeighbridgeError."""
    try:
        yield
    except WeighbridgeError as exc:
        trailing = (("retry-after-s", f"{exc.retry_after_s:g}"),) if isinstance(exc, ResourceExhausted) else ()
        await context.abort(grpc.StatusCode[exc.code], exc.message[:MAX_MESSAGE], trailing)
