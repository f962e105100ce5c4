"""The keys of the Redis update log, and its records, profiles and entries as the bytes under them.

Must not know connections or scripts.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from weighting_contract.errors import Internal, InvalidArgument
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import Entry, JobRecord, Role, WeighterRecord
from weighting_service.update_log.encoding import decode_entry

FORMAT = 1  # of all that is described here

_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Keys:
    """All keys of a log: hashes, where nothing else is said."""

    prefix: str

    @property
    def records(self) -> str:
        """version (grows with every change of a record), order (of creation, of all records), format."""
        return f"{self.prefix}records"

    @property
    def heads(self) -> str:
        """uid -> position of the last entry. A weighter is known if it is here."""
        return f"{self.prefix}heads"

    @property
    def names(self) -> str:
        """name -> uid."""
        return f"{self.prefix}names"

    @property
    def weighters(self) -> str:
        """uid -> order and record, as JSON."""
        return f"{self.prefix}weighters"

    @property
    def shared(self) -> str:
        """uid -> tenants, as JSON."""
        return f"{self.prefix}shared"

    @property
    def owners(self) -> str:
        """job id -> uid."""
        return f"{self.prefix}owners"

    @property
    def seen(self) -> str:
        """job id -> Unix milliseconds."""
        return f"{self.prefix}seen"

    def history(self, uid: str) -> str:
        """chain (at the head), trimmed, trimmed_chain."""
        return f"{self.prefix}{{{uid}}}:history"

    def entries(self, uid: str) -> str:
        """Stream; the id of an entry is POSITION-0, its fields kind, payload, crc, chain."""
        return f"{self.prefix}{{{uid}}}:entries"

    def jobs(self, uid: str) -> str:
        """job id -> order and record, as JSON."""
        return f"{self.prefix}{{{uid}}}:jobs"

    def open_jobs(self, uid: str) -> str:
        """Sorted set; ids of the open ones among the jobs, by their order."""
        return f"{self.prefix}{{{uid}}}:open_jobs"

    def profiles(self, uid: str) -> str:
        """job id -> CRC-32 and table."""
        return f"{self.prefix}{{{uid}}}:profiles"

    def taught(self, uid: str) -> str:
        """job id -> its highest step, as twenty digits, and that one's position."""
        return f"{self.prefix}{{{uid}}}:taught"

    def vouched(self, uid: str) -> str:
        """position and environment -> checksum of the state."""
        return f"{self.prefix}{{{uid}}}:vouched"

    def taken(self, uid: str, job_id: str) -> str:
        """update id -> position and digest."""
        return f"{self.prefix}{{{uid}}}:taken:{job_id}"

    def importing(self, uid: str) -> str:
        """Plain; who is importing the weighter. It expires."""
        return f"{self.prefix}{{{uid}}}:importing"

    def of_weighter(self, uid: str) -> list[str]:
        """A weighter's own keys, jobs first, but for the update ids of its jobs."""
        own = (self.jobs, self.open_jobs, self.history, self.entries, self.profiles, self.taught, self.vouched)
        return [each(uid) for each in own]


def weighter_json(record: WeighterRecord) -> tuple[str, str]:
    """(what never changes, whom it is shared with) of a weighter."""
    fields = {
        "name": record.name,
        "uid": record.uid,
        "spec": record.spec.to_dict(),
        "created_unix_ms": record.created_unix_ms,
        "initial": record.initial,
    }
    return json.dumps(fields), json.dumps(record.shared_with)


def weighter_records(found: Mapping[bytes, bytes], shared: Mapping[bytes, bytes]) -> list[WeighterRecord]:
    """In order of creation."""
    records = []
    for uid, value in sorted(found.items(), key=_order):
        fields = json.loads(value.partition(b" ")[2])
        fields["spec"] = WeighterSpec.from_dict(fields["spec"])
        records.append(WeighterRecord(**fields, shared_with=tuple(json.loads(shared[uid]))))
    return records


def weighter_name(value: bytes) -> str:
    return str(json.loads(value.partition(b" ")[2])["name"])


def job_json(job: JobRecord) -> str:
    return json.dumps(dataclasses.asdict(job))


def job_record(value: bytes) -> JobRecord:
    fields = json.loads(value.partition(b" ")[2])
    fields["role"], fields["feature_names"] = Role(fields["role"]), tuple(fields["feature_names"])
    return JobRecord(**fields)


def job_records(found: Mapping[bytes, bytes]) -> list[JobRecord]:
    """In order of creation."""
    return [job_record(value) for _, value in sorted(found.items(), key=_order)]


def _order(item: tuple[bytes, bytes]) -> int:
    return int(item[1].partition(b" ")[0])


def profile_value(table: bytes) -> bytes:
    """A profile's table with its CRC-32 before it."""
    return _CRC.pack(zlib.crc32(table)) + table


def profile_table(value: bytes, job_id: str, where: str) -> bytes:
    """What `profile_value` was made from. Raises Internal where it is damaged."""
    table = value[_CRC.size :]
    if _CRC.pack(zlib.crc32(table)) != value[: _CRC.size]:
        raise Internal(
            f"the target profile of job {job_id!r} in Redis at {where} is damaged: its checksum does not match; open "
            "the job again with its profile, or restore Redis from a copy"
        )
    return table


def taken_value(position: int, digest: bytes) -> str:
    return f"{position} {digest.hex()}"


def taken_fields(value: bytes) -> tuple[int, bytes]:
    """(position, digest) of an update id."""
    position, _, digest = value.decode().partition(" ")
    return int(position), bytes.fromhex(digest)


def step_text(step: int) -> str:
    """Of equal length for all steps >= 0, so that texts compare like the steps."""
    return f"{step:020}"


def taught_value(step: int, position: int) -> str:
    return f"{step_text(step)} {position}"


def taught_fields(value: bytes | None) -> tuple[int, int]:
    """(step, position); (-1, 0) where nothing was taught."""
    if value is None:
        return -1, 0
    step, _, position = value.partition(b" ")
    return int(step), int(position)


def vouched_place(position: int, environment: str) -> str:
    return f"{position} {environment}"


def entry_checksum(uid: str, kind: str, payload: bytes) -> int:
    """CRC-32 of an entry's content and weighter; its position is its id in the stream."""
    return zlib.crc32(payload, zlib.crc32(f"{uid};{kind};".encode()))


def entry_of(uid: str, position: int, fields: Mapping[bytes, bytes], described: str) -> tuple[Entry, str]:
    """(content, chain) of an entry of the stream. Raises Internal where it is damaged; `described` says which it is."""
    kind, payload = fields.get(b"kind", b"").decode(errors="replace"), fields.get(b"payload", b"")
    if str(entry_checksum(uid, kind, payload)).encode() != fields.get(b"crc"):
        raise Internal(
            f"{described} is damaged: its checksum does not match; restore Redis from a copy, or go on from a snapshot "
            f"at position {position} or later"
        )
    try:
        return decode_entry(kind, payload), fields.get(b"chain", b"").decode()
    except InvalidArgument as exc:
        raise Internal(f"{described} can't be read: {exc}") from exc
