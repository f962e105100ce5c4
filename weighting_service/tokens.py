"""The tokens file and the command that makes its entries. Knows no transport; `auth` decides by what is read here.

[[token]]
id = "prose-ci"               # for logs and error messages
sha256 = "9f86d0..."          # of the token, in hex; the token itself is kept nowhere
tenant = "prose"              # "" is the default tenant, which owns what was made without tokens
roles = ["score", "teach"]
expires = 2027-01-01T00:00:00Z  # RFC 3339; left out: never
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import secrets
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import check_name

ROLES = ("score", "teach", "admin", "operate")
DEFAULT_ROLES = ("score", "teach")

_PREFIX = "wb_"  # lets scanners of secrets find tokens that were committed by mistake
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("id", "sha256", "tenant", "roles", "expires")


@dataclass(frozen=True)
class Token:
    """One entry of a tokens file."""

    id: str
    sha256: str  # hex
    tenant: str
    roles: frozenset[str]
    expires: datetime | None = None  # with a time zone; None: never


def hash_of(token: str) -> str:
    """SHA-256 in hex. A token is 256 random bits, so it needs no salt and no slow hash."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse_tokens(text: str, source: str) -> list[Token]:
    """The entries of a tokens file.

    Raises:
        InvalidArgument: naming `source`, the entry, and what is wrong with it; also where there is no entry at all.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidArgument(f"{source} is not TOML: {exc}") from exc
    if unknown := sorted(set(values) - {"token"}):
        raise InvalidArgument(f"{source} has {unknown[0]!r}, expected [[token]] entries and nothing else")
    entries = values.get("token", [])
    if not isinstance(entries, list) or not entries:
        raise InvalidArgument(
            f"{source} holds no [[token]] entry, so nobody could call; `python -m weighting_service token` makes one"
        )
    tokens = [_token(entry, f"{source}: token[{i}]") for i, entry in enumerate(entries)]
    check_distinct(tokens, source)
    return tokens


def check_distinct(tokens: Sequence[Token], source: str) -> None:
    """Raises InvalidArgument where two entries have one id, or are of one token."""
    for name in ("id", "sha256"):
        seen: set[str] = set()
        for token in tokens:
            value = getattr(token, name)
            if value in seen:
                raise InvalidArgument(f"{source} has the {name} {value!r} twice; each entry is of one token")
            seen.add(value)


def _token(entry: Any, where: str) -> Token:
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{where} is {entry!r}, expected a table: [[token]]")
    if unknown := sorted(set(entry) - set(_FIELDS)):
        raise InvalidArgument(f"{where} has {unknown[0]!r}, expected some of {', '.join(_FIELDS)}")
    for name in ("id", "sha256", "tenant"):
        if not isinstance(entry.get(name), str):
            raise InvalidArgument(f"{where}.{name} is {entry.get(name)!r}, expected a string")
    if entry["tenant"]:
        check_name(entry["tenant"], f"{where}.tenant")
    check_name(entry["id"], f"{where}.id")
    if not _SHA256.fullmatch(entry["sha256"]):
        raise InvalidArgument(f"{where}.sha256 is no SHA-256 of 64 lower-case hex digits (and must not be the token)")
    return Token(
        entry["id"],
        entry["sha256"],
        entry["tenant"],
        _roles(entry.get("roles"), f"{where}.roles"),
        _expires(entry.get("expires"), f"{where}.expires"),
    )


def _roles(value: Any, where: str) -> frozenset[str]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument(f"{where} is {value!r}, expected a list of some of {', '.join(ROLES)}")
    for role in value:
        if role not in ROLES:
            raise InvalidArgument(f"{where} has {role!r}, expected some of {', '.join(ROLES)}")
    return frozenset(value)


def _expires(value: Any, where: str) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidArgument(f"{where} is {str(value)!r}, expected a time with its zone, such as 2027-01-01T00:00:00Z")
    return value


# ---- The command ----------------------------------------------------------------------------------------------------


def new_token(tenant: str, roles: Sequence[str], days: int | None = None, token_id: str = "") -> tuple[str, str]:
    """A token of 256 random bits, and its entry for the tokens file. Raises InvalidArgument."""
    token = _PREFIX + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {
        "id": token_id or f"{tenant or 'default'}-{secrets.token_hex(4)}",
        "sha256": hash_of(token),
        "tenant": tenant,
        "roles": list(roles),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in entry.items()]  # such JSON is TOML too
    if days is not None:
        if not 1 <= days <= 36_500:
            raise InvalidArgument(f"days is {days}, expected from 1 to 36500")
        lines.append(f"expires = {datetime.now(UTC) + timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}")
    text = "\n".join(["[[token]]", *lines]) + "\n"
    parse_tokens(text, "the new token")
    return token, text


def main(arguments: Sequence[str]) -> int:
    """`token --tenant T`: the entry goes to stdout, so that it can be appended to a file; the token to stderr, once.

    Raises InvalidArgument.
    """
    parser = argparse.ArgumentParser(
        prog="python -m weighting_service token",
        description="Makes a token, shown once, and its entry of a tokens file.",
    )
    parser.add_argument("--tenant", required=True, help='who it speaks for; "": the default tenant')
    parser.add_argument("--roles", default=",".join(DEFAULT_ROLES), help=f"some of {','.join(ROLES)} (%(default)s)")
    parser.add_argument("--days", type=int, help="days until it expires (never)")
    parser.add_argument("--id", default="", help="its name in logs and messages (made of the tenant's)")
    given = parser.parse_args(arguments)
    roles = [role.strip() for role in given.roles.split(",")]
    token, entry = new_token(given.tenant, roles, given.days, given.id)
    print(f"the token, shown only now; only its hash goes into the tokens file:\n{token}", file=sys.stderr)
    print(entry, end="")
    return 0
