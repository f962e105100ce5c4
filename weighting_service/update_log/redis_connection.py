"""The way to the Redis under an update log: its address, its timeouts, its errors as sentences of ours.

Must not know what is kept there.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from weighting_contract.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)

PREFIX = "weighbridge:"  # of all keys, unless the URL says otherwise
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 2.0, 5.0
FULL_RETRY_AFTER_S = 30.0

# ARGV: for each command the number of its words, and they.
TOGETHER = """
local answers, at = {}, 1
while at <= #ARGV do
    local command = {}
    for i = 1, tonumber(ARGV[at]) do command[i] = ARGV[at + i] end
    answers[#answers + 1] = redis.call(unpack(command))
    at = at + #command + 1
end
return answers
"""


class RedisConnection:
    """Calls to one Redis, from any thread, each over a connection of its own.

    Nothing is tried again here: only the caller knows what may be.

    Args:
        url: redis://[USER:PASSWORD@]HOST:PORT/DB, rediss:// for TLS, unix:///SOCKET; `?prefix=...` in place of
            "weighbridge:", and what else redis-py takes there.

    All methods raise:
        Unavailable: the log is closed, or Redis can't be reached, doesn't answer in time, is loading or read-only.
        ResourceExhausted: it is full.
        FailedPrecondition: it refuses the credentials, or keeps other things under the log's keys.
    """

    def __init__(self, url: str) -> None:
        address, self.prefix, self.where = _parsed(url)
        self._closed = False
        try:
            self._client = redis.Redis.from_url(
                address,
                protocol=2,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=READ_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # not connected: only to see what is wrong in the URL now
        except (ValueError, TypeError) as exc:
            raise InvalidArgument(f"the log's URL {self.where} is not one that Redis clients know: {exc}") from exc

    def call(self, *command: Any) -> Any:
        """The answer to one command."""
        with self.translated():
            return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def script(self, source: str, keys: Sequence[str], *arguments: Any) -> Any:
        """The answer of a Lua script, which runs as a whole or not at all.

        It is sent whole each time: a kilobyte beside payloads of many, and no Redis can have forgotten it.
        """
        return self.call("EVAL", source, len(keys), *keys, *arguments)

    def together(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The answers to commands that run with nothing in between, as they are: hashes are flat lists.

        A script, for Redis takes no MULTI when its memory is full, not even of commands that only read.
        """
        answers: list[Any] = self.script(
            TOGETHER, [], *(part for command in commands for part in (len(command), *command))
        )
        return answers

    def in_a_row(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands that go in one message, others' perhaps in between."""
        with self.translated(), self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute())

    def close(self) -> None:
        self._closed = True
        self._client.close()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Redis's errors as ours; the only place that knows them."""
        if self._closed:
            raise Unavailable(f"the update log at {self.where} is closed")
        try:
            yield
        except RedisError as exc:
            raise _storage_error(self.where, exc) from exc
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                raise _full(self.where, exc) from exc
            raise _unreachable(self.where, exc) from exc


def hash_of(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A hash, or the fields of an entry, as a script answers it."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _parsed(url: str) -> tuple[str, str, str]:
    """(what redis-py takes, prefix of the keys, what may be shown to people) of a URL."""
    parts = urlsplit(url)
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:  # what is shown would be a secret
        raise InvalidArgument(
            "the log's URL has an @ behind a slash, ? or #; write those of user and password as %2F, %3F and %23, and "
            "an @ as %40"
        )
    where = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise InvalidArgument(
            f"the log's URL is {where!r}, expected redis://HOST:PORT/DB, rediss://... or unix:///SOCKET"
        )
    if parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):
        raise InvalidArgument(
            f"the log's URL {where} ends in {parts.path!r}, expected the number of a database, as in /0"
        )
    query = parse_qs(parts.query, keep_blank_values=True)
    prefix = query.pop("prefix", [PREFIX])[-1]
    if not re.fullmatch(r"[\w.:/-]+", prefix):  # braces would move the hash tag
        raise InvalidArgument(f"the log's URL has the prefix {prefix!r}, expected letters, digits and _ . : / -")
    return urlunsplit(parts._replace(query=urlencode(query, doseq=True))), prefix, where


def _storage_error(where: str, exc: RedisError) -> WeighbridgeError:
    text = str(exc)  # errors inside a script come as text alone
    if isinstance(exc, AuthenticationError | AuthorizationError | NoPermissionError) or "NOPERM" in text:
        return FailedPrecondition(
            f"Redis at {where} refuses the service ({exc}); check user and password in the log's URL, and that the "
            "user may read, write and run scripts under the log's prefix"
        )
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return _full(where, exc)
    if "MISCONF" in text:  # it could not write its files, and takes no writes until it can
        return _full(where, exc)
    if isinstance(exc, BusyLoadingError) or "LOADING" in text:
        return Unavailable(f"Redis at {where} is still loading its data ({exc}): try again")
    if isinstance(exc, ConnectionError | TimeoutError):
        return _unreachable(where, exc)
    if "WRONGTYPE" in text or "equal or smaller than the target stream top item" in text:
        return FailedPrecondition(
            f"Redis at {where} keeps something under the log's keys that is not an update log of this service ({exc}); "
            "it was left as it is: choose another prefix (?prefix=...), or restore Redis from a copy"
        )
    if isinstance(exc, ResponseError):
        return Unavailable(f"Redis at {where} refused ({exc}); nothing was recorded: try again")
    return _unreachable(where, exc)


def _unreachable(where: str, exc: Exception) -> Unavailable:
    return Unavailable(
        f"Redis at {where} did not answer ({exc}); whether something was recorded is not known: try again, nothing is "
        "recorded twice"
    )


def _full(where: str, exc: Exception) -> ResourceExhausted:
    return ResourceExhausted(
        f"Redis at {where} has no room left, in its memory or on its disk ({exc}); nothing was recorded: give it more, "
        "or let it trim, and try again",
        retry_after_s=FULL_RETRY_AFTER_S,
    )
