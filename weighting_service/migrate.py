"""`python -m weighting_service migrate`: copies an update log from SQLite to Redis, or the other way.

Must not know how either keeps it: reads by one `UpdateLog`, writes by another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from weighting_contract.errors import AlreadyExists, Internal, InvalidArgument, WeighbridgeError
from weighting_service.domain import WeighterRecord
from weighting_service.update_log import (
    LogEntry,
    RedisUpdateLog,
    SqliteUpdateLog,
    UpdateLog,
    WeighterCopy,
)
from weighting_service.update_log.encoding import digest_of, next_chain

Item = TypeVar("Item")

READ_LIMIT = 100  # entries at a time

_HELP = """Copies weighters, jobs, target profiles, update ids, entries and published checksums of an update log, with
their positions, into another one, and reads them back. Stop the services of both logs first.

All or nothing for each weighter: one is in the target when all of it is. After an interruption, run the same command
again: weighters that are there already, whole and equal, are passed over. A target that has any of them otherwise, or
their names, is refused before anything is copied. The source keeps what it has (a SQLite file of an older version is
brought to this version's schema).

Snapshots and uploaded references are not in the log: copy the folders snapshots and references
into the place that --snapshots will name."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 when all is in the target, 1 for what stands in the way, which is said on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m weighting_service migrate",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    log = "a state directory, its log.sqlite, or redis://HOST:PORT/DB"
    parser.add_argument("--from", dest="source", required=True, metavar="LOG", help=log)
    parser.add_argument("--to", dest="target", required=True, metavar="LOG", help=log)
    parser.add_argument(
        "--durability",
        choices=("strict", "relaxed"),
        default="strict",
        help="strict (default) refuses a Redis that may lose updates; relaxed warns",
    )
    given = parser.parse_args(arguments)
    try:
        with (
            _open(given.source, given.durability, must_exist=True) as source,
            _open(given.target, given.durability, must_exist=False) as target,
        ):
            migrate(source, target, lambda line: print(line, flush=True))
    except WeighbridgeError as exc:
        print(f"weighting_service migrate: {exc.message}", file=sys.stderr)
        return 1
    print("done: now copy its folders snapshots and references into the place that --snapshots will name")
    return 0


def migrate(source: UpdateLog, target: UpdateLog, say: Callable[[str], None]) -> None:
    """Copies every weighter of `source` that `target` has not, and compares them.

    Raises:
        AlreadyExists: the target has one of them otherwise, or under its name another; nothing is copied.
        Internal: what was copied reads back otherwise.
    """
    records = source.weighters()
    missing = [record for record in records if not _is_there(record, source, target)]
    say(f"{len(records)} weighters, of which {len(records) - len(missing)} are there already")
    for record in missing:
        copy = source.export(record.uid)
        progress = _Progress(record.name, copy.head - copy.trimmed + copy.head, say)
        target.import_(copy, progress.over(_entries(source, copy)), progress.over(source.taken(record.uid)))
        _compare(record.name, copy, source, target)
        say(f"weighter {record.name!r}: {copy.head} updates, {len(copy.jobs)} jobs: copied and compared")


def _open(where: str, durability: str, must_exist: bool) -> UpdateLog:
    if "://" in where:
        return RedisUpdateLog(where, "relaxed" if durability == "relaxed" else "strict")
    path = Path(where)
    if path.is_dir() or path.suffix != ".sqlite":
        path /= "log.sqlite"
    if must_exist and not path.is_file():
        raise InvalidArgument(f"--from is {where!r}, but there is no update log {path}; expected a state directory")
    return SqliteUpdateLog(path)


def _is_there(record: WeighterRecord, source: UpdateLog, target: UpdateLog) -> bool:
    """Raises AlreadyExists where the target has another weighter of that name, or this one otherwise."""
    for other in target.weighters():
        if other.uid == record.uid:
            if target.export(other.uid) == source.export(record.uid):
                return True
            raise AlreadyExists(
                f"the target has weighter {record.name!r} already, with another history or other jobs than the source; "
                "choose an empty target, or delete the weighter there"
            )
        if other.name == record.name:
            raise AlreadyExists(
                f"the target has another weighter of the name {record.name!r}; choose an empty target, or delete that "
                "weighter"
            )
    return False


def _entries(log: UpdateLog, copy: WeighterCopy) -> Iterator[LogEntry]:
    after, chain = copy.trimmed, copy.trimmed_chain
    while after < copy.head:
        page = log.read(copy.record.uid, after, min(READ_LIMIT, copy.head - after), chain)
        yield from page
        after, chain = page[-1].position, page[-1].chain


def _compare(name: str, copy: WeighterCopy, source: UpdateLog, target: UpdateLog) -> None:
    """Reads the copy back: its records, and the content of every entry by the chain."""
    uid, chain = copy.record.uid, copy.trimmed_chain
    for entry in _entries(target, copy):
        if entry.chain and entry.chain != next_chain(chain, digest_of(entry.content)):
            raise Internal(f"entry {entry.position} of weighter {name!r} reads back otherwise; delete it in the target")
        chain = entry.chain
    if target.export(uid) != copy:
        raise Internal(f"weighter {name!r} reads back otherwise; delete it in the target and try again")
    if source.export(uid) != copy:
        raise Internal(
            f"weighter {name!r} has changed in the source meanwhile; stop the services that use it, delete it in the "
            "target and try again"
        )


class _Progress:
    """Says every tenth of what is done."""

    def __init__(self, name: str, total: int, say: Callable[[str], None]) -> None:
        self._name, self._total, self._say = name, total, say
        self._done = self._said = 0

    def over(self, items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            self._done += 1
            tenths = min(self._done * 10 // max(self._total, 1), 10)
            if tenths > self._said:
                self._said = tenths
                self._say(f"weighter {self._name!r}: {tenths * 10} %")
