"""An update log in Redis: shared by the services of several machines.

Must not know the model, nor Redis's errors and settings (redis_connection.py, redis_checks.py). What is kept under
which key is in redis_records.py; every change is one script of redis_scripts.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from weighting_contract.errors import FailedPrecondition
from weighting_service import failpoints
from weighting_service.domain import JobRecord, MetaUpdate, Rollback, WeighterRecord
from weighting_service.update_log import redis_copies, refusals
from weighting_service.update_log import redis_records as records
from weighting_service.update_log import redis_scripts as scripts
from weighting_service.update_log.base import Appended, Heads, LogEntry, UpdateLog
from weighting_service.update_log.copies import TakenUpdate, WeighterCopy
from weighting_service.update_log.encoding import digest_of, encode_entry, kind_of, profile_array, profile_bytes
from weighting_service.update_log.redis_checks import check_kind, durability_problems
from weighting_service.update_log.redis_connection import RedisConnection, hash_of

log = logging.getLogger(__name__)

TRIM_PORTION = 256  # entries a script


class RedisUpdateLog(UpdateLog):
    """The log in one Redis server (not a cluster), 6.2 or newer; see `RedisConnection` for the URL.

    Every append is one script that looks for the update id, gives the position and writes the entry, or does nothing.
    Acknowledged means durable only with `appendonly yes`, `appendfsync always` and `maxmemory-policy noeviction`.

    Args:
        url: redis://HOST:PORT/DB, of which `?prefix=` sets the prefix of all keys.
        durability: "strict" refuses a Redis that may lose what it acknowledged, or doesn't tell; "relaxed" takes it,
            with a line in the log for each reason, which are `warnings` too.

    Raises:
        InvalidArgument: the URL is none of Redis.
        FailedPrecondition: Redis is too old, part of a cluster, set so that it may lose updates, refuses the user, or
            holds the log of a newer version of the service.
        Unavailable: it can't be reached, or is loading its data.
    """

    shared = True

    def __init__(self, url: str, durability: Literal["strict", "relaxed"] = "strict") -> None:
        self._redis = RedisConnection(url)
        self._keys = records.Keys(self._redis.prefix)
        try:
            check_kind(self._redis)
            self._check_format()
            self.warnings = durability_problems(self._redis)
            if self.warnings and durability == "strict":
                raise FailedPrecondition("; ".join([*self.warnings, "or take the risk with --durability relaxed"]))
        except BaseException:
            self._redis.close()
            raise
        for warning in self.warnings:
            log.warning("%s", warning)

    def create_weighter(self, record: WeighterRecord) -> None:
        keys = self._keys
        (answer,) = self._redis.script(
            scripts.CREATE_WEIGHTER,
            [keys.names, keys.heads, keys.weighters, keys.shared, keys.records],
            record.name,
            record.uid,
            *records.weighter_json(record),
            records.FORMAT,
        )
        if answer == b"name_taken":
            raise refusals.weighter_taken("name", record.name)
        if answer == b"uid_taken":
            raise refusals.weighter_taken("uid", record.uid)

    def weighters(self) -> list[WeighterRecord]:
        found, shared = self._redis.together(("HGETALL", self._keys.weighters), ("HGETALL", self._keys.shared))
        return records.weighter_records(hash_of(found), hash_of(shared))

    def put_weighter(self, record: WeighterRecord) -> None:
        keys = self._keys
        _, tenants = records.weighter_json(record)
        self._ask(record.uid, scripts.PUT_WEIGHTER, [keys.heads, keys.shared, keys.records], tenants)

    def delete_weighter(self, uid: str) -> None:
        keys = self._keys
        shared = [keys.names, keys.heads, keys.weighters, keys.shared, keys.records, keys.owners, keys.seen]
        name = self._name(uid)
        self._ask(uid, scripts.DELETE_WEIGHTER, [*shared, *keys.of_weighter(uid)], name, keys.taken(uid, ""))

    def put_job(self, job: JobRecord, profile: np.ndarray | None = None) -> None:
        keys, uid = self._keys, job.weighter_uid
        kept = b"" if profile is None else records.profile_value(profile_bytes(profile))
        (answer,) = self._ask(
            uid,
            scripts.PUT_JOB,
            [keys.heads, keys.owners, keys.jobs(uid), keys.open_jobs(uid), keys.profiles(uid), keys.records],
            job.job_id,
            records.job_json(job),
            int(job.open),
            kept,
        )
        if answer == b"other_weighter":
            raise refusals.job_of_another_weighter(job.job_id)

    def profile(self, job_id: str) -> np.ndarray | None:
        kept = self._of_job(job_id, self._keys.profiles)
        if kept is None:
            return None
        return profile_array(records.profile_table(kept, job_id, self._redis.where))

    def job(self, job_id: str) -> JobRecord | None:
        kept = self._of_job(job_id, self._keys.jobs)
        return None if kept is None else records.job_record(kept)

    def jobs(self, weighter_uid: str) -> list[JobRecord]:
        keys = self._keys
        head, found = self._redis.together(("HGET", keys.heads, weighter_uid), ("HGETALL", keys.jobs(weighter_uid)))
        self._known(weighter_uid, head)
        return records.job_records(hash_of(found))

    def open_jobs(self, weighter_uid: str) -> list[JobRecord]:
        keys, uid = self._keys, weighter_uid
        _, found = self._ask(uid, scripts.OPEN_JOBS, [keys.heads, keys.jobs(uid), keys.open_jobs(uid)])
        return [records.job_record(kept) for kept in found]

    def touch_jobs(self, seen: Mapping[str, int]) -> None:
        keys = self._keys
        if not seen:
            return
        self._redis.script(
            scripts.TOUCH_JOBS, [keys.owners, keys.seen], *(part for item in seen.items() for part in item)
        )

    def jobs_seen(self, job_ids: Iterable[str]) -> dict[str, int]:
        asked = list(job_ids)
        if not asked:
            return {}
        found = self._redis.call("HMGET", self._keys.seen, *asked)
        return {job_id: int(unix_ms) for job_id, unix_ms in zip(asked, found, strict=True) if unix_ms is not None}

    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        keys, uid = self._keys, weighter_uid
        kind, payload, digest = kind_of(update), encode_entry(update), update.digest()
        self._failpoint("before_append")
        answer, *details = self._ask(
            uid,
            scripts.APPEND,
            [
                keys.heads,
                keys.jobs(uid),
                keys.taken(uid, update.job_id),
                keys.taught(uid),
                keys.history(uid),
                keys.entries(uid),
            ],
            update.job_id,
            update.update_id,
            records.step_text(update.step),
            kind.value,
            payload,
            records.entry_checksum(uid, kind, payload),
            digest.hex(),
        )
        if answer == b"no_job":
            raise refusals.no_job(update.job_id)
        if answer == b"taken":
            return Appended(_position(update, digest, details[0]), duplicate=True)
        self._failpoint("after_append")
        return Appended(int(details[0]), duplicate=False)

    def append_rollback(self, weighter_uid: str, rollback: Rollback, expected_head: int | None) -> int:
        keys, uid = self._keys, weighter_uid
        kind, payload = kind_of(rollback), encode_entry(rollback)
        self._failpoint("before_append")
        answer, position = self._ask(
            uid,
            scripts.APPEND_ROLLBACK,
            [keys.heads, keys.history(uid), keys.entries(uid)],
            "" if expected_head is None else expected_head,
            kind.value,
            payload,
            records.entry_checksum(uid, kind, payload),
            digest_of(rollback).hex(),
        )
        if answer == b"other_head" and expected_head is not None:
            raise refusals.unexpected_head(self._name(uid), int(position), expected_head)
        self._failpoint("after_append")
        return int(position)

    def find(self, weighter_uid: str, update: MetaUpdate) -> int | None:
        keys, uid = self._keys, weighter_uid
        head, has_job, kept = self._redis.together(
            ("HGET", keys.heads, uid),
            ("HEXISTS", keys.jobs(uid), update.job_id),
            ("HGET", keys.taken(uid, update.job_id), update.update_id),
        )
        self._known(uid, head)
        if not has_job:
            raise refusals.no_job(update.job_id)
        return None if kept is None else _position(update, update.digest(), kept)

    def head(self, weighter_uid: str) -> int:
        return self._known(weighter_uid, self._redis.call("HGET", self._keys.heads, weighter_uid))

    def heads(self) -> Heads:
        version, positions = self._redis.together(
            ("HGET", self._keys.records, "version"), ("HGETALL", self._keys.heads)
        )
        return Heads(int(version or 0), {uid.decode(): int(head) for uid, head in hash_of(positions).items()})

    def read(self, weighter_uid: str, after: int, limit: int, chain: str = "") -> list[LogEntry]:
        refusals.check_range(after, limit)
        keys, uid = self._keys, weighter_uid
        _, head, trimmed, known, found, cut = self._ask(
            uid, scripts.READ, [keys.heads, keys.history(uid), keys.entries(uid)], after, limit, self.read_bytes
        )
        head, trimmed = int(head), int(trimmed or 0)
        if after > head:
            raise refusals.other_history(self._name(uid), after, head)
        if after < trimmed:
            raise refusals.entries_trimmed(self._name(uid), after, trimmed)
        if chain and known and known.decode() != chain:
            raise refusals.other_history(self._name(uid), after, head)
        last = int(found[-1][0].partition(b"-")[0]) if cut else min(after + limit, head)
        return self._entries(uid, range(after + 1, last + 1), found)

    def last_taught(self, job_id: str) -> tuple[int, int]:
        return records.taught_fields(self._of_job(job_id, self._keys.taught))

    def vouch(self, weighter_uid: str, position: int, environment: str, checksum: str) -> str:
        keys, uid = self._keys, weighter_uid
        place = records.vouched_place(position, environment)
        _, holds = self._ask(uid, scripts.VOUCH, [keys.heads, keys.vouched(uid)], place, checksum)
        return str(holds.decode())

    def trimmed(self, weighter_uid: str) -> int:
        keys, uid = self._keys, weighter_uid
        head, trimmed = self._redis.together(("HGET", keys.heads, uid), ("HGET", keys.history(uid), "trimmed"))
        self._known(uid, head)
        return int(trimmed or 0)

    def trim(self, weighter_uid: str, up_to: int) -> None:
        while self._trim_portion(weighter_uid, up_to):  # in portions, so that appends get their turn in between
            self._failpoint("during_trim")

    def export(self, weighter_uid: str) -> WeighterCopy:
        record = next((record for record in self.weighters() if record.uid == weighter_uid), None)
        if record is None:
            raise refusals.no_weighter(weighter_uid)
        return redis_copies.weighter_copy(self._redis, self._keys, record, self.jobs(weighter_uid))

    def taken(self, weighter_uid: str) -> Iterator[TakenUpdate]:
        for job in self.jobs(weighter_uid):
            yield from redis_copies.taken_by(self._redis, self._keys, weighter_uid, job.job_id)

    def import_(self, copy: WeighterCopy, entries: Iterable[LogEntry], taken: Iterable[TakenUpdate]) -> None:
        redis_copies.Import(self._redis, self._keys, copy).run(entries, taken)

    def size_bytes(self) -> int:
        """The memory that Redis uses, for all of its data: what can run out."""
        return int(self._redis.call("INFO", "memory")["used_memory"])  # its used_memory_dataset wraps around below 0

    def close(self) -> None:
        self._redis.close()

    def _check_format(self) -> None:
        kept = self._redis.call("HGET", self._keys.records, "format")
        if kept is not None and int(kept) > records.FORMAT:
            raise FailedPrecondition(
                f"the update log in Redis at {self._redis.where} comes from a newer version of the service: its "
                f"format is {int(kept)}, this service knows up to {records.FORMAT}; upgrade the service, or choose "
                "another prefix"
            )

    def _ask(self, uid: str, script: str, keys: list[str], *arguments: Any) -> list[Any]:
        """The answer of a script whose first argument is the weighter's uid."""
        answer: list[Any] = self._redis.script(script, keys, uid, *arguments)
        if answer[0] == b"no_weighter":
            raise refusals.no_weighter(uid)
        return answer

    def _trim_portion(self, uid: str, up_to: int) -> bool:
        """Whether there is more to trim."""
        keys = self._keys
        (answer,) = self._ask(
            uid, scripts.TRIM, [keys.heads, keys.history(uid), keys.entries(uid)], up_to, TRIM_PORTION
        )
        return bool(answer == b"more")

    def _entries(self, uid: str, expected: range, found: list[tuple[bytes, list[bytes]]]) -> list[LogEntry]:
        fields_at = {int(entry_id.partition(b"-")[0]): fields for entry_id, fields in found}
        entries = []
        for position in expected:
            if position not in fields_at:
                raise refusals.entry_missing(self._name(uid), uid, position, f"Redis at {self._redis.where}")
            described = f"entry {position} of weighter {uid} in Redis at {self._redis.where}"
            content, chain = records.entry_of(uid, position, hash_of(fields_at[position]), described)
            entries.append(LogEntry(position, content, chain))
        return entries

    def _of_job(self, job_id: str, key_of: Any) -> bytes | None:
        """A job's field of one of its weighter's hashes; None where there is no such job, or no such field."""
        owner = self._redis.call("HGET", self._keys.owners, job_id)
        kept: bytes | None = None if owner is None else self._redis.call("HGET", key_of(owner.decode()), job_id)
        return kept

    def _known(self, uid: str, head: bytes | None) -> int:
        if head is None:
            raise refusals.no_weighter(uid)
        return int(head)

    def _name(self, uid: str) -> str:
        kept = self._redis.call("HGET", self._keys.weighters, uid)
        if kept is None:
            raise refusals.no_weighter(uid)
        return records.weighter_name(kept)

    def _failpoint(self, name: str) -> None:
        with self._redis.translated():
            failpoints.hit(name)


def _position(update: MetaUpdate, digest: bytes, kept: bytes) -> int:
    """Of an update id that was used. Raises AlreadyExists where it was for other content."""
    position, taken_digest = records.taken_fields(kept)
    if taken_digest != digest:
        raise refusals.taken_otherwise(update, position)
    return position
