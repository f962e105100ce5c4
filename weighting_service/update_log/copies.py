"""A weighter as one log hands it over to another: everything stays as it is, positions, chains and digests too.

Must not know any implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

from weighting_service.domain import JobRecord, WeighterRecord


@dataclass(frozen=True)
class JobCopy:
    """A job and what a log knows of it, beside its update ids."""

    record: JobRecord
    last_taught: tuple[int, int]  # step, position; (-1, 0) where it has taught nothing
    seen_unix_ms: int  # 0: never touched
    profile: bytes | None  # as `encoding.profile_bytes` has it


@dataclass(frozen=True)
class Vouched:
    """A published checksum of a state."""

    position: int
    environment: str
    checksum: str


@dataclass(frozen=True)
class WeighterCopy:
    """A weighter without its entries and update ids, of which there may be millions. Equal copies are equal logs."""

    record: WeighterRecord
    head: int
    chain: str  # at the head
    trimmed: int
    trimmed_chain: str
    jobs: tuple[JobCopy, ...]  # oldest first
    vouched: tuple[Vouched, ...]  # by position and environment


@dataclass(frozen=True)
class TakenUpdate:
    """An update id that was used."""

    job_id: str
    update_id: str
    position: int
    digest: bytes
