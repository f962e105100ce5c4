"""The file under the SQLite update log: its schema and how one version becomes the next, its lock, its errors.

Must not know what is asked of the log. A file is never repaired or replaced here: one that can't be trusted is refused
by name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from weighting_contract.errors import FailedPrecondition, ResourceExhausted, Unavailable, WeighbridgeError
from weighting_contract.folder import sync

APPLICATION_ID = 0x57425247  # "WBRG", in the file's header: tells our files from other programs' databases

# What leads from each version of the schema to the next; a new file, at version 0, takes all of the steps.
# Head, trimmed positions and each job's last update are columns, so that no question needs a scan of the entries.
# Update ids are apart from the entries because they outlive them; profiles are apart from the jobs for their size.
STEPS: tuple[tuple[str, ...], ...] = (
    (
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
    ),
    (
        # What weighters of that version did without: a replay must not learn otherwise than they did.
        """UPDATE weighters SET spec = json_set(
            spec, '$.learning.trust', json('false'), '$.learning.averaging', 0, '$.learning.logit_penalty', 0)""",
        "ALTER TABLE weighters ADD COLUMN initial TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN reference TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN reference_checksum TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN documents_checksum TEXT NOT NULL DEFAULT ''",
        """CREATE TABLE profiles (
            job INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
            crc32 INTEGER NOT NULL, log_ratios BLOB NOT NULL)""",
    ),
    (
        "ALTER TABLE weighters ADD COLUMN shared_with TEXT NOT NULL DEFAULT '[]'",
        # The chain at the head and at the trimmed point; empty where the entry is older than this version.
        "ALTER TABLE weighters ADD COLUMN chain TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE weighters ADD COLUMN trimmed_chain TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN quarantined TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN seen_unix_ms INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX open_jobs_of_weighter ON jobs (weighter) WHERE open = 1",  # closed ones are never removed
        "ALTER TABLE entries ADD COLUMN kind TEXT NOT NULL DEFAULT 'update'",
        "ALTER TABLE entries ADD COLUMN chain TEXT NOT NULL DEFAULT ''",
        """CREATE TABLE vouched (
            weighter INTEGER NOT NULL REFERENCES weighters (id) ON DELETE CASCADE,
            position INTEGER NOT NULL, environment TEXT NOT NULL, checksum TEXT NOT NULL,
            PRIMARY KEY (weighter, position, environment)) WITHOUT ROWID""",
        "CREATE TABLE records (version INTEGER NOT NULL)",  # one row
        "INSERT INTO records VALUES (0)",
    ),
)
SCHEMA_VERSION = len(STEPS)


def open_file(path: Path) -> sqlite3.Connection:
    """The database at `path`, made where there is none, brought to this version's schema where it is older."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        version = _found_version(db, path)
        _check_whole(db, path)
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
        if version < SCHEMA_VERSION:
            _upgrade(db, version)
        if version == 0:
            sync(path.parent)  # the file's name must survive a power loss too
    except BaseException:
        db.close()
        raise
    return db


def _found_version(db: sqlite3.Connection, path: Path) -> int:
    """The file's schema version, 0 for a new file, found out before anything is written; raises where it isn't ours."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application == 0 and version == 0 and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None:
        return 0
    if application != APPLICATION_ID:
        raise FailedPrecondition(f"{path} is a database of another program, not an update log; choose another path")
    if version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"{path} comes from a newer version of the service: its schema is version {version}, this service knows "
            f"up to {SCHEMA_VERSION}; upgrade the service or choose another path"
        )
    db.execute("SELECT id, head FROM weighters LIMIT 1").fetchone()  # a truncated file shows here, not at first use
    return int(version)


def _check_whole(db: sqlite3.Connection, path: Path) -> None:
    """Raises where the file ends inside a page, of which SQLite would read the rest as zeros."""
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size > 0:
        return  # a crash may have left the last page unfinished; the WAL has it whole
    size, page = path.stat().st_size, int(db.execute("PRAGMA page_size").fetchone()[0])
    if size % page:
        raise FailedPrecondition(
            f"{path} is damaged: it ends inside a page, {size} bytes are no multiple of {page}; it was left as it is: "
            "restore it from a copy, or choose another path"
        )


def _upgrade(db: sqlite3.Connection, version: int) -> None:
    """From `version` to this one, all or nothing."""
    db.execute("BEGIN IMMEDIATE")
    for step in STEPS[version:]:
        for statement in step:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def lock(path: Path) -> int:
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


def unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a forked child may hold a copy of the descriptor
    os.close(descriptor)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Storage errors as sentences of ours; the only place that knows SQLite's codes."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _storage_error(path, exc) from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path, exc) from exc
        raise Unavailable(f"the update log {path} can't be used: {exc}; check the path and its permissions") from exc


def _storage_error(path: Path, exc: sqlite3.Error) -> WeighbridgeError:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return FailedPrecondition(
            f"{path} is damaged or not an update log ({exc}); it was left as it is: restore it from a copy, or choose "
            "another path"
        )
    if code == sqlite3.SQLITE_FULL:
        return _disk_full(path, exc)
    return Unavailable(f"the update log {path} could not be read or written ({exc}); nothing was recorded: try again")


def _disk_full(path: Path, exc: Exception) -> ResourceExhausted:
    return ResourceExhausted(
        f"the disk of the update log {path} is full ({exc}); nothing was recorded: free space and try again",
        retry_after_s=30.0,
    )
