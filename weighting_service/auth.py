"""Who calls, and with which roles: bearer tokens against the tokens file. Knows no transport and no use case."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weighting_contract.errors import InvalidArgument, PermissionDenied, Unauthenticated
from weighting_contract.local import file_version, is_loopback
from weighting_service.tokens import ROLES, Token, check_distinct, hash_of, parse_tokens

log = logging.getLogger(__name__)

TOKENS_VARIABLE = "WEIGHBRIDGE_TOKENS_TOML"


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    tenant: str  # "": the default tenant
    roles: frozenset[str]
    token_id: str = ""  # "": there are no tokens

    def require(self, role: str, what: str) -> None:
        """Raises PermissionDenied, which names the role, where the caller lacks it."""
        if role not in self.roles:
            raise PermissionDenied(
                f"{what} needs the role {role!r}, and the token {self.token_id!r} has {', '.join(sorted(self.roles))}; "
                "ask the service's operator for a token with that role"
            )


ANYONE = Caller("", frozenset(ROLES))  # of a service without tokens


class Authenticator:
    """Knows tokens by their hashes, and finds out who sent one.

    Args:
        path: the tokens file, looked at again whenever it has changed; a new version with mistakes is reported in the
            log, and the old one stays in force.
        inline: more entries of the same form.
        now: Unix time, seconds.

    Raises:
        InvalidArgument: the file can't be read, or has mistakes.
    """

    def __init__(self, path: Path | None = None, inline: str = "", now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._inline = parse_tokens(inline, TOKENS_VARIABLE) if inline.strip() else []
        self._version: tuple[int, ...] = ()
        self._tokens = self._inline
        if path is not None:
            self._version = file_version(path)
            self._tokens = self._read(path)

    @property
    def enabled(self) -> bool:
        """Whether callers need a token."""
        return bool(self._tokens)

    def caller(self, authorization: str | None) -> Caller:
        """Whose the header `authorization: Bearer TOKEN` is.

        Raises:
            Unauthenticated: there is none, or its token is unknown or expired.
        """
        self._refresh()
        if not self._tokens:
            return ANYONE
        if not authorization:
            raise Unauthenticated('a token is missing: send the header "authorization: Bearer TOKEN"')
        scheme, _, given = authorization.partition(" ")
        token = self._find(given.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            raise Unauthenticated(
                'the token is not valid here; expected "authorization: Bearer TOKEN" with one of this service\'s tokens'
            )
        if token.expires is not None and token.expires.timestamp() <= self._now():
            raise Unauthenticated(f"the token {token.id!r} expired at {token.expires.isoformat()}; ask for a new one")
        return Caller(token.tenant, token.roles, token.id)

    def _find(self, given: str) -> Token | None:
        """Compares with every entry, each in constant time: how long it takes says nothing about them."""
        digest, found = hash_of(given), None
        for token in self._tokens:
            if hmac.compare_digest(digest, token.sha256):
                found = token
        return found

    def _refresh(self) -> None:
        if self._path is None or (version := file_version(self._path)) == self._version:
            return
        self._version = version
        try:
            self._tokens = self._read(self._path)
            log.info("the tokens file %s has changed: %d tokens", self._path, len(self._tokens))
        except InvalidArgument as exc:
            log.error("%s; the tokens read before stay in force", exc.message)

    def _read(self, path: Path) -> list[Token]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise InvalidArgument(f"the tokens file {path} can't be read: {reason}") from exc
        tokens = parse_tokens(text, f"the tokens file {path}") + self._inline
        check_distinct(tokens, f"the tokens file {path} with {TOKENS_VARIABLE}")
        return tokens


def check_exposure(host: str, auth: Authenticator, insecure: bool) -> None:
    """That a service without tokens is for this machine only, or meant not to be; the log says where it is open.

    Raises:
        InvalidArgument: it would be open to whoever reaches `host`, and nobody said that this is meant.
    """
    if auth.enabled:
        return
    if not insecure and not is_loopback(host):
        raise InvalidArgument(
            f"host is {host!r}, which others can reach, and there are no tokens: anybody could use and delete "
            "everything. Give --tokens FILE (`python -m weighting_service token` makes its entries), or --insecure "
            "where the network is trusted"
        )
    log.warning("no tokens: whoever can reach %s may do everything", host)
