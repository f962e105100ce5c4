"""Tokens and what they say about a caller; where a service may run without; the ids of calls in the log."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from weighting_contract.errors import InvalidArgument, PermissionDenied, Unauthenticated
from weighting_service.__main__ import main
from weighting_service.auth import ANYONE, Authenticator, Caller, check_exposure
from weighting_service.logs import JsonFormatter, TextFormatter, begin_request
from weighting_service.tokens import DEFAULT_ROLES, hash_of, new_token, parse_tokens

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def entry(token: str, tenant: str = "a", **fields: str) -> str:
    """A [[token]] whose fields are TOML."""
    values = {"id": f'"{token}-id"', "sha256": f'"{hash_of(token)}"', "tenant": f'"{tenant}"', "roles": '["score"]'}
    return "\n".join(["[[token]]", *(f"{name} = {value}" for name, value in (values | fields).items())]) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("one") + entry("two", tenant="b", roles='["teach", "admin"]'))
    return path


def test_a_token_names_a_tenant_and_its_roles(file: Path) -> None:
    auth = Authenticator(file)
    assert auth.enabled
    assert auth.caller("Bearer one") == Caller("a", frozenset({"score"}), "one-id")
    assert auth.caller("bearer  two ") == Caller("b", frozenset({"teach", "admin"}), "two-id")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "a token is missing"),
        ("", "a token is missing"),
        ("Bearer three", "not valid here"),
        ("Bearer", "not valid here"),
        ("Basic one", "not valid here"),
        ("one", "not valid here"),
        (f"Bearer {hash_of('one')}", "not valid here"),
        ("Bearer \udcff\xe9", "not valid here"),
    ],
)
def test_whoever_shows_no_good_token_is_not_let_in(file: Path, header: str | None, words: str) -> None:
    with pytest.raises(Unauthenticated, match=words) as error:
        Authenticator(file).caller(header)
    assert "-id" not in error.value.message


def test_a_token_expires(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("one", expires="2026-05-01T02:00:00+02:00") + entry("two", expires='"2026-05-01T00:00:01Z"'))
    clock = NOW.timestamp() - 1
    auth = Authenticator(path, now=lambda: clock)
    assert auth.caller("Bearer one").token_id == "one-id"
    clock += 1
    with pytest.raises(Unauthenticated, match="'one-id' expired at 2026-05-01"):
        auth.caller("Bearer one")
    assert auth.caller("Bearer two").token_id == "two-id"
    clock += 1
    with pytest.raises(Unauthenticated, match="expired"):
        auth.caller("Bearer two")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    auth = Authenticator(file)
    file.write_text(entry("three"))
    assert auth.caller("Bearer three").token_id == "three-id"
    with pytest.raises(Unauthenticated):
        auth.caller("Bearer one")
    file.write_text("[[token")
    for _ in range(3):
        assert auth.caller("Bearer three").token_id == "three-id"
    file.unlink()
    for _ in range(3):
        assert auth.caller("Bearer three").token_id == "three-id"
    file.write_text("")  # as a writer leaves it for a moment
    assert auth.caller("Bearer three").token_id == "three-id"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 3, errors
    for message, words in zip(errors, ("is not TOML", "can't be read", "holds no [[token]]"), strict=True):
        assert words in message
        assert "the tokens read before stay in force" in message
    file.write_text(entry("four"))
    assert auth.caller("Bearer four").token_id == "four-id"


def test_tokens_of_the_environment_stand_beside_those_of_the_file(file: Path) -> None:
    auth = Authenticator(file, entry("inline"))
    assert {auth.caller(f"Bearer {token}").token_id for token in ("one", "inline")} == {"one-id", "inline-id"}
    assert Authenticator(None, entry("inline")).caller("Bearer inline").tenant == "a"
    with pytest.raises(InvalidArgument, match="WEIGHBRIDGE_TOKENS_TOML has the id 'one-id' twice"):
        Authenticator(file, entry("one"))


def test_without_tokens_anyone_may_do_everything() -> None:
    auth = Authenticator()
    assert not auth.enabled
    assert auth.caller(None) == auth.caller("Bearer what") == ANYONE
    for role in ("score", "teach", "admin", "operate"):
        ANYONE.require(role, "this")


def test_a_role_contains_no_other() -> None:
    admin = Caller("a", frozenset({"admin", "score"}), "root")
    admin.require("admin", "DeleteWeighter")
    with pytest.raises(
        PermissionDenied, match="MetaUpdate needs the role 'teach', and the token 'root' has admin, score"
    ):
        admin.require("teach", "MetaUpdate")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no [[token]] entry"),
        ("token = []", "holds no [[token]] entry"),
        ("token = 3", "holds no [[token]] entry"),
        ("token = [3]", "token[0] is 3, expected a table"),
        ("tokens = []", "has 'tokens', expected [[token]] entries"),
        ("[[token]", "is not TOML"),
        (entry("x", tenant="a b"), "token[0].tenant is 'a b'"),
        (entry("x", tenant="a/b"), "token[0].tenant is 'a/b'"),
        (entry("x", tenant="*"), "token[0].tenant is '*'"),
        (entry("x", sha256='"wb_secret"'), "token[0].sha256 is no SHA-256"),
        (entry("x", roles="[]"), "token[0].roles is [], expected a list of some of score, teach, admin, operate"),
        (entry("x", roles='["boss"]'), "token[0].roles has 'boss'"),
        (entry("x", roles='"score"'), "token[0].roles is 'score'"),
        (entry("x", expires="2026-05-01T00:00:00"), "token[0].expires is '2026-05-01 00:00:00', expected a time with"),
        (entry("x", expires='"soon"'), "token[0].expires is 'soon'"),
        (entry("x", expires="2026-05-01"), "token[0].expires is '2026-05-01'"),
        (entry("x", id="7"), "token[0].id is 7, expected a string"),
        (entry("x", role='"score"'), "token[0] has 'role', expected some of id,"),
        (entry("x") + entry("x", id='"y"'), "twice; each entry is of one token"),
        (entry("x") + entry("y", id='"x-id"'), "has the id 'x-id' twice"),
    ],
)
def test_mistakes_in_a_file_are_sentences(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as error:
        Authenticator(path)
    assert f"the tokens file {path}" in error.value.message
    assert words in error.value.message
    assert "wb_secret" not in error.value.message


def test_a_file_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"the tokens file .* can't be read: No such file"):
        Authenticator(tmp_path / "none.toml")


# ---- The command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_token_and_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--tenant", "prose", "--days", "30", "--id", "ci"]) == 0
    shown = capsys.readouterr()
    token = shown.err.splitlines()[-1]
    assert token not in shown.out, "what is appended to a file must not hold the token"
    path = tmp_path / "tokens.toml"
    path.write_text(shown.out)
    assert Authenticator(path).caller(f"Bearer {token}") == Caller("prose", frozenset(DEFAULT_ROLES), "ci")
    later = Authenticator(path, now=lambda: (datetime.now(UTC) + timedelta(days=31)).timestamp())
    with pytest.raises(Unauthenticated, match="expired"):
        later.caller(f"Bearer {token}")


def test_tokens_are_long_and_random() -> None:
    tokens = {new_token("a", ["score"])[0] for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 3 + 43  # 256 bits in base64
    token, text = new_token("", ["operate", "admin"])
    [parsed] = parse_tokens(text, "it")
    assert (parsed.tenant, parsed.roles, parsed.sha256) == ("", {"operate", "admin"}, hash_of(token))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tenant", "a/b"], "tenant is 'a/b'"),
        (["--tenant", "a", "--roles", "score,boss"], "has 'boss'"),
        (["--tenant", "a", "--days", "0"], "days is 0"),
    ],
)
def test_mistakes_of_the_command_are_sentences(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", *flags]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


# ---- Open services --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_on_loopback_a_service_may_be_open_and_says_so(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(host, Authenticator(), insecure=False)
    assert [r.getMessage() for r in caplog.records] == [f"no tokens: whoever can reach {host} may do everything"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "trainer.example", ""])
def test_elsewhere_it_refuses_to_be_open_unless_told(host: str, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidArgument, match=r"Give --tokens FILE .* or --insecure"):
        check_exposure(host, Authenticator(), insecure=False)
    check_exposure(host, Authenticator(file), insecure=False)
    assert not caplog.records
    check_exposure(host, Authenticator(), insecure=True)
    assert len(caplog.records) == 1


# ---- The log --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "line\nbreak", "\x1b[31m", "é"])
def test_an_id_that_could_forge_a_log_line_is_replaced(given: str | None) -> None:
    chosen = begin_request(given)
    assert chosen != given
    assert len(chosen) == 32


def record(**fields: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "said %s", "args": ("é\n",), **fields})


def test_a_line_names_the_call_that_it_belongs_to() -> None:
    assert begin_request("run-7/step:3") == "run-7/step:3"
    assert TextFormatter().format(record(args=("it",))).endswith("INFO n: said it [run-7/step:3]")
    try:
        raise ValueError("why")
    except ValueError as exc:
        line = JsonFormatter().format(record(exc_info=(type(exc), exc, exc.__traceback__)))
    assert "\n" not in line
    values = json.loads(line)
    assert datetime.fromisoformat(values.pop("time")).tzinfo is not None
    assert values.pop("exception").endswith("ValueError: why")
    assert values == {"level": "INFO", "logger": "n", "message": "said é\n", "request_id": "run-7/step:3"}
