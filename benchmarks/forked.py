"""The service as a forked process, to be killed and started again many times. Knows no client.

A start of the whole program takes some 5 seconds, nearly all of it imports. So the service runs in children of a fork
server that has imported everything and used nothing: no gRPC object, no thread. A child is ready after about 0.5 s. It
runs the program's own `main`, from its flags to its exit status.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc

from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from weighting_service import failpoints

WAIT_S = 60.0  # longest for a start or an end
READY = re.compile(r"ready: gRPC on [^ ]*:(\d+), REST on [^ ]*:(\d+)")


class ForkedService:
    """`python -m weighting_service` as a fork; killed, and started again on the same state and ports."""

    def __init__(self, state: Path, *flags: str) -> None:
        self.state = state
        self.said: list[str] = []  # what all its lives have logged
        self._flags = flags
        self._ports = (0, 0)
        self._channel: grpc.Channel | None = None
        self._process: BaseProcess | None = None

    def start(self, failpoint: str = "") -> None:
        """Begins a life, with the failpoints of that text; it is not `ready` yet."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["weighting_service.app", "torch._dynamo", __name__])
        reader, writer = context.Pipe(duplex=False)
        flags = ("--state", str(self.state), "--grpc-port", str(self._ports[0]), "--rest-port", str(self._ports[1]))
        arguments = [*flags, *self._flags]
        self._process = context.Process(target=_serve, args=(writer, failpoint, arguments), daemon=True)
        self._settled = threading.Event()  # ready, or dead
        self.ended = threading.Event()
        self.ended_at = 0.0
        self._process.start()
        writer.close()
        self._reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reading.start()

    def ready(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Waits until the service takes calls, and calls `meanwhile` now and then; False where it died before."""
        give_up = time.monotonic() + WAIT_S
        while not self._settled.wait(0.1):
            if time.monotonic() > give_up:
                raise AssertionError(f"the service was not ready after {WAIT_S:g} s:\n{self.last_words()}")
            meanwhile()
        return not self.ended.is_set()

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stub(self) -> Any:
        """One channel for all lives, as a trainer has it."""
        if self._channel is None:
            backoff = [(f"grpc.{name}_reconnect_backoff_ms", 50) for name in ("initial", "min", "max")]
            self._channel = grpc.insecure_channel(f"127.0.0.1:{self._ports[0]}", backoff)
        return WeightingServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def kill(self) -> int:
        """SIGKILL, unless it is dead; the exit status (a signal: negative)."""
        self.strike()
        return self.wait()

    def strike(self) -> None:
        """SIGKILL, and does not wait; for any thread, as long as no other one waits."""
        assert self._process is not None
        self._process.kill()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        assert self._process is not None
        self._process.join(WAIT_S)
        status = self._process.exitcode
        if status is None:
            raise AssertionError(f"the service did not end in {WAIT_S:g} s:\n{self.last_words()}")
        self._reading.join()
        return status

    def close(self) -> None:
        """Kills what is left."""
        if self._process is not None:
            self.kill()
            self._process.close()
            self._process = None
        if self._channel is not None:
            self._channel.close()

    def last_words(self) -> str:
        return "".join(self.said[-40:])

    def _read(self, reader: Connection) -> None:
        with reader, open(os.dup(reader.fileno()), errors="replace") as lines:
            for line in lines:
                self.said.append(line)
                if match := READY.search(line):
                    self._ports = (int(match[1]), int(match[2]))
                    self._settled.set()
        self.ended_at = time.monotonic()
        self.ended.set()
        self._settled.set()


def _serve(errors: Connection, failpoint: str, arguments: list[str]) -> None:
    """In the child: the program itself, with its own failpoints and its standard error in the parent's hands."""
    from weighting_service.__main__ import main

    os.dup2(errors.fileno(), 2)
    errors.close()
    os.environ[failpoints.VARIABLE] = failpoint
    importlib.reload(failpoints)  # reads the variable when it is imported, which the fork server has done
    sys.exit(main(arguments))
