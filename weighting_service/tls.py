"""Certificates of both ports: TLS 1.2 or newer, optionally mutual, taken up anew when their files change."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from weighting_contract.errors import InvalidArgument
from weighting_contract.local import file_version

log = logging.getLogger(__name__)

Version = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Material:
    """One version of the files, known to fit together."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


def tls_of(cert: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """TLS as the settings ask for it; None where they don't. Raises InvalidArgument, naming the flag."""
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        missing = "--tls-cert" if cert is None else "--tls-key"
        raise InvalidArgument(f"{missing} is missing: TLS needs --tls-cert and --tls-key, mTLS --tls-client-ca too")
    return Tls(cert, key, client_ca)


class Tls:
    """The certificate that both ports show, and the CA that clients' certificates must be of.

    The files are looked at when a connection is made. A new version that can't be used is reported in the log, and the
    one before stays. Thread-safe: gRPC asks from threads of its own.

    Raises:
        InvalidArgument: a file can't be read, or is no PEM, or key and certificate don't belong together.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._files = [cert, key] if client_ca is None else [cert, key, client_ca]
        self._lock = threading.Lock()
        self._version = self._look()
        self._material = self._load()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; every new connection gets the newest certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(), self._grpc_configuration, self._material.client_ca is not None
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For servers of the standard library; every new connection gets the newest certificate."""

        def renew(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._newest().context

        outer = self._context()  # of its own: the newest one must not be asked about itself
        outer.sni_callback = renew  # called for connections without a server name too
        return outer

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        newest = self._newest()
        return grpc.ssl_server_certificate_configuration([(newest.key, newest.certificate)], newest.client_ca)

    def _newest(self) -> _Material:
        with self._lock:
            try:
                version = self._look()
                if version != self._version:
                    self._version = version
                    self._material = self._load()
                    log.info("the certificate in %s has changed and is in use", self._files[0])
            except InvalidArgument as exc:
                log.error("%s; the certificate read before stays in use", exc.message)
            return self._material

    def _look(self) -> Version:
        """Changes with any of the files; a missing one is told from one that is there."""
        return tuple(file_version(path) for path in self._files)

    def _load(self) -> _Material:
        certificate, key, *others = [_read(path) for path in self._files]
        return _Material(certificate, key, others[0] if others else None, self._context())

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key, *client_ca = self._files
        try:
            context.load_cert_chain(cert, key, password="")  # else a key with a password would ask the terminal for it
        except (ssl.SSLError, OSError, ValueError) as exc:
            raise InvalidArgument(
                f"{cert} and {key} are no certificate and its key, as PEM without a password: {exc}"
            ) from exc
        for path in client_ca:
            try:
                context.load_verify_locations(path)
            except (ssl.SSLError, OSError) as exc:
                raise InvalidArgument(f"{path} holds no CA certificates as PEM: {exc}") from exc
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"the certificate file {path} can't be read: {exc.strerror or exc}") from exc
