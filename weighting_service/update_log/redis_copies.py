"""Weighters on their way out of a Redis update log and into another; see copies.py.

An imported weighter is written under its own keys first and made known by one script at the end: one that was
interrupted is not there for anybody, and its remains are removed by the next try.

Must not know Redis's errors.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from weighting_contract.errors import FailedPrecondition, WeighbridgeError
from weighting_service.domain import JobRecord, WeighterRecord
from weighting_service.update_log import redis_records as records
from weighting_service.update_log import redis_scripts as scripts
from weighting_service.update_log import refusals
from weighting_service.update_log.base import LogEntry
from weighting_service.update_log.copies import JobCopy, TakenUpdate, Vouched, WeighterCopy
from weighting_service.update_log.encoding import encode_entry, kind_of
from weighting_service.update_log.redis_connection import RedisConnection, hash_of
from weighting_service.update_log.redis_records import Keys

PORTION_BYTES = 4 << 20  # of entries in one message
PORTION_COMMANDS = 1000
PAGE = 1000  # update ids
LOCK_S = 60  # after which an importer that was not heard of is gone

Command = tuple[Any, ...]


def weighter_copy(
    connection: RedisConnection, keys: Keys, record: WeighterRecord, jobs: list[JobRecord]
) -> WeighterCopy:
    """All but entries and update ids, at one look. Raises NotFound."""
    uid = record.uid
    head, *hashes = connection.together(
        ("HGET", keys.heads, uid),
        ("HGETALL", keys.history(uid)),
        ("HGETALL", keys.taught(uid)),
        ("HGETALL", keys.profiles(uid)),
        ("HGETALL", keys.vouched(uid)),
    )
    if head is None:
        raise refusals.no_weighter(uid)
    history, taught, profiles, vouched = map(hash_of, hashes)
    seen = connection.call("HMGET", keys.seen, "", *(job.job_id for job in jobs))
    copies = []
    for job, seen_unix_ms in zip(jobs, seen[1:], strict=True):
        profile = profiles.get(job.job_id.encode())
        table = None if profile is None else records.profile_table(profile, job.job_id, connection.where)
        last_taught = records.taught_fields(taught.get(job.job_id.encode()))
        copies.append(JobCopy(job, last_taught, int(seen_unix_ms or 0), table))
    return WeighterCopy(
        record=record,
        head=int(head),
        chain=history.get(b"chain", b"").decode(),
        trimmed=int(history.get(b"trimmed", 0)),
        trimmed_chain=history.get(b"trimmed_chain", b"").decode(),
        jobs=tuple(copies),
        vouched=tuple(sorted(_vouched(vouched), key=lambda each: (each.position, each.environment))),
    )


def taken_by(connection: RedisConnection, keys: Keys, uid: str, job_id: str) -> Iterator[TakenUpdate]:
    """The update ids that a job has used; one may come twice."""
    cursor = -1
    while cursor != 0:
        cursor, page = connection.call("HSCAN", keys.taken(uid, job_id), max(cursor, 0), "COUNT", PAGE)
        for update_id, value in page.items():
            yield TakenUpdate(job_id, update_id.decode(), *records.taken_fields(value))


class Import:
    """One weighter being written under its own keys, by one importer at a time."""

    def __init__(self, connection: RedisConnection, keys: Keys, copy: WeighterCopy) -> None:
        self._redis, self._keys, self._copy = connection, keys, copy
        uid = copy.record.uid
        self._lock, self._importer = keys.importing(uid), uuid.uuid4().hex
        self._written = [*keys.of_weighter(uid), *(keys.taken(uid, job.record.job_id) for job in copy.jobs)]

    def run(self, entries: Iterable[LogEntry], taken: Iterable[TakenUpdate]) -> None:
        """Raises AlreadyExists, and FailedPrecondition where another import of the weighter is under way."""
        uid = self._copy.record.uid
        if not self._redis.call("SET", self._lock, self._importer, "NX", "EX", LOCK_S):
            raise self._other_importer()
        try:
            if self._redis.call("HEXISTS", self._keys.heads, uid):
                self._redis.call("UNLINK", self._lock)
                raise refusals.weighter_taken("uid", uid)
            self._redis.call("UNLINK", *self._written)  # what an earlier import left that was killed
            self._send(self._record_commands())
            self._send(_entry_command(self._keys, uid, entry) for entry in entries)
            self._send(_taken_command(self._keys, uid, each) for each in taken)
            self._make_known()
        except BaseException:
            with contextlib.suppress(WeighbridgeError):  # the next import removes them otherwise
                self._redis.script(scripts.ABANDON_IMPORT, [self._lock, *self._written], self._importer)
            raise

    def _record_commands(self) -> Iterator[Command]:
        keys, copy, uid = self._keys, self._copy, self._copy.record.uid
        history = {"chain": copy.chain, "trimmed": copy.trimmed, "trimmed_chain": copy.trimmed_chain}
        yield "HSET", keys.history(uid), *_flat(history)
        for each in copy.vouched:
            yield "HSET", keys.vouched(uid), records.vouched_place(each.position, each.environment), each.checksum
        for job in copy.jobs:
            order = self._redis.call("HINCRBY", keys.records, "order", 1)
            yield from _job_commands(keys, uid, job, order)

    def _send(self, commands: Iterable[Command]) -> None:
        portion: list[Command] = []
        size = 0
        for command in commands:
            portion.append(command)
            size += sum(len(part) for part in command if isinstance(part, bytes))
            if size >= PORTION_BYTES or len(portion) >= PORTION_COMMANDS:
                self._redis.in_a_row([("EXPIRE", self._lock, LOCK_S), *portion])
                portion, size = [], 0
        self._redis.in_a_row([("EXPIRE", self._lock, LOCK_S), *portion])

    def _make_known(self) -> None:
        keys, record = self._keys, self._copy.record
        answer, *details = self._redis.script(
            scripts.FINISH_IMPORT,
            [keys.names, keys.heads, keys.weighters, keys.shared, keys.records, keys.owners, keys.seen, self._lock],
            record.name,
            record.uid,
            *records.weighter_json(record),
            self._copy.head,
            records.FORMAT,
            self._importer,
            *_flat({job.record.job_id: job.seen_unix_ms for job in self._copy.jobs}),
        )
        if answer == b"not_ours":
            raise self._other_importer()
        if answer == b"name_taken":
            raise refusals.weighter_taken("name", record.name)
        if answer == b"uid_taken":
            raise refusals.weighter_taken("uid", record.uid)
        if answer == b"job_taken":
            raise refusals.job_of_another_weighter(details[0].decode())

    def _other_importer(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"weighter {self._copy.record.name!r} is being imported into Redis at {self._redis.where} by another "
            f"process, or was until it was killed; wait until that one is done, or {LOCK_S} s after its end"
        )


def _job_commands(keys: Keys, uid: str, job: JobCopy, order: int) -> Iterator[Command]:
    job_id = job.record.job_id
    yield "HSET", keys.jobs(uid), job_id, f"{order} {records.job_json(job.record)}"
    if job.record.open:
        yield "ZADD", keys.open_jobs(uid), order, job_id
    step, position = job.last_taught
    if step >= 0:
        yield "HSET", keys.taught(uid), job_id, records.taught_value(step, position)
    if job.profile is not None:
        yield "HSET", keys.profiles(uid), job_id, records.profile_value(job.profile)


def _entry_command(keys: Keys, uid: str, entry: LogEntry) -> Command:
    payload, kind = encode_entry(entry.content), kind_of(entry.content)
    crc = records.entry_checksum(uid, kind, payload)
    fields = {"kind": kind.value, "payload": payload, "crc": crc, "chain": entry.chain}
    return "XADD", keys.entries(uid), f"{entry.position}-0", *_flat(fields)


def _taken_command(keys: Keys, uid: str, each: TakenUpdate) -> Command:
    return "HSET", keys.taken(uid, each.job_id), each.update_id, records.taken_value(each.position, each.digest)


def _flat(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(part for item in fields.items() for part in item)


def _vouched(found: Mapping[bytes, bytes]) -> Iterator[Vouched]:
    for place, checksum in found.items():
        position, _, environment = place.decode().partition(" ")
        yield Vouched(int(position), environment, checksum.decode())
