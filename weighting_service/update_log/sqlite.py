"""An update log in one SQLite file: embedded, for one service process at a time.

Must not know the model. The file is never repaired or replaced here: one that can't be trusted is refused by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log.base import Appended, UpdateLog
from weighting_service.update_log.encoding import decode, encode

SCHEMA_VERSION = 1
APPLICATION_ID = 0x57425247  # "WBRG", in the file's header: tells our files from other programs' databases
TRIM_PORTION = 32  # entries a transaction

# Head, trimmed positions and each job's last update are columns, so that no question needs a scan of the entries.
# Update ids are apart from the entries because they outlive them.
_SCHEMA = (
    """CREATE TABLE weighters (
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
        created_unix_ms INTEGER NOT NULL, head INTEGER NOT NULL DEFAULT 0, trimmed INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, job_id TEXT NOT NULL UNIQUE,
        weighter INTEGER NOT NULL REFERENCES weighters (id) ON DELETE CASCADE,
        role TEXT NOT NULL, feature_names TEXT NOT NULL, open INTEGER NOT NULL,
        last_step INTEGER NOT NULL DEFAULT -1, last_position INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX jobs_of_weighter ON jobs (weighter)",
    """CREATE TABLE entries (
        weighter INTEGER NOT NULL REFERENCES weighters (id) ON DELETE CASCADE,
        position INTEGER NOT NULL, crc32 INTEGER NOT NULL, payload BLOB NOT NULL, UNIQUE (weighter, position))""",
    """CREATE TABLE update_ids (
        job INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        update_id TEXT NOT NULL, position INTEGER NOT NULL, digest BLOB NOT NULL,
        PRIMARY KEY (job, update_id)) WITHOUT ROWID""",
)


class SqliteUpdateLog(UpdateLog):
    """The log in the file `path`, made (with its folder) where there is none.

    Beside it: `path`-wal and `path`-shm, which belong to it, and `path`.lock, held as long as the log is open.

    Raises:
        FailedPrecondition: the file is damaged, is something else, comes from a newer version, or is in use by
            another process. It is left as it was.
        Unavailable: the file can't be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).resolve()  # one lock file, whichever link leads here
        self._mutex = threading.Lock()
        with _translated(self._path), contextlib.ExitStack() as undo:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._path)
            undo.callback(_unlock, self._lock)
            self._db: sqlite3.Connection | None = _open(self._path)
            undo.pop_all()

    def create_weighter(self, record: WeighterRecord) -> None:
        with self._transaction() as db:
            for column, value in (("name", record.name), ("uid", record.uid)):
                if db.execute(f"SELECT 1 FROM weighters WHERE {column} = ?", (value,)).fetchone():
                    raise AlreadyExists(
                        f"a weighter of {column} {value!r} exists already; choose another {column}, or delete it first"
                    )
            db.execute(
                "INSERT INTO weighters (uid, name, spec, created_unix_ms) VALUES (?, ?, ?, ?)",
                (record.uid, record.name, json.dumps(record.spec.to_dict()), record.created_unix_ms),
            )

    def weighters(self) -> list[WeighterRecord]:
        with self._reading() as db:
            rows = db.execute("SELECT name, uid, spec, created_unix_ms FROM weighters ORDER BY id").fetchall()
        return [
            WeighterRecord(name, uid, WeighterSpec.from_dict(json.loads(spec)), created)
            for name, uid, spec, created in rows
        ]

    def delete_weighter(self, uid: str) -> None:
        with self._transaction() as db:
            if not db.execute("DELETE FROM weighters WHERE uid = ?", (uid,)).rowcount:
                raise _no_weighter(uid)

    def put_job(self, job: JobRecord) -> None:
        with self._transaction() as db:
            weighter, *_ = _weighter(db, job.weighter_uid)
            owner = db.execute("SELECT weighter FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone()
            if owner and owner[0] != weighter:
                raise AlreadyExists(f"job {job.job_id!r} belongs to another weighter; choose another job id")
            db.execute(
                "INSERT INTO jobs (job_id, weighter, role, feature_names, open) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (job_id) DO UPDATE SET "
                "role = excluded.role, feature_names = excluded.feature_names, open = excluded.open",
                (job.job_id, weighter, job.role.value, json.dumps(job.feature_names), job.open),
            )

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
        with self._mutex, _translated(self._path):
            if self._db is None:
                return
            db, self._db = self._db, None
            try:
                db.close()
            finally:
                _unlock(self._lock)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, _translated(self._path):
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


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        is_new = _check_identity(db, path)
        # WAL with synchronous=FULL: a commit appends to the WAL and fsyncs it before it returns, and after a crash the
        # checksummed frames of the last whole commit are found again, so an acknowledged append survives power loss
        # just as with the rollback journal. It takes one fsync where DELETE takes several: measured on ext4
        # with entries of 72 KiB, median 0.5 ms against 1.5 ms (4 KiB: 0.5 and 1.4).
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise FailedPrecondition(f"{path} can't use SQLite's write-ahead log here; put it on a local file system")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone leaves data in the drive's cache; elsewhere ignored
        db.execute("PRAGMA foreign_keys = ON")
        if is_new:
            _create_schema(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _check_identity(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is new, found out before anything is written to it; raises where it isn't ours to use."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application == 0 and version == 0 and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None:
        return True
    if application != APPLICATION_ID:
        raise FailedPrecondition(f"{path} is a database of another program, not an update log; choose another path")
    if version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"{path} comes from a newer version of the service: its schema is version {version}, this service knows "
            f"up to {SCHEMA_VERSION}; upgrade the service or choose another path"
        )
    db.execute("SELECT id, head FROM weighters LIMIT 1").fetchone()  # a truncated file shows here, not at first use
    return False


def _create_schema(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the file's name must survive a power loss too
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    """The descriptor of the locked lock file. The system frees it when the process ends, however it ends.

    A file of its own: closing any descriptor of the database would drop the locks that SQLite holds on it.
    """
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace") or "unknown"
        os.close(descriptor)
        raise FailedPrecondition(
            f"{path} is in use by another service (process {owner}); stop that one or choose another path"
        ) from exc
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a forked child may hold a copy of the descriptor
    os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Storage errors as sentences of ours; the only place that knows SQLite's codes."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _storage_error(path, exc) from exc
    except OSError as exc:
        raise Unavailable(f"the update log {path} can't be used: {exc}; check the path and its permissions") from exc


def _storage_error(path: Path, exc: sqlite3.Error) -> WeighbridgeError:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return FailedPrecondition(
            f"{path} is damaged or not an update log ({exc}); it was left as it is: restore it from a copy, or choose "
            "another path"
        )
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            f"the disk of the update log {path} is full ({exc}); nothing was recorded: free space and try again",
            retry_after_s=30.0,
        )
    return Unavailable(f"the update log {path} could not be read or written ({exc}); nothing was recorded: try again")


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


def _job_records(db: sqlite3.Connection, column: str, value: str) -> list[JobRecord]:
    rows = db.execute(
        "SELECT job_id, uid, role, feature_names, open FROM jobs JOIN weighters ON weighters.id = jobs.weighter "
        f"WHERE {column} = ? ORDER BY jobs.id",
        (value,),
    ).fetchall()
    return [
        JobRecord(job_id, uid, Role(role), tuple(json.loads(names)), bool(is_open))
        for job_id, uid, role, names, is_open in rows
    ]


def _checksum(uid: str, position: int, payload: bytes) -> int:
    """CRC-32 of an entry's place and content: an intact entry in the wrong place is a damaged one too."""
    return zlib.crc32(payload, zlib.crc32(f"{uid}:{position};".encode()))
