"""Settings to running service: the only place that wires the parts together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import torch
import uvicorn
from fastapi import FastAPI

from weighting_contract.errors import InvalidArgument, Unavailable
from weighting_service.auth import TOKENS_VARIABLE, Authenticator, check_exposure
from weighting_service.engine import EngineLimits
from weighting_service.grpc_server import GrpcServer
from weighting_service.inputs import BatchLimits
from weighting_service.references import ReferenceStore
from weighting_service.rest_server import build_app
from weighting_service.service import ServiceLimits, WeightingService
from weighting_service.settings import Settings
from weighting_service.snapshots import SnapshotStore
from weighting_service.storage import Storage, open_storage
from weighting_service.tls import Tls, tls_of
from weighting_service.update_log import RedisUpdateLog, SqliteUpdateLog, UpdateLog

log = logging.getLogger(__name__)

QUEUED_BATCHES_OF_SAMPLES = 32  # largest batches that may wait for the device, by samples ...
QUEUED_BATCHES_OF_TOKENS = 4  # ... and by tokens, of which there are many more


def build_service(settings: Settings, *, loading_wait_s: float = ServiceLimits.loading_wait_s) -> WeightingService:
    """The use cases over a state directory. Raises WeighbridgeError where the settings can't be met."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    storage = open_shared_storage(settings)
    return WeightingService(
        open_log(settings),
        SnapshotStore(storage.within("snapshots"), keep=settings.snapshots_kept),
        ReferenceStore(
            storage.within("references"),
            models_dir=settings.models,
            device=device,
            cache=settings.state / "reference-cache",
            cached_samples=settings.cached_samples,
            per_tenant=settings.max_references_per_tenant,
        ),
        device=device,
        models_dir=settings.models,
        limits=limits_of(settings, loading_wait_s),
    )


def limits_of(settings: Settings, loading_wait_s: float) -> ServiceLimits:
    return ServiceLimits(
        batch=BatchLimits(settings.max_batch_samples, settings.max_batch_tokens),
        engine=EngineLimits(
            queued_calls=settings.max_queued_calls,
            queued_samples=QUEUED_BATCHES_OF_SAMPLES * settings.max_batch_samples,
            queued_tokens=QUEUED_BATCHES_OF_TOKENS * settings.max_batch_tokens,
            queue_wait_s=settings.max_queue_wait_s,
            samples_per_pass=settings.samples_per_pass,
            tokens_per_pass=settings.tokens_per_pass,
        ),
        pending_updates=settings.max_pending_updates,
        snapshot_every=settings.snapshot_every,
        updates_kept=settings.updates_kept,
        sync_s=settings.sync_s,
        loading_wait_s=loading_wait_s,
        calls_per_job=settings.max_calls_per_job,
        weighters_per_tenant=settings.max_weighters_per_tenant,
        jobs_per_tenant=settings.max_jobs_per_tenant,
        weighter_parameters=settings.max_weighter_parameters,
        job_idle_s=settings.job_idle_s,
        log_bytes=settings.max_log_mb << 20,
        free_disk_bytes=settings.min_free_disk_mb << 20,
        disk=settings.state,
    )


def open_log(settings: Settings) -> UpdateLog:
    """The update log of a service: in Redis where the settings say so, else in the state directory."""
    if settings.log:
        return RedisUpdateLog(settings.log, settings.durability)
    return SqliteUpdateLog(settings.state / "log.sqlite")


def open_shared_storage(settings: Settings) -> Storage:
    """Where snapshots and uploaded references lie. Tried out: a wrong place shows now and not at the first save.

    Raises InvalidArgument where it can't be written, or is this service's alone while the log is not.
    """
    if settings.log and not settings.snapshots:
        raise InvalidArgument(
            "--log is given without --snapshots: services that share a log share snapshots and uploaded references, "
            "too; name a place that all of them reach (file:///SHARED or s3://BUCKET/PREFIX)"
        )
    storage = open_storage(settings.snapshots or settings.state)
    try:
        settings.state.mkdir(parents=True, exist_ok=True)
        storage.check()
    except OSError as exc:
        place = "--snapshots" if settings.snapshots else "--state"
        raise InvalidArgument(f"{place} is {storage.url}, which can't be used: {exc}") from exc
    return storage


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
    auth = Authenticator(settings.tokens, os.environ.get(TOKENS_VARIABLE, ""))
    check_exposure(settings.host, auth, settings.insecure)
    tls = tls_of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    with _listen(settings.host, settings.rest_port) as rest_socket:
        service = build_service(settings)
        grpc_server = GrpcServer(
            service, settings.host, settings.grpc_port, max_message_bytes=message_bytes, auth=auth, tls=tls
        )
        rest = _Rest(build_app(service, max_body_bytes=message_bytes, auth=auth), tls)
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

    def __init__(self, app: FastAPI, tls: Tls | None) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self.config.load()
        if tls is not None:
            self.config.ssl = tls.ssl_context()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket that says TCP does asyncio switch Nagle's delay off: 40 ms for each answer on a kept connection.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as exc:
            raise Unavailable(
                f"can't listen for REST on {host}:{port}: {exc.strerror}; choose another with --rest-port or --host"
            ) from exc
        yield listener
