"""A TCP proxy in front of a real server, which cuts connections where a test says so."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Literal, Self


class TcpProxy:
    """Passes bytes on, both ways, until told otherwise; listens on `port`.

    Args:
        target_port: of the server on this machine.
    """

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._cut: str | None = None
        self._mutex = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self, what: Literal["request", "answer"]) -> None:
        """The next request (so the server never has it whole), or the next answer, is dropped with its connection."""
        with self._mutex:
            self._cut = what

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            _hang_up(each)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                pumps: tuple[tuple[socket.socket, socket.socket, str], ...] = (
                    (near, far, "request"),
                    (far, near, "answer"),
                )
                for pump in pumps:
                    self._threads.append(threading.Thread(target=self._pump, args=pump))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, what: str) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and not self._is_cut(what):
                sink.sendall(data)
        _hang_up(source)
        _hang_up(sink)

    def _is_cut(self, what: str) -> bool:
        with self._mutex:
            if self._cut != what:
                return False
            self._cut = None
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
