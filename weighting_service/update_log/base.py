"""The interface of update logs: weighters, their jobs, and the ordered meta-updates that taught them.

Knows nothing of the model or of the transports. Every implementation passes `tests/contract/test_update_log.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from weighting_contract.errors import FailedPrecondition
from weighting_service.domain import Entry, JobRecord, MetaUpdate, Rollback, WeighterRecord
from weighting_service.update_log.copies import TakenUpdate, WeighterCopy


@dataclass(frozen=True)
class Appended:
    """Where an update is in the log; `duplicate` says that it was there before this call."""

    position: int
    duplicate: bool


class Trimmed(FailedPrecondition):
    """Entries that were asked for are dropped; a state at the trimmed position or later is needed."""


@dataclass(frozen=True)
class LogEntry:
    """One entry as it is read back."""

    position: int
    content: Entry
    chain: str  # digest of this entry and of all before it: equal chains at a position are equal histories


@dataclass(frozen=True)
class Heads:
    """Where all logs end, at one look."""

    version: int  # grows whenever a record of a weighter or a job was made, changed or deleted
    positions: dict[str, int]  # head of each weighter, by uid


class UpdateLog(abc.ABC):
    """Synchronous and safe to call from any thread. What a method has recorded is durable when it returns.

    Positions of a weighter are 1, 2, 3, ... without gaps. An update is recorded exactly once by (job, update id), for
    as long as its weighter exists: trimming an entry forgets its content, not that it was taken.

    `shared` says whether other services may write to the same log meanwhile. `read_bytes` is what the entries of one
    `read` take, about: a tenant's updates may be as large as messages are.

    All methods raise, beside what they list:
        NotFound: a weighter uid that the log doesn't hold (where nothing else is said).
        Unavailable: the log is closed, or its storage failed; the same call may be tried again.
        ResourceExhausted: the storage is full.
        FailedPrecondition: the storage is damaged.
    """

    shared: bool
    read_bytes = 64 << 20

    @abc.abstractmethod
    def create_weighter(self, record: WeighterRecord) -> None:
        """Records a weighter with an empty history.

        Raises:
            AlreadyExists: the name or the uid is taken.
        """

    @abc.abstractmethod
    def weighters(self) -> list[WeighterRecord]:
        """All weighters, oldest first."""

    @abc.abstractmethod
    def put_weighter(self, record: WeighterRecord) -> None:
        """Replaces what may change of a weighter's record: whom it is shared with."""

    @abc.abstractmethod
    def delete_weighter(self, uid: str) -> None:
        """Removes a weighter with its entries, jobs, profiles and update ids, at once; its name can be used again.

        Takes a time in proportion to its entries (a million: seconds), during which other calls wait.
        """

    @abc.abstractmethod
    def put_job(self, job: JobRecord, profile: np.ndarray | None = None) -> None:
        """Inserts the job, or replaces the record of that id; what the job has taught stays with it.

        Args:
            job: the record.
            profile: [buckets] float16, its target profile, recorded with it; absent: the one that it has stays.

        Raises:
            AlreadyExists: the job id belongs to another weighter.
            InvalidArgument: a profile of another shape or dtype.
        """

    @abc.abstractmethod
    def profile(self, job_id: str) -> np.ndarray | None:
        """[buckets] float16, read-only; None where there is no such job, or it has none.

        Raises:
            Internal: it is damaged.
        """

    @abc.abstractmethod
    def job(self, job_id: str) -> JobRecord | None:
        """The job of that id, None where there is none."""

    @abc.abstractmethod
    def jobs(self, weighter_uid: str) -> list[JobRecord]:
        """The weighter's jobs, oldest first: closed ones too, of which there may be many."""

    @abc.abstractmethod
    def open_jobs(self, weighter_uid: str) -> list[JobRecord]:
        """The weighter's open jobs, oldest first, without reading the closed ones."""

    @abc.abstractmethod
    def touch_jobs(self, seen: Mapping[str, int]) -> None:
        """Records when jobs were last heard of, job id -> Unix milliseconds; never moves one back.

        Unknown ids are left out. Not a change of a record: `heads().version` stays.
        """

    @abc.abstractmethod
    def jobs_seen(self, job_ids: Iterable[str]) -> dict[str, int]:
        """When jobs were last heard of, by any service; those never touched are not in it."""

    @abc.abstractmethod
    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        """Gives `update` the next position, or finds the position that it has. Durable when it returns.

        Raises:
            AlreadyExists: the job has used this update id for an update of another digest.
            NotFound: no such weighter, or it has no job of the update's job id.
        """

    @abc.abstractmethod
    def append_rollback(self, weighter_uid: str, rollback: Rollback, expected_head: int | None) -> int:
        """Gives `rollback` the next position. Durable when it returns.

        Raises:
            FailedPrecondition: the log does not end at `expected_head` (None: wherever it ends).
        """

    @abc.abstractmethod
    def find(self, weighter_uid: str, update: MetaUpdate) -> int | None:
        """The position that `update` has, trimmed or not; None where it was never taken.

        Raises:
            AlreadyExists, NotFound: as `append`.
        """

    @abc.abstractmethod
    def head(self, weighter_uid: str) -> int:
        """The position of the last entry, 0 where there was none yet."""

    @abc.abstractmethod
    def heads(self) -> Heads:
        """All heads in one cheap call, which a service of several makes many times a second."""

    @abc.abstractmethod
    def read(self, weighter_uid: str, after: int, limit: int, chain: str = "") -> list[LogEntry]:
        """Up to `limit` entries from position `after` + 1 on, in order and without gaps; empty at the head alone.

        Fewer where they take more than `read_bytes`.

        Args:
            chain: of the entry at `after`, as the caller knows it; empty: he doesn't.

        Raises:
            FailedPrecondition: `after` is beyond the head, or the log has another chain there: the caller's state comes
                from another history than this log's. Or `Trimmed`: some of these entries are.
            Internal: an entry is damaged or missing; the message names weighter and position.
        """

    @abc.abstractmethod
    def last_taught(self, job_id: str) -> tuple[int, int]:
        """(step, position) of the job's update of the highest step, trimmed or not; (-1, 0) where it has none."""

    @abc.abstractmethod
    def vouch(self, weighter_uid: str, position: int, environment: str, checksum: str) -> str:
        """Publishes the checksum of a state, unless one is known for this position and environment already.

        Args:
            environment: of the computation; only states of equal ones can be compared.

        Returns:
            The checksum that holds: the first that was published.
        """

    @abc.abstractmethod
    def trimmed(self, weighter_uid: str) -> int:
        """The position up to which entries are dropped, 0 where none are."""

    @abc.abstractmethod
    def trim(self, weighter_uid: str, up_to: int) -> None:
        """Drops the entries at positions <= `up_to` (at most up to the head); later positions don't move."""

    @abc.abstractmethod
    def export(self, weighter_uid: str) -> WeighterCopy:
        """All of a weighter for another log's `import_`, but for its entries (`read`) and update ids (`taken`).

        Raises:
            Internal: a profile is damaged.
        """

    @abc.abstractmethod
    def taken(self, weighter_uid: str) -> Iterator[TakenUpdate]:
        """Every update id that was used, in no particular order; one may come twice."""

    @abc.abstractmethod
    def import_(self, copy: WeighterCopy, entries: Iterable[LogEntry], taken: Iterable[TakenUpdate]) -> None:
        """Records a weighter as another log had it. It is there when all of it is, and not before.

        Args:
            copy: of another log's `export`.
            entries: those at positions `copy.trimmed` + 1 to `copy.head`, in order.
            taken: another log's `taken`.

        Raises:
            AlreadyExists: the name, the uid or the id of a job is taken.
        """

    @abc.abstractmethod
    def size_bytes(self) -> int:
        """What is in the log takes, in bytes: less once entries are trimmed or weighters deleted."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the storage; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
