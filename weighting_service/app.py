"""Settings to running service: the only place that wires the parts together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import uvicorn

from weighting_contract.errors import InvalidArgument, Unavailable
from weighting_service.engine import EngineLimits
from weighting_service.grpc_server import GrpcServer
from weighting_service.inputs import BatchLimits
from weighting_service.references import ReferenceStore
from weighting_service.rest_server import build_app
from weighting_service.service import ServiceLimits, WeightingService
from weighting_service.settings import Settings
from weighting_service.snapshots import SnapshotStore
from weighting_service.update_log import SqliteUpdateLog

log = logging.getLogger(__name__)


def build_service(settings: Settings, *, loading_wait_s: float = ServiceLimits.loading_wait_s) -> WeightingService:
    """The use cases over a state directory. Raises WeighbridgeError where the settings can't be met."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    return WeightingService(
        *open_state(settings.state, settings.snapshots_kept),
        ReferenceStore(settings.state / "references", models_dir=settings.models, device=device),
        device=device,
        models_dir=settings.models,
        limits=ServiceLimits(
            BatchLimits(settings.max_batch_samples, settings.max_batch_tokens),
            EngineLimits(
                queued_calls=settings.max_queued_calls,
                samples_per_pass=settings.samples_per_pass,
                tokens_per_pass=settings.tokens_per_pass,
            ),
            settings.max_pending_updates,
            settings.snapshot_every,
            loading_wait_s,
        ),
    )


def open_state(folder: Path, snapshots_kept: int) -> tuple[SqliteUpdateLog, SnapshotStore]:
    """The log and the snapshots of a state directory, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InvalidArgument(f"state is {str(folder)!r}, which can't be made a directory: {exc.strerror}") from exc
    return SqliteUpdateLog(folder / "log.sqlite"), SnapshotStore(folder / "snapshots", keep=snapshots_kept)


def choose_device(name: str) -> torch.device:
    """The device of a setting. Raises InvalidArgument where this machine has no such CUDA device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


async def serve_until_signal(settings: Settings) -> None:
    """`serve` until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)


async def serve(settings: Settings, stop: asyncio.Event, on_ready: Callable[[int, int], None] | None = None) -> None:
    """Serves until `stop` is set, then drains. `on_ready` gets the gRPC and the REST port.

    Raises Unavailable or InvalidArgument when it can't start.
    """
    message_bytes = settings.max_message_mb << 20
    with _listen(settings.host, settings.rest_port) as rest_socket:
        service = build_service(settings)
        grpc_server = GrpcServer(service, settings.host, settings.grpc_port, max_message_bytes=message_bytes)
        rest = _Rest(
            uvicorn.Config(
                build_app(service, max_body_bytes=message_bytes), log_config=None, access_log=False, lifespan="off"
            )
        )
        await grpc_server.start()
        rest_task = asyncio.create_task(rest.serve([rest_socket]))
        try:
            await service.start()
            # torch and transformers leave some 300,000 objects that never die: a full collection walked them all, in
            # the middle of a call.
            gc.collect()
            gc.freeze()
            await grpc_server.set_serving(True)
            rest_port = rest_socket.getsockname()[1]
            log.info("ready: gRPC on %s:%d, REST on %s:%d", settings.host, grpc_server.port, settings.host, rest_port)
            if on_ready:
                on_ready(grpc_server.port, rest_port)
            await stop.wait()
            log.info("draining: calls under way get %g s", settings.drain_s)
        finally:
            service.drain()
            await grpc_server.set_serving(False)
            await grpc_server.stop(settings.drain_s)
            rest.should_exit = True
            await rest_task
            await service.stop()
    log.info("stopped")


class _Rest(uvicorn.Server):
    """Leaves the process's signals alone: `serve` owns them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as exc:
            raise Unavailable(
                f"can't listen for REST on {host}:{port}: {exc.strerror}; choose another with --rest-port or --host"
            ) from exc
        yield listener
