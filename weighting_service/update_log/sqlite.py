"""An update log in one SQLite file: embedded, for one service process at a time.

Must not know the model, nor the file's schema version and lock (sqlite_file.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log.base import Appended, UpdateLog
from weighting_service.update_log.encoding import decode, encode
from weighting_service.update_log.sqlite_file import lock, open_file, translated, unlock

TRIM_PORTION = 32  # entries a transaction

_JOB_COLUMNS = ("role", "feature_names", "open", "reference", "reference_checksum", "documents_checksum")
_PUT_JOB = (
    f"INSERT INTO jobs (job_id, weighter, {', '.join(_JOB_COLUMNS)}) VALUES (?, ?{', ?' * len(_JOB_COLUMNS)}) "
    f"ON CONFLICT (job_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _JOB_COLUMNS)}"
)


class SqliteUpdateLog(UpdateLog):
    """The log in the file `path`, made (with its folder) where there is none.

    Beside it: `path`-wal and `path`-shm, which belong to it, and `path`.lock, held as long as the log is open.

    A file of an older schema is brought to this version's; an older service can't open it any more.

    Raises:
        FailedPrecondition: the file is damaged, is something else, comes from a newer version, or is in use by
            another process. It is left as it was.
        Unavailable: the file can't be opened or written.
    """

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
        with self._transaction() as db:
            for column, value in (("name", record.name), ("uid", record.uid)):
                if db.execute(f"SELECT 1 FROM weighters WHERE {column} = ?", (value,)).fetchone():
                    raise AlreadyExists(
                        f"a weighter of {column} {value!r} exists already; choose another {column}, or delete it first"
                    )
            db.execute(
                "INSERT INTO weighters (uid, name, spec, created_unix_ms, initial) VALUES (?, ?, ?, ?, ?)",
                (record.uid, record.name, json.dumps(record.spec.to_dict()), record.created_unix_ms, record.initial),
            )

    def weighters(self) -> list[WeighterRecord]:
        with self._reading() as db:
            rows = db.execute("SELECT name, uid, spec, created_unix_ms, initial FROM weighters ORDER BY id").fetchall()
        return [
            WeighterRecord(name, uid, WeighterSpec.from_dict(json.loads(spec)), created, initial)
            for name, uid, spec, created, initial in rows
        ]

    def delete_weighter(self, uid: str) -> None:
        with self._transaction() as db:
            if not db.execute("DELETE FROM weighters WHERE uid = ?", (uid,)).rowcount:
                raise _no_weighter(uid)

    def put_job(self, job: JobRecord, profile: np.ndarray | None = None) -> None:
        table = None if profile is None else _profile_bytes(profile)
        with self._transaction() as db:
            weighter, *_ = _weighter(db, job.weighter_uid)
            owner = db.execute("SELECT weighter FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone()
            if owner and owner[0] != weighter:
                raise AlreadyExists(f"job {job.job_id!r} belongs to another weighter; choose another job id")
            db.execute(_PUT_JOB, (job.job_id, weighter, *_job_values(job)))
            if table is not None:
                db.execute(
                    "INSERT OR REPLACE INTO profiles (job, crc32, log_ratios) VALUES (?, ?, ?)",
                    (_job(db, weighter, job.job_id), zlib.crc32(table), table),
                )

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
        return np.frombuffer(row[1], "<f2")

    def job(self, job_id: str) -> JobRecord | None:
        with self._reading() as db:
            rows = _job_records(db, "jobs.job_id", job_id)
        return rows[0] if rows else None

    def jobs(self, weighter_uid: str) -> list[JobRecord]:
        with self._reading() as db:
            _weighter(db, weighter_uid)
            return _job_records(db, "weighters.uid", weighter_uid)

    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        payload, digest = encode(update), update.digest()
        with self._transaction() as db:
            weighter, _, head, _ = _weighter(db, weighter_uid)
            job = _job(db, weighter, update.job_id)
            taken = _taken(db, job, update, digest)
            if taken is not None:
                return Appended(taken, duplicate=True)
            position = head + 1
            db.execute("INSERT INTO update_ids VALUES (?, ?, ?, ?)", (job, update.update_id, position, digest))
            db.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?)",
                (weighter, position, _checksum(weighter_uid, position, payload), payload),
            )
            db.execute("UPDATE weighters SET head = ? WHERE id = ?", (position, weighter))
            db.execute(
                "UPDATE jobs SET last_step = ?, last_position = ? WHERE id = ? AND last_step <= ?",
                (update.step, position, job, update.step),
            )
        return Appended(position, duplicate=False)

    def find(self, weighter_uid: str, update: MetaUpdate) -> int | None:
        digest = update.digest()
        with self._reading() as db:
            weighter, *_ = _weighter(db, weighter_uid)
            return _taken(db, _job(db, weighter, update.job_id), update, digest)

    def head(self, weighter_uid: str) -> int:
        with self._reading() as db:
            return _weighter(db, weighter_uid)[2]

    def read(self, weighter_uid: str, after: int, limit: int) -> list[tuple[int, MetaUpdate]]:
        if after < 0 or limit < 1:
            raise InvalidArgument(f"read needs after >= 0 and limit >= 1, got after {after} and limit {limit}")
        with self._reading() as db:
            weighter, name, head, trimmed = _weighter(db, weighter_uid)
            rows = db.execute(
                "SELECT position, crc32, payload FROM entries WHERE weighter = ? AND position > ? "
                "ORDER BY position LIMIT ?",
                (weighter, after, limit),
            ).fetchall()
        if after > head:
            raise FailedPrecondition(
                f"the log of weighter {name!r} ends at position {head}, but entries after {after} were asked for: "
                "that state comes from another history (an older copy of the log was put back?)"
            )
        if after < trimmed:
            raise FailedPrecondition(
                f"entries 1 to {trimmed} of weighter {name!r} are trimmed, but those after {after} were asked for; "
                f"start from a snapshot at position {trimmed} or later"
            )
        expected = range(after + 1, min(after + limit, head) + 1)
        missing = set(expected) - {position for position, _, _ in rows}
        if missing:
            raise Internal(f"entry {min(missing)} of weighter {name!r} ({weighter_uid}) is missing from {self._path}")
        return [(position, self._decoded(weighter_uid, name, position, crc, data)) for position, crc, data in rows]

    def last_taught(self, job_id: str) -> tuple[int, int]:
        with self._reading() as db:
            row = db.execute("SELECT last_step, last_position FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return (int(row[0]), int(row[1])) if row else (-1, 0)

    def trim(self, weighter_uid: str, up_to: int) -> None:
        done = False
        while not done:  # in portions, so that appends get their turn in between
            with self._transaction() as db:
                weighter, _, head, trimmed = _weighter(db, weighter_uid)
                portion = min(up_to, head, trimmed + TRIM_PORTION)
                if portion > trimmed:
                    db.execute("DELETE FROM entries WHERE weighter = ? AND position <= ?", (weighter, portion))
                    db.execute("UPDATE weighters SET trimmed = ? WHERE id = ?", (portion, weighter))
                done = portion >= min(up_to, head)

    def size_bytes(self) -> int:
        with self._reading():
            files = (self._path, self._path.with_name(self._path.name + "-wal"))
            return sum(file.stat().st_size for file in files if file.exists())

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

    def _decoded(self, uid: str, name: str, position: int, crc: int, payload: bytes) -> MetaUpdate:
        where = f"entry {position} of weighter {name!r} ({uid}) in {self._path}"
        if _checksum(uid, position, payload) != crc:
            raise Internal(
                f"{where} is damaged: its checksum does not match; restore the file from a copy, or go on from a "
                f"snapshot at position {position} or later"
            )
        try:
            return decode(payload)
        except InvalidArgument as exc:
            raise Internal(f"{where} can't be read: {exc}") from exc


def _weighter(db: sqlite3.Connection, uid: str) -> tuple[int, str, int, int]:
    """(id, name, head, trimmed) of a weighter."""
    row = db.execute("SELECT id, name, head, trimmed FROM weighters WHERE uid = ?", (uid,)).fetchone()
    if row is None:
        raise _no_weighter(uid)
    return int(row[0]), str(row[1]), int(row[2]), int(row[3])


def _no_weighter(uid: str) -> NotFound:
    return NotFound(f"the update log has no weighter of uid {uid!r}; it was never created, or it was deleted")


def _job(db: sqlite3.Connection, weighter: int, job_id: str) -> int:
    row = db.execute("SELECT id FROM jobs WHERE job_id = ? AND weighter = ?", (job_id, weighter)).fetchone()
    if row is None:
        raise NotFound(f"the weighter has no job {job_id!r}; open the job before it teaches")
    return int(row[0])


def _taken(db: sqlite3.Connection, job: int, update: MetaUpdate, digest: bytes) -> int | None:
    """The position that the update has. Raises AlreadyExists where its id was used for other content."""
    row = db.execute(
        "SELECT position, digest FROM update_ids WHERE job = ? AND update_id = ?", (job, update.update_id)
    ).fetchone()
    if row is None:
        return None
    if row[1] != digest:
        raise AlreadyExists(
            f"update {update.update_id!r} of job {update.job_id!r} was taken at position {row[0]} with other content; "
            "a retry must send the same content, another update needs another update_id"
        )
    return int(row[0])


def _job_values(job: JobRecord) -> tuple[object, ...]:
    """In the order of _JOB_COLUMNS."""
    return (
        job.role.value,
        json.dumps(job.feature_names),
        job.open,
        job.reference,
        job.reference_checksum,
        job.documents_checksum,
    )


def _job_records(db: sqlite3.Connection, column: str, value: str) -> list[JobRecord]:
    rows = db.execute(
        f"SELECT job_id, uid, {', '.join(_JOB_COLUMNS)} FROM jobs JOIN weighters ON weighters.id = jobs.weighter "
        f"WHERE {column} = ? ORDER BY jobs.id",
        (value,),
    ).fetchall()
    return [
        JobRecord(job_id, uid, Role(role), tuple(json.loads(names)), bool(is_open), *reference)
        for job_id, uid, role, names, is_open, *reference in rows
    ]


def _profile_bytes(profile: np.ndarray) -> bytes:
    if profile.ndim != 1 or profile.dtype != np.float16:
        raise InvalidArgument(
            f"a profile must be [buckets] float16, got {profile.dtype.name} of shape {list(profile.shape)}"
        )
    return profile.astype("<f2").tobytes()


def _checksum(uid: str, position: int, payload: bytes) -> int:
    """CRC-32 of an entry's place and content: an intact entry in the wrong place is a damaged one too."""
    return zlib.crc32(payload, zlib.crc32(f"{uid}:{position};".encode()))
