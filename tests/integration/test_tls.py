"""TLS and mTLS on both ports of a real server, and certificates that are replaced while it runs."""

from __future__ import annotations

import logging
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from tests.conftest import ServiceThread
from trainer_client import Client, Limits, Timeouts, connect
from weighting_contract.errors import InvalidArgument, Unavailable
from weighting_service.tls import Tls, tls_of

SPEC = {"features": {"names": ["loss", "length"]}, "head": {"width": 8, "attention_heads": 2}}
BATCH = [[0.5, 1.0], [2.0, 3.0]]
QUICK_TRIALS = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1)


class Files:
    """The PEM files of a service, of a CA of their own."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.clients = trustme.CA()
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.ca_file, self.client_ca = folder / "ca.pem", folder / "client-ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.clients.cert_pem.write_to_path(self.client_ca)
        self.renew()

    def renew(self) -> bytes:
        """A new certificate; returns it, in DER."""
        issued = self.ca.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def of_client(self, folder: Path, ca: trustme.CA) -> dict[str, Path]:
        """Arguments of `connect` for a trainer whose certificate is of `ca`."""
        issued = ca.issue_cert("trainer@example.org")
        files = {"ca": self.ca_file, "cert": folder / "trainer.pem", "key": folder / "trainer-key.pem"}
        issued.private_key_pem.write_to_path(files["key"])
        issued.cert_chain_pems[0].write_to_path(files["cert"])
        return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def tls(tmp_path: Path, files: Files) -> Iterator[ServiceThread]:
    running = ServiceThread(tmp_path / "state", tls_cert=files.cert, tls_key=files.key)
    yield running
    running.stop()


@pytest.fixture
def mtls(tmp_path: Path, files: Files) -> Iterator[ServiceThread]:
    running = ServiceThread(tmp_path / "state", tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.client_ca)
    yield running
    running.stop()


def urls(running: ServiceThread, host: str = "localhost") -> list[str]:
    return [f"grpcs://{host}:{running.address.grpc_port}", f"https://{host}:{running.address.rest_port}"]


def client(url: str, **arguments: Any) -> Client:
    return connect(url, timeouts=Timeouts(admin_s=20, score_s=20), limits=QUICK_TRIALS, **arguments)


def scores(client: Client) -> bool:
    """Whether a job scores, all the way."""
    with client.open_job(weighter="w", spec=SPEC, role="frozen") as job:
        return not job.score(BATCH, 0).fallback


def shown(port: int, ca: trustme.CA, host: str = "127.0.0.1", **versions: Any) -> bytes:
    """The certificate that a new connection gets, in DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that nothing but the version is in the way of an old one
    context.set_alpn_protocols(["h2", "http/1.1"])
    for name, version in versions.items():
        setattr(context, name, version)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate


def test_both_ports_speak_tls_and_nothing_else(tls: ServiceThread, files: Files) -> None:
    for host in ("localhost", "127.0.0.1"):
        for url in urls(tls, host):
            with client(url, ca=files.ca_file) as good:
                assert scores(good)
    stranger = trustme.CA().cert_pem
    stranger.write_to_path(files.ca_file)
    plain = [url.replace("grpcs:", "grpc:").replace("https:", "http:") for url in urls(tls)]
    for url, arguments in [*((url, {"ca": files.ca_file}) for url in urls(tls)), *((url, {}) for url in plain)]:
        with client(url, **arguments) as bad, pytest.raises(Unavailable):
            bad.list_weighters()


def test_several_addresses_over_tls(tls: ServiceThread, files: Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        away = other.getsockname()[1]
    url = f"grpcs://localhost:{away},localhost:{tls.address.grpc_port}"
    with client(url, ca=files.ca_file) as moving:
        assert moving.list_weighters() == []


def test_versions_before_1_2_are_refused(tls: ServiceThread, files: Files) -> None:
    expected = ssl.PEM_cert_to_DER_cert(files.cert.read_text())
    for port in (tls.address.grpc_port, tls.address.rest_port):
        newest_old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
        assert shown(port, files.ca, **newest_old) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that is why it is refused
            old = {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1}
            with pytest.raises((ssl.SSLError, OSError)):
                shown(port, files.ca, **old)


def test_new_certificates_are_taken_up_and_bad_ones_are_not(
    tls: ServiceThread, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    ports = (tls.address.grpc_port, tls.address.rest_port)
    running = [client(url, ca=files.ca_file) for url in urls(tls)]
    assert all(scores(each) for each in running)
    renewed = files.renew()
    for host in ("127.0.0.1", "localhost"):  # without a server name in the greeting, and with one
        assert [shown(port, files.ca, host) for port in ports] == [renewed] * 2
    assert all(scores(each) for each in running), "connections made before go on"
    last = files.key.read_bytes()
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(files.key)  # of another certificate
    for _ in range(2):
        assert [shown(port, files.ca) for port in ports] == [renewed] * 2
    files.key.unlink()
    assert [shown(port, files.ca) for port in ports] == [renewed] * 2
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2, errors
    for message, words in zip(errors, ("no certificate and its key", "can't be read"), strict=True):
        assert words in message
        assert "the certificate read before stays in use" in message
    files.key.write_bytes(last)
    again = files.renew()
    assert [shown(port, files.ca) for port in ports] == [again] * 2
    for each in running:
        assert scores(each)
        each.close()


def test_mtls_lets_in_only_certificates_of_its_ca(mtls: ServiceThread, files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    good, foreign = files.of_client(tmp_path, files.clients), files.of_client(tmp_path / "other", trustme.CA())
    for url in urls(mtls):
        with client(url, **good) as known:
            assert scores(known)
        for arguments in ({"ca": files.ca_file}, foreign):
            with client(url, **arguments) as unknown, pytest.raises(Unavailable):
                unknown.list_weighters()


def test_the_ca_of_clients_is_renewed_too(mtls: ServiceThread, files: Files, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    successor = trustme.CA()
    old, new = files.of_client(tmp_path, files.clients), files.of_client(tmp_path / "new", successor)
    successor.cert_pem.write_to_path(files.client_ca)
    for url in urls(mtls):
        with client(url, **new) as known:
            assert scores(known)
        with client(url, **old) as unknown, pytest.raises(Unavailable):
            unknown.list_weighters()


# ---- Mistakes at the start ------------------------------------------------------------------------------------------


def test_settings_that_lack_a_part_are_sentences(files: Files) -> None:
    assert tls_of(None, None, None) is None
    for arguments, flag in (
        ((files.cert, None, None), "--tls-key"),
        ((None, files.key, None), "--tls-cert"),
        ((None, None, files.client_ca), "--tls-cert"),
    ):
        with pytest.raises(InvalidArgument, match=f"{flag} is missing"):
            tls_of(*arguments)


def test_files_that_can_not_be_used_are_sentences(files: Files, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"none\.pem can't be read: No such file"):
        Tls(files.cert, tmp_path / "none.pem")
    with pytest.raises(InvalidArgument, match="are no certificate and its key"):
        Tls(files.cert, files.cert)
    with pytest.raises(InvalidArgument, match="holds no CA certificates"):
        Tls(files.cert, files.key, files.key)
    other = trustme.CA().issue_cert("localhost").private_key_pem
    other.write_to_path(tmp_path / "other.pem")
    with pytest.raises(InvalidArgument, match="are no certificate and its key"):
        Tls(files.cert, tmp_path / "other.pem")


def test_a_key_with_a_password_is_a_sentence_and_no_question(files: Files) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(InvalidArgument, match="as PEM without a password"):
        Tls(files.cert, files.key)
