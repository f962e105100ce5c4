"""An update log in one SQLite file: embedded, for one service process at a time.

Must not know the model, nor the file's schema version and lock (sqlite_file.py) and its rows (sqlite_rows.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from weighting_contract.errors import Internal, InvalidArgument, Unavailable
from weighting_service import failpoints
from weighting_service.domain import Entry, JobRecord, MetaUpdate, Rollback, WeighterRecord
from weighting_service.update_log import refusals, sqlite_copies
from weighting_service.update_log import sqlite_rows as rows
from weighting_service.update_log.base import Appended, Heads, LogEntry, UpdateLog
from weighting_service.update_log.copies import TakenUpdate, WeighterCopy
from weighting_service.update_log.encoding import (
    decode_entry,
    digest_of,
    encode_entry,
    kind_of,
    next_chain,
    profile_array,
    profile_bytes,
)
from weighting_service.update_log.sqlite_file import lock, open_file, translated, unlock

TRIM_PORTION = 32  # entries a transaction


class SqliteUpdateLog(UpdateLog):
    """The log in the file `path`, made (with its folder) where there is none.

    Beside it: `path`-wal and `path`-shm, which belong to it, and `path`.lock, held as long as the log is open.

    A file of an older schema is brought to this version's; an older service can't open it any more. Entries of schema
    versions 1 and 2 have no chain.

    Raises:
        FailedPrecondition: the file is damaged, is something else, comes from a newer version, or is in use by
            another process. It is left as it was.
        Unavailable: the file can't be opened or written.
    """

    shared = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).resolve()  # one lock file, whichever link leads here
        self._mutex = threading.Lock()
        with translated(self._path), contextlib.ExitStack() as undo:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._path)
            undo.callback(unlock, self._lock)
            self._db: sqlite3.Connection | None = open_file(self._path)
            undo.pop_all()

    def create_weighter(self, record: WeighterRecord) -> None:
        with self._changing_records() as db:
            rows.insert_weighter(db, record)

    def weighters(self) -> list[WeighterRecord]:
        with self._reading() as db:
            return rows.weighter_records(db)

    def put_weighter(self, record: WeighterRecord) -> None:
        with self._changing_records() as db:
            weighter = rows.weighter_row(db, record.uid)
            db.execute(
                "UPDATE weighters SET shared_with = ? WHERE id = ?", (json.dumps(record.shared_with), weighter.id)
            )

    def delete_weighter(self, uid: str) -> None:
        with self._changing_records() as db:
            db.execute("DELETE FROM weighters WHERE id = ?", (rows.weighter_row(db, uid).id,))

    def put_job(self, job: JobRecord, profile: np.ndarray | None = None) -> None:
        table = None if profile is None else profile_bytes(profile)
        with self._changing_records() as db:
            weighter = rows.weighter_row(db, job.weighter_uid)
            rows.put_job_row(db, weighter.id, job)
            if table is not None:
                rows.put_profile_row(db, rows.job_row(db, weighter.id, job.job_id), table)

    def profile(self, job_id: str) -> np.ndarray | None:
        with self._reading() as db:
            row = db.execute(
                "SELECT profiles.crc32, log_ratios FROM profiles JOIN jobs ON jobs.id = profiles.job WHERE job_id = ?",
                (job_id,),
            ).fetchone()
        if row is None:
            return None
        if zlib.crc32(row[1]) != row[0]:
            raise Internal(
                f"the target profile of job {job_id!r} in {self._path} is damaged: its checksum does not match; open "
                "the job again with its profile, or restore the file from a copy"
            )
        return profile_array(row[1])

    def job(self, job_id: str) -> JobRecord | None:
        with self._reading() as db:
            records = rows.job_records(db, "jobs.job_id", job_id)
        return records[0] if records else None

    def jobs(self, weighter_uid: str) -> list[JobRecord]:
        with self._reading() as db:
            rows.weighter_row(db, weighter_uid)
            return rows.job_records(db, "weighters.uid", weighter_uid)

    def open_jobs(self, weighter_uid: str) -> list[JobRecord]:
        with self._reading() as db:
            rows.weighter_row(db, weighter_uid)
            return rows.job_records(db, "weighters.uid", weighter_uid, open_only=True)

    def touch_jobs(self, seen: Mapping[str, int]) -> None:
        with self._transaction() as db:
            db.executemany(
                "UPDATE jobs SET seen_unix_ms = max(seen_unix_ms, ?) WHERE job_id = ?",
                [(unix_ms, job_id) for job_id, unix_ms in seen.items()],
            )

    def jobs_seen(self, job_ids: Iterable[str]) -> dict[str, int]:
        with self._reading() as db:
            found = db.execute(
                "SELECT job_id, seen_unix_ms FROM jobs WHERE seen_unix_ms > 0 "
                "AND job_id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(job_ids)),),
            ).fetchall()
        return dict(found)

    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        payload, digest = encode_entry(update), update.digest()
        self._failpoint("before_append")
        with self._transaction() as db:
            weighter = rows.weighter_row(db, weighter_uid)
            job = rows.job_row(db, weighter.id, update.job_id)
            taken = rows.taken_position(db, job, update, digest)
            if taken is not None:
                return Appended(taken, duplicate=True)
            position = _add(db, weighter, weighter_uid, update, digest, payload)
            db.execute("INSERT INTO update_ids VALUES (?, ?, ?, ?)", (job, update.update_id, position, digest))
            db.execute(
                "UPDATE jobs SET last_step = ?, last_position = ? WHERE id = ? AND last_step <= ?",
                (update.step, position, job, update.step),
            )
        self._failpoint("after_append")
        return Appended(position, duplicate=False)

    def append_rollback(self, weighter_uid: str, rollback: Rollback, expected_head: int | None) -> int:
        payload, digest = encode_entry(rollback), digest_of(rollback)
        self._failpoint("before_append")
        with self._transaction() as db:
            weighter = rows.weighter_row(db, weighter_uid)
            if expected_head is not None and expected_head != weighter.head:
                raise refusals.unexpected_head(weighter.name, weighter.head, expected_head)
            position = _add(db, weighter, weighter_uid, rollback, digest, payload)
        self._failpoint("after_append")
        return position

    def find(self, weighter_uid: str, update: MetaUpdate) -> int | None:
        digest = update.digest()
        with self._reading() as db:
            weighter = rows.weighter_row(db, weighter_uid)
            return rows.taken_position(db, rows.job_row(db, weighter.id, update.job_id), update, digest)

    def head(self, weighter_uid: str) -> int:
        with self._reading() as db:
            return rows.weighter_row(db, weighter_uid).head

    def heads(self) -> Heads:
        with self._reading() as db:
            version = int(db.execute("SELECT version FROM records").fetchone()[0])
            return Heads(version, dict(db.execute("SELECT uid, head FROM weighters").fetchall()))

    def read(self, weighter_uid: str, after: int, limit: int, chain: str = "") -> list[LogEntry]:
        refusals.check_range(after, limit)
        with self._reading() as db:
            weighter = rows.weighter_row(db, weighter_uid)
            if after > weighter.head:
                raise refusals.other_history(weighter.name, after, weighter.head)
            if after < weighter.trimmed:
                raise refusals.entries_trimmed(weighter.name, after, weighter.trimmed)
            known = rows.chain_at(db, weighter, after) if chain else ""
            found, cut = rows.entry_rows(db, weighter.id, after, limit, self.read_bytes)
        if known and known != chain:
            raise refusals.other_history(weighter.name, after, weighter.head)
        last = found[-1][0] if cut else min(after + limit, weighter.head)
        expected = range(after + 1, last + 1)
        missing = set(expected) - {position for position, *_ in found}
        if missing:
            raise refusals.entry_missing(weighter.name, weighter_uid, min(missing), str(self._path))
        return [self._entry(weighter_uid, weighter.name, *row) for row in found]

    def last_taught(self, job_id: str) -> tuple[int, int]:
        with self._reading() as db:
            row = db.execute("SELECT last_step, last_position FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return (int(row[0]), int(row[1])) if row else (-1, 0)

    def vouch(self, weighter_uid: str, position: int, environment: str, checksum: str) -> str:
        with self._transaction() as db:
            key = (rows.weighter_row(db, weighter_uid).id, position, environment)
            db.execute("INSERT OR IGNORE INTO vouched VALUES (?, ?, ?, ?)", (*key, checksum))
            holds = db.execute(
                "SELECT checksum FROM vouched WHERE weighter = ? AND position = ? AND environment = ?", key
            ).fetchone()
        return str(holds[0])

    def trimmed(self, weighter_uid: str) -> int:
        with self._reading() as db:
            return rows.weighter_row(db, weighter_uid).trimmed

    def trim(self, weighter_uid: str, up_to: int) -> None:
        while self._trim_portion(weighter_uid, up_to):  # in portions, so that appends get their turn in between
            self._failpoint("during_trim")

    def export(self, weighter_uid: str) -> WeighterCopy:
        with self._reading() as db:
            jobs = rows.job_records(db, "weighters.uid", weighter_uid)
        profiles = {job.job_id: self.profile(job.job_id) for job in jobs}
        with self._reading() as db:
            return sqlite_copies.weighter_copy(db, weighter_uid, profiles)

    def taken(self, weighter_uid: str) -> Iterator[TakenUpdate]:
        after: tuple[int, str] | None = (0, "")
        while after is not None:
            with self._reading() as db:
                page, after = sqlite_copies.taken_after(db, rows.weighter_row(db, weighter_uid).id, after)
            yield from page

    def import_(self, copy: WeighterCopy, entries: Iterable[LogEntry], taken: Iterable[TakenUpdate]) -> None:
        with self._changing_records() as db:
            sqlite_copies.insert_copy(db, copy, entries, taken)

    def size_bytes(self) -> int:
        """Without the pages that are free: the file does not shrink, and they are used again before it grows."""
        with self._reading() as db:
            asked = ("page_count", "freelist_count", "page_size")
            pages, free, page = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in asked)
        return (pages - free) * page

    def close(self) -> None:
        with self._mutex, translated(self._path):
            if self._db is None:
                return
            db, self._db = self._db, None
            try:
                db.close()
            finally:
                unlock(self._lock)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, translated(self._path):
            if self._db is None:
                raise Unavailable(f"the update log {self._path} is closed")
            yield self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk when it ends."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:  # something failed, perhaps the commit itself
                    db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _changing_records(self) -> Iterator[sqlite3.Connection]:
        """A transaction after which `heads` tells another version."""
        with self._transaction() as db:
            yield db
            db.execute("UPDATE records SET version = version + 1")

    def _failpoint(self, name: str) -> None:
        with translated(self._path):
            failpoints.hit(name)

    def _trim_portion(self, weighter_uid: str, up_to: int) -> bool:
        """Whether there is more to trim."""
        with self._transaction() as db:
            weighter = rows.weighter_row(db, weighter_uid)
            end = min(up_to, weighter.head)
            portion = min(end, weighter.trimmed + TRIM_PORTION)
            if portion <= weighter.trimmed:
                return False
            chain = rows.chain_at(db, weighter, portion)
            db.execute("DELETE FROM entries WHERE weighter = ? AND position <= ?", (weighter.id, portion))
            db.execute(
                "UPDATE weighters SET trimmed = ?, trimmed_chain = ? WHERE id = ?", (portion, chain, weighter.id)
            )
            return portion < end

    def _entry(self, uid: str, name: str, position: int, crc: int, chain: str, kind: str, payload: bytes) -> LogEntry:
        where = f"entry {position} of weighter {name!r} ({uid}) in {self._path}"
        if rows.entry_checksum(uid, position, chain, kind, payload) != crc:
            raise Internal(
                f"{where} is damaged: its checksum does not match; restore the file from a copy, or go on from a "
                f"snapshot at position {position} or later"
            )
        try:
            return LogEntry(position, decode_entry(kind, payload), chain)
        except InvalidArgument as exc:
            raise Internal(f"{where} can't be read: {exc}") from exc


def _add(
    db: sqlite3.Connection, weighter: rows.WeighterRow, uid: str, entry: Entry, digest: bytes, payload: bytes
) -> int:
    """Gives the entry the next position."""
    position, chain = weighter.head + 1, next_chain(weighter.chain, digest)
    rows.insert_entry(db, weighter.id, uid, position, chain, kind_of(entry), payload)
    db.execute("UPDATE weighters SET head = ?, chain = ? WHERE id = ?", (position, chain, weighter.id))
    return position
