"""Weighters on their way out of an SQLite update log and into another; see copies.py.

Must not know transactions, locks or the file's path.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping

import numpy as np

from weighting_service.update_log import sqlite_rows as rows
from weighting_service.update_log.base import LogEntry
from weighting_service.update_log.copies import JobCopy, TakenUpdate, Vouched, WeighterCopy
from weighting_service.update_log.encoding import encode_entry, kind_of, profile_bytes

PAGE = 10_000  # update ids


def weighter_copy(db: sqlite3.Connection, uid: str, profiles: Mapping[str, np.ndarray | None]) -> WeighterCopy:
    """All but entries and update ids; `profiles` are those of the jobs, by id. Raises NotFound."""
    weighter = rows.weighter_row(db, uid)
    found = db.execute(
        "SELECT job_id, last_step, last_position, seen_unix_ms FROM jobs WHERE weighter = ?", (weighter.id,)
    ).fetchall()
    known = {job_id: others for job_id, *others in found}
    jobs = []
    for record in rows.job_records(db, "weighters.uid", uid):
        step, position, seen_unix_ms = known[record.job_id]
        profile = profiles.get(record.job_id)
        jobs.append(
            JobCopy(record, (step, position), seen_unix_ms, None if profile is None else profile_bytes(profile))
        )
    vouched = db.execute(
        "SELECT position, environment, checksum FROM vouched WHERE weighter = ? ORDER BY position, environment",
        (weighter.id,),
    )
    return WeighterCopy(
        record=next(record for record in rows.weighter_records(db) if record.uid == uid),
        head=weighter.head,
        chain=weighter.chain,
        trimmed=weighter.trimmed,
        trimmed_chain=weighter.trimmed_chain,
        jobs=tuple(jobs),
        vouched=tuple(Vouched(*row) for row in vouched.fetchall()),
    )


def taken_after(
    db: sqlite3.Connection, weighter: int, after: tuple[int, str]
) -> tuple[list[TakenUpdate], tuple[int, str] | None]:
    """A page of update ids behind `after`, and where the next page begins; None behind the last."""
    found = db.execute(
        "SELECT job, job_id, update_id, position, digest FROM update_ids JOIN jobs ON jobs.id = update_ids.job "
        "WHERE weighter = ? AND (job, update_id) > (?, ?) ORDER BY job, update_id LIMIT ?",
        (weighter, *after, PAGE),
    ).fetchall()
    page = [TakenUpdate(*row[1:]) for row in found]
    return page, (found[-1][0], found[-1][2]) if len(found) == PAGE else None


def insert_copy(
    db: sqlite3.Connection, copy: WeighterCopy, entries: Iterable[LogEntry], taken: Iterable[TakenUpdate]
) -> None:
    """Raises AlreadyExists."""
    uid = copy.record.uid
    rows.insert_weighter(db, copy.record)
    weighter = rows.weighter_row(db, uid).id
    db.execute(
        "UPDATE weighters SET head = ?, chain = ?, trimmed = ?, trimmed_chain = ? WHERE id = ?",
        (copy.head, copy.chain, copy.trimmed, copy.trimmed_chain, weighter),
    )
    ids = {job.record.job_id: _insert_job(db, weighter, job) for job in copy.jobs}
    db.executemany(
        "INSERT INTO vouched VALUES (?, ?, ?, ?)",
        [(weighter, each.position, each.environment, each.checksum) for each in copy.vouched],
    )
    for entry in entries:
        payload, kind = encode_entry(entry.content), kind_of(entry.content)
        rows.insert_entry(db, weighter, uid, entry.position, entry.chain, kind, payload)
    db.executemany(
        "INSERT OR REPLACE INTO update_ids VALUES (?, ?, ?, ?)",
        ((ids[each.job_id], each.update_id, each.position, each.digest) for each in taken),
    )


def _insert_job(db: sqlite3.Connection, weighter: int, job: JobCopy) -> int:
    rows.put_job_row(db, weighter, job.record)
    row = rows.job_row(db, weighter, job.record.job_id)
    db.execute(
        "UPDATE jobs SET last_step = ?, last_position = ?, seen_unix_ms = ? WHERE id = ?",
        (*job.last_taught, job.seen_unix_ms, row),
    )
    if job.profile is not None:
        rows.put_profile_row(db, row, job.profile)
    return row
