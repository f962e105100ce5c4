"""httpx with one deadline over all of a call. On its own it limits each read, and a trickle of bytes has no end.

Knows nothing of the service.
"""

from __future__ import annotations

import ssl
import time
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx

LEAST_TIMEOUT_S = 0.001  # 0 would be none


def client(base_url: str, verify: ssl.SSLContext) -> httpx.Client:
    """A client of `base_url` for calls with `deadline_extensions`.

    Through a proxy of the environment, deadlines hold for each phase of a call.
    """
    parts = urlsplit(base_url)
    proxied = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")
    return httpx.Client(base_url=base_url, verify=verify, transport=None if proxied else _Transport(verify))


def deadline_extensions(deadline: float) -> dict[str, Any]:
    """Of a request that is over at `deadline` of `time.monotonic`, with a TimeoutException where it isn't."""
    return {"timeout": _Timeouts(deadline)}


class _Left(float):
    """Seconds left when it was made, and until when; httpcore hands it down to each read and write."""

    deadline: float

    def now_s(self) -> float:
        return max(self.deadline - time.monotonic(), LEAST_TIMEOUT_S)


class _Timeouts(dict[str, Any]):
    """httpx's timeout extension: what is left for connecting, waiting for a connection, writing and reading alike."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def get(self, key: str, default: Any = None) -> Any:
        left = _Left(max(self._deadline - time.monotonic(), LEAST_TIMEOUT_S))
        left.deadline = self._deadline
        return left


class _Transport(httpx.HTTPTransport):
    def __init__(self, verify: ssl.SSLContext) -> None:
        super().__init__(verify=verify)
        self._pool = httpcore.ConnectionPool(
            ssl_context=verify, max_connections=100, max_keepalive_connections=20, network_backend=_Backend()
        )


class _Backend(httpcore.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(super().connect_tcp(host, port, _now_s(timeout), local_address, socket_options))


class _Stream(httpcore.NetworkStream):
    """Looks at the clock at each read and write, where httpcore takes one time for all that a phase has."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        _check(timeout, httpcore.ReadTimeout)
        return self._stream.read(max_bytes, _now_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        _check(timeout, httpcore.WriteTimeout)
        self._stream.write(buffer, _now_s(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _now_s(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _now_s(timeout: float | None) -> float | None:
    return timeout.now_s() if isinstance(timeout, _Left) else timeout


def _check(timeout: float | None, kind: type[Exception]) -> None:
    if isinstance(timeout, _Left) and time.monotonic() >= timeout.deadline:
        raise kind("the deadline has passed")
