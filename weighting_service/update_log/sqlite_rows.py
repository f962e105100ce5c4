"""Rows of the SQLite update log's tables and what they mean: records, profiles, entries with their checksums.

Must not know transactions, locks or the file's path.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from dataclasses import dataclass

from weighting_contract.spec import WeighterSpec
from weighting_service.domain import JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log import refusals
from weighting_service.update_log.encoding import Kind

_JOB_COLUMNS = (
    "role",
    "feature_names",
    "open",
    "reference",
    "reference_checksum",
    "documents_checksum",
    "quarantined",
)
_PUT_JOB = (
    f"INSERT INTO jobs (job_id, weighter, {', '.join(_JOB_COLUMNS)}) VALUES (?, ?{', ?' * len(_JOB_COLUMNS)}) "
    f"ON CONFLICT (job_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _JOB_COLUMNS)}"
)


@dataclass(frozen=True)
class WeighterRow:
    """What the log keeps of a weighter's history, beside its entries."""

    id: int
    name: str
    head: int
    chain: str  # at the head
    trimmed: int
    trimmed_chain: str


def weighter_row(db: sqlite3.Connection, uid: str) -> WeighterRow:
    """Raises NotFound."""
    row = db.execute(
        "SELECT id, name, head, chain, trimmed, trimmed_chain FROM weighters WHERE uid = ?", (uid,)
    ).fetchone()
    if row is None:
        raise refusals.no_weighter(uid)
    return WeighterRow(*row)


def insert_weighter(db: sqlite3.Connection, record: WeighterRecord) -> None:
    """Raises AlreadyExists where the name or the uid is taken."""
    for column, value in (("name", record.name), ("uid", record.uid)):
        if db.execute(f"SELECT 1 FROM weighters WHERE {column} = ?", (value,)).fetchone():
            raise refusals.weighter_taken(column, value)
    db.execute(
        "INSERT INTO weighters (uid, name, spec, created_unix_ms, initial, shared_with) VALUES (?, ?, ?, ?, ?, ?)",
        (
            record.uid,
            record.name,
            json.dumps(record.spec.to_dict()),
            record.created_unix_ms,
            record.initial,
            json.dumps(record.shared_with),
        ),
    )


def weighter_records(db: sqlite3.Connection) -> list[WeighterRecord]:
    rows = db.execute(
        "SELECT name, uid, spec, created_unix_ms, initial, shared_with FROM weighters ORDER BY id"
    ).fetchall()
    return [
        WeighterRecord(
            name, uid, WeighterSpec.from_dict(json.loads(spec)), created, initial, tuple(json.loads(tenants))
        )
        for name, uid, spec, created, initial, tenants in rows
    ]


def job_row(db: sqlite3.Connection, weighter: int, job_id: str) -> int:
    """The id of a weighter's job. Raises NotFound."""
    row = db.execute("SELECT id FROM jobs WHERE job_id = ? AND weighter = ?", (job_id, weighter)).fetchone()
    if row is None:
        raise refusals.no_job(job_id)
    return int(row[0])


def put_job_row(db: sqlite3.Connection, weighter: int, job: JobRecord) -> None:
    """Raises AlreadyExists where the id belongs to another weighter."""
    owner = db.execute("SELECT weighter FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone()
    if owner and owner[0] != weighter:
        raise refusals.job_of_another_weighter(job.job_id)
    values = (
        job.role.value,
        json.dumps(job.feature_names),
        job.open,
        job.reference,
        job.reference_checksum,
        job.documents_checksum,
        job.quarantined,
    )
    db.execute(_PUT_JOB, (job.job_id, weighter, *values))


def job_records(db: sqlite3.Connection, column: str, value: str, *, open_only: bool = False) -> list[JobRecord]:
    wanted = " AND jobs.open = 1" if open_only else ""  # word for word the condition of the index on open jobs
    rows = db.execute(
        f"SELECT job_id, uid, {', '.join(_JOB_COLUMNS)} FROM jobs JOIN weighters ON weighters.id = jobs.weighter "
        f"WHERE {column} = ?{wanted} ORDER BY jobs.id",
        (value,),
    ).fetchall()
    return [
        JobRecord(job_id, uid, Role(role), tuple(json.loads(names)), bool(is_open), *others)
        for job_id, uid, role, names, is_open, *others in rows
    ]


def put_profile_row(db: sqlite3.Connection, job: int, table: bytes) -> None:
    db.execute(
        "INSERT OR REPLACE INTO profiles (job, crc32, log_ratios) VALUES (?, ?, ?)", (job, zlib.crc32(table), table)
    )


def taken_position(db: sqlite3.Connection, job: int, update: MetaUpdate, digest: bytes) -> int | None:
    """The position that the update has. Raises AlreadyExists where its id was used for other content."""
    row = db.execute(
        "SELECT position, digest FROM update_ids WHERE job = ? AND update_id = ?", (job, update.update_id)
    ).fetchone()
    if row is None:
        return None
    if row[1] != digest:
        raise refusals.taken_otherwise(update, row[0])
    return int(row[0])


def insert_entry(
    db: sqlite3.Connection, weighter: int, uid: str, position: int, chain: str, kind: str, payload: bytes
) -> None:
    crc = entry_checksum(uid, position, chain, kind, payload)
    db.execute(
        "INSERT INTO entries (weighter, position, crc32, payload, kind, chain) VALUES (?, ?, ?, ?, ?, ?)",
        (weighter, position, crc, payload, kind, chain),
    )


def entry_rows(
    db: sqlite3.Connection, weighter: int, after: int, limit: int, most_bytes: int
) -> tuple[list[tuple[int, int, str, str, bytes]], bool]:
    """Up to `limit` rows behind `after`, and whether `most_bytes` cut them short."""
    asked = (
        "SELECT position, crc32, chain, kind, payload FROM entries WHERE weighter = ? AND position > ? "
        "ORDER BY position LIMIT ?"
    )
    found, size = [], 0
    with contextlib.closing(db.execute(asked, (weighter, after, limit))) as cursor:
        for row in cursor:
            found.append(row)
            size += len(row[-1])
            if size >= most_bytes:
                break
    return found, size >= most_bytes


def entry_checksum(uid: str, position: int, chain: str, kind: str, payload: bytes) -> int:
    """CRC-32 of an entry's place and content: an intact entry in the wrong place is a damaged one too."""
    place = f"{uid}:{position};"
    if chain or kind != Kind.UPDATE:  # neither was known before schema version 3
        place += f"{kind};{chain};"
    return zlib.crc32(payload, zlib.crc32(place.encode()))


def chain_at(db: sqlite3.Connection, weighter: WeighterRow, position: int) -> str:
    """Of the entry at a position from the trimmed one to the head; empty where it has none."""
    if position == weighter.head:
        return weighter.chain
    if position == weighter.trimmed:
        return weighter.trimmed_chain
    row = db.execute(
        "SELECT chain FROM entries WHERE weighter = ? AND position = ?", (weighter.id, position)
    ).fetchone()
    return str(row[0]) if row else ""
