"""What a client shows a service: a token, and what TLS needs. Knows no transport.

An argument beats its environment variable (WEIGHBRIDGE_TOKEN, WEIGHBRIDGE_CA, WEIGHBRIDGE_CERT, WEIGHBRIDGE_KEY); an
empty string beats it too, and means none. An embedded service asks for none of it.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weighting_contract.errors import InvalidArgument
from weighting_contract.local import file_version, is_loopback

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class TlsFiles:
    """PEM files; None: the well-known CAs, no certificate of one's own."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, cert and key. Raises InvalidArgument where a file is missing or not what it should be."""
        self.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        ca, cert, key = (None if path is None else _read(path) for path in (self.ca, self.cert, self.key))
        return ca, cert, key

    def load_into(self, context: ssl.SSLContext) -> None:
        """Has `context` show the certificate and trust the CA. Raises InvalidArgument."""
        for path in (self.ca, self.cert, self.key):
            if path is not None and not path.is_file():
                raise InvalidArgument(f"there is no file {path}, which was given for the connection's encryption")
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as exc:
            raise InvalidArgument(f"ca is {str(self.ca)!r}, which holds no CA certificates as PEM: {exc}") from exc
        try:
            if self.cert is not None and self.key is not None:
                context.load_cert_chain(self.cert, self.key, password="")  # else it would ask the terminal for one
        except (ssl.SSLError, OSError, ValueError) as exc:
            raise InvalidArgument(
                f"cert {str(self.cert)!r} and key {str(self.key)!r} are no certificate and its key, as PEM without a "
                f"password: {exc}"
            ) from exc


class Credentials:
    """Made by `credentials`, or without arguments: none."""

    def __init__(self, token: str | Path = "", tls: TlsFiles | None = None) -> None:
        self._path = token if isinstance(token, Path) else None
        self._version: tuple[int, ...] = ()
        self._token = "" if isinstance(token, Path) else token
        self.tls = tls or TlsFiles()
        if self._path is not None:
            self._version = file_version(self._path)
            self._token = _read_token(self._path)

    def authorization(self) -> str:
        """The header's value, "" without a token. A token's file that has changed is read again."""
        if self._path is not None and (version := file_version(self._path)) != self._version:
            self._version = version
            try:
                self._token = _read_token(self._path)
            except InvalidArgument as exc:
                logger.warning("%s; the token read before is used on", exc.message)
        return f"Bearer {self._token}" if self._token else ""


def credentials(
    url: str,
    hosts: Iterable[str],
    encrypted: bool,
    *,
    token: StrPath | None = None,
    ca: StrPath | None = None,
    cert: StrPath | None = None,
    key: StrPath | None = None,
    insecure_token: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Credentials:
    """What is shown to the service at `url`, which runs on `hosts`.

    Args:
        token: the token itself, or the path of a file that holds it, which is read again when it changes.
        ca, cert, key: PEM files, for encrypted connections only; those of the environment are left aside elsewhere.
        insecure_token: send the token over an unencrypted connection to another machine too.

    Raises:
        InvalidArgument: a file is missing or wrong, cert and key don't come together, or a token would travel
            unencrypted.
    """
    given = {"ca": ca, "cert": cert, "key": key}
    for name, value in given.items():
        if value and not encrypted:
            raise InvalidArgument(f"{name} is given, but {url!r} is not encrypted; use grpcs:// or https://")
        if value is None and encrypted:
            given[name] = environment.get(f"WEIGHBRIDGE_{name.upper()}")
    files = {name: Path(value) for name, value in given.items() if value}
    if ("cert" in files) != ("key" in files):
        missing = "key" if "cert" in files else "cert"
        raise InvalidArgument(f"{missing} is missing: a client's certificate takes both cert and key")
    shown = environment.get("WEIGHBRIDGE_TOKEN", "") if token is None else token
    found = Credentials(Path(shown) if isinstance(shown, os.PathLike) else _checked(shown, "token"), TlsFiles(**files))
    beyond = [host for host in hosts if not is_loopback(host)]
    if found.authorization() and not encrypted and beyond and not insecure_token:
        raise InvalidArgument(
            f"the token would travel unencrypted to {beyond[0]}: use grpcs:// or https://, or say insecure_token=True "
            "(--insecure-token) where the network is trusted"
        )
    return found


def _checked(token: str, what: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidArgument(f"{what} is no token: expected printable ASCII without spaces")
    return token


def _read_token(path: Path) -> str:
    token = _read(path).decode("utf-8", "replace").strip()
    if not token:
        raise InvalidArgument(f"the token file {path} is empty")
    return _checked(token, f"what the token file {path} holds")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"the file {path} can't be read: {exc.strerror or exc}") from exc
