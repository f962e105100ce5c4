"""Transports by URL: `grpc://`, `http(s)://` and `embedded`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer_client.transports.base import Transport
from weighting_contract.errors import InvalidArgument

__all__ = ["Transport", "check_url", "is_embedded", "open_transport"]

EXPECTED = (
    "expected grpc://host:port[,host:port...], http://host:port, https://host:port, "
    "embedded:///path/to/state or embedded"
)


def open_transport(url: str) -> Transport:
    """The transport that `url` asks for; nothing is contacted yet.

    Raises:
        InvalidArgument: `url` is malformed, or asks for an embedded service that is not installed.
    """
    scheme, target = _parse(url)
    if scheme == "embedded":
        from trainer_client.transports.embedded import EmbeddedTransport

        return EmbeddedTransport(target)
    if scheme == "grpc":
        from trainer_client.transports.grpc_transport import GrpcTransport

        return GrpcTransport(target)
    from trainer_client.transports.rest_transport import RestTransport

    return RestTransport(target)


def check_url(url: str) -> None:
    """Raises InvalidArgument where `url` is malformed; loads nothing of what a transport needs."""
    _parse(url)


def is_embedded(url: str) -> bool:
    return isinstance(url, str) and (url == "embedded" or url.startswith("embedded:"))


def _parse(url: str) -> tuple[str, Any]:
    """Kind of the transport, and what it is opened with."""
    if is_embedded(url):
        return "embedded", _embedded_path(url)
    scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if scheme == "grpc" and separator:
        return "grpc", [_address(part, url) for part in rest.rstrip("/").split(",")]
    if scheme in ("http", "https") and separator:
        return "http", _base_url(url)
    raise InvalidArgument(f"url is {url!r}, {EXPECTED}")


def _embedded_path(url: str) -> Path | None:
    path = url.removeprefix("embedded").removeprefix("://")
    if not path:
        return None
    if not path.startswith("/") or not url.startswith("embedded:///"):
        raise InvalidArgument(f"url is {url!r}, expected embedded:///path/to/state with an absolute path, or embedded")
    return Path(path)


def _address(part: str, url: str) -> str:
    host, separator, port = part.strip().rpartition(":")
    bad_host = not host or "/" in host or "@" in host or (":" in host and not host.startswith("["))
    if not separator or bad_host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"url is {url!r}: {part!r} is not host:port with a port from 1 to 65535; {EXPECTED}")
    return f"{host}:{port}"


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise InvalidArgument(f"url is {url!r}: {exc}; {EXPECTED}") from exc
    if not host or port == 0 or parts.query or parts.fragment:
        raise InvalidArgument(f"url is {url!r}, {EXPECTED}")
    return url.rstrip("/")
