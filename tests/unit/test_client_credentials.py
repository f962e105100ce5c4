"""What a client shows a service, and where it refuses to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from trainer_client import connect
from trainer_client.credentials import Credentials, credentials
from weighting_contract.errors import InvalidArgument


def of(encrypted: bool = True, host: str = "far.example", **given: Any) -> Credentials:
    scheme = "grpcs" if encrypted else "grpc"
    return credentials(f"{scheme}://{host}:1", [host], encrypted, **{"environment": {}, **given})


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    """Files of a CA and of a certificate of its."""
    ca = trustme.CA()
    certificate = ca.issue_cert("trainer@example.org")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    ca.cert_pem.write_to_path(files["ca"])
    certificate.private_key_pem.write_to_path(files["key"])
    certificate.cert_chain_pems[0].write_to_path(files["cert"])
    return files


def test_an_argument_beats_the_environment_and_an_empty_one_too() -> None:
    environment = {"WEIGHBRIDGE_TOKEN": "of-the-environment"}
    assert of(environment=environment).authorization() == "Bearer of-the-environment"
    assert of(environment=environment, token="given").authorization() == "Bearer given"
    assert of(environment=environment, token="").authorization() == ""
    assert of().authorization() == ""


def test_files_of_the_environment_are_for_encrypted_connections(pem: dict[str, Path]) -> None:
    environment = {f"WEIGHBRIDGE_{name.upper()}": str(path) for name, path in pem.items()}
    tls = of(environment=environment).tls
    assert (tls.ca, tls.cert, tls.key) == (pem["ca"], pem["cert"], pem["key"])
    assert tls.read() == tuple(pem[name].read_bytes() for name in ("ca", "cert", "key"))
    assert of(environment=environment, ca="").tls.ca is None
    assert of(encrypted=False, environment=environment).tls.ca is None
    with pytest.raises(InvalidArgument, match=r"ca is given, but 'grpc://far.example:1' is not encrypted"):
        of(encrypted=False, ca=pem["ca"])


def test_a_token_does_not_travel_unencrypted() -> None:
    with pytest.raises(InvalidArgument, match=r"the token would travel unencrypted to far\.example: use grpcs://"):
        of(encrypted=False, token="secret")
    assert of(encrypted=False, token="secret", insecure_token=True).authorization() == "Bearer secret"
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert of(encrypted=False, token="secret", host=host).authorization() == "Bearer secret"
    for url in ("grpc://127.0.0.1:1,far.example:1", "http://far.example:1"):
        with pytest.raises(InvalidArgument, match=r"unencrypted to far\.example"):
            connect(url, token="secret")
        connect(url, token="secret", insecure_token=True).close()


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    shown = of(token=path)
    assert shown.authorization() == "Bearer first"
    path.write_text("second")
    assert shown.authorization() == "Bearer second"
    path.write_text("not a token")
    assert [shown.authorization() for _ in range(3)] == ["Bearer second"] * 3
    path.unlink()
    assert [shown.authorization() for _ in range(3)] == ["Bearer second"] * 3
    assert len(caplog.records) == 2
    assert all("the token read before is used on" in record.getMessage() for record in caplog.records)
    path.write_text("third")
    assert shown.authorization() == "Bearer third"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"token": "two words"}, "token is no token"),
        ({"token": "ünïcode"}, "token is no token"),
        ({"token": Path("/nowhere/token")}, "the file /nowhere/token can't be read: No such file"),
        ({"ca": "/nowhere/ca.pem"}, "there is no file /nowhere/ca.pem"),
        ({"cert": "c.pem"}, "key is missing: a client's certificate takes both"),
        ({"key": "k.pem"}, "cert is missing"),
    ],
)
@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_mistakes_are_sentences(scheme: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        connect(f"{scheme}://far.example:1", **given)
    assert words in error.value.message


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_files_that_are_something_else_are_sentences(scheme: str, pem: dict[str, Path], tmp_path: Path) -> None:
    url = f"{scheme}://far.example:1"
    with pytest.raises(InvalidArgument, match="holds no CA certificates as PEM"):
        connect(url, ca=pem["key"])
    other = trustme.CA().issue_cert("else@example.org").private_key_pem
    other.write_to_path(tmp_path / "other.pem")
    with pytest.raises(InvalidArgument, match="are no certificate and its key"):
        connect(url, cert=pem["cert"], key=tmp_path / "other.pem")
    connect(url, **pem).close()
