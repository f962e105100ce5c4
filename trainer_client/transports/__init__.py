"""Transports by URL: `grpc(s)://`, `http(s)://` and `embedded`.

How one of several services is chosen, over gRPC: `grpc://a:50051,b:50051` tries the addresses in their order and stays
with the first that answers, until it doesn't. A name with several addresses in DNS is one such address: gRPC shuffles
what the name resolves to, connects to the first that can be reached, giving each a head start of a quarter of a second,
and stays with it. When that connection breaks, the call under way is made once more, and gRPC connects to another of
the name's addresses, which it looks up again. So jobs spread over the services, and a job leaves its service only with
a reason. (One that answers, but says that it is loading, is such a job's service until it is ready.) Over REST there is
one base URL; balance it in front of the services.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer_client.credentials import StrPath, credentials
from trainer_client.transports.base import Transport
from weighting_contract.errors import InvalidArgument

__all__ = ["Transport", "check_url", "is_embedded", "open_transport"]

EXPECTED = (
    "expected grpc://host:port[,host:port...], grpcs:// likewise for TLS, http://host:port, https://host:port, "
    "embedded:///path/to/state or embedded"
)


def open_transport(
    url: str,
    *,
    token: StrPath | None = None,
    ca: StrPath | None = None,
    cert: StrPath | None = None,
    key: StrPath | None = None,
    insecure_token: bool = False,
) -> Transport:
    """The transport that `url` asks for; nothing is contacted yet. The other arguments are those of `credentials`.

    Raises:
        InvalidArgument: `url` is malformed, or asks for an embedded service that is not installed, or the credentials
            can't be used with it.
    """
    scheme, target = _parse(url)
    if scheme == "embedded":
        from trainer_client.transports.embedded import EmbeddedTransport

        return EmbeddedTransport(target)
    encrypted = scheme in ("grpcs", "https")
    hosts = [address.rpartition(":")[0] for address in target] if scheme.startswith("grpc") else [_host(target)]
    shown = credentials(url, hosts, encrypted, token=token, ca=ca, cert=cert, key=key, insecure_token=insecure_token)
    if scheme.startswith("grpc"):
        from trainer_client.transports.grpc_transport import GrpcTransport

        return GrpcTransport(target, shown, encrypted=encrypted)
    from trainer_client.transports.rest_transport import RestTransport

    return RestTransport(target, shown)


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
    if scheme in ("grpc", "grpcs") and separator:
        return scheme, [_address(part, url) for part in rest.rstrip("/").split(",")]
    if scheme in ("http", "https") and separator:
        return scheme, _base_url(url)
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


def _host(base_url: str) -> str:
    return urlsplit(base_url).hostname or ""
