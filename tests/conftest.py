"""Real services for tests: the whole thing on free ports, in a thread or in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from protos.weighting.v1 import weighting_pb2_grpc

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small models: more threads only fight for the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network what an unknown name of a model is; read at import

READY = re.compile(r"ready: gRPC on [^ ]*:(\d+), REST on [^ ]*:(\d+)")


@dataclass(frozen=True)
class Address:
    """Where a service listens, and ways to talk to it."""

    grpc_port: int
    rest_port: int

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.rest_port}"


class ServiceThread:
    """The service on free ports inside the test's process."""

    def __init__(self, state: Path, **settings: Any) -> None:
        from weighting_service.settings import Settings

        self._settings = Settings(grpc_port=0, rest_port=0, state=state, **settings)
        self._ready: Future[Address] = Future()
        self._thread = threading.Thread(target=self._run, name="test-service")
        self._thread.start()
        self.address = self._ready.result(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        from weighting_service.app import serve

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await serve(self._settings, self._stop, lambda *ports: self._ready.set_result(Address(*ports)))

        try:
            asyncio.run(main())
        except BaseException as exc:
            if not self._ready.done():
                self._ready.set_exception(exc)
            raise


class ServiceProcess:
    """`python -m weighting_service` on free ports; kill it, start it again on the same ones."""

    def __init__(self, state: Path, *flags: str) -> None:
        self._state, self._flags = state, flags
        self._ports = (0, 0)
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "weighting_service",
            "--state",
            str(self._state),
            "--threads",
            "1",
            *self._flags,
        ]
        command += ["--grpc-port", str(self._ports[0]), "--rest-port", str(self._ports[1])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if match := READY.search(line):
                self._ports = (int(match[1]), int(match[2]))
                self.address = Address(*self._ports)
                # Keep the pipe empty, or the service would block on its own log.
                self._drain = threading.Thread(target=self.process.stderr.read, daemon=True)
                self._drain.start()
                return
        raise AssertionError("the service did not come up:\n" + "".join(lines))

    def kill(self) -> None:
        self.process.kill()
        self._finish()

    def terminate(self) -> int:
        self.process.terminate()
        return self._finish()

    def _finish(self) -> int:
        status = self.process.wait(60)
        self._drain.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Address]:
    running = ServiceThread(tmp_path / "state")
    yield running.address
    running.stop()


@pytest.fixture
def stub(service: Address) -> Iterator[weighting_pb2_grpc.WeightingServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        yield weighting_pb2_grpc.WeightingServiceStub(channel)


@pytest.fixture
def rest(service: Address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.rest_url, timeout=30) as client:
        yield client


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts service processes over one state directory; those still running are killed at the end."""
    started: list[ServiceProcess] = []

    def start(*flags: str) -> ServiceProcess:
        started.append(ServiceProcess(tmp_path / "state", *flags))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()
