"""The interface of update logs: weighters, their jobs, and the ordered meta-updates that taught them.

Knows nothing of the model or of the transports. Every implementation passes `tests/contract/test_update_log.py`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from weighting_service.domain import JobRecord, MetaUpdate, WeighterRecord


@dataclass(frozen=True)
class Appended:
    """Where an update is in the log; `duplicate` says that it was there before this call."""

    position: int
    duplicate: bool


class UpdateLog(abc.ABC):
    """Synchronous and safe to call from any thread. What a method has recorded is durable when it returns.

    Positions of a weighter are 1, 2, 3, ... without gaps. An update is recorded exactly once by (job, update id), for
    as long as its weighter exists: trimming an entry forgets its content, not that it was taken.

    All methods raise, beside what they list:
        NotFound: a weighter uid that the log doesn't hold (where nothing else is said).
        Unavailable: the log is closed, or its storage failed; the same call may be tried again.
        ResourceExhausted: the storage is full.
        FailedPrecondition: the storage is damaged.
    """

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
        """The weighter's jobs, oldest first."""

    @abc.abstractmethod
    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        """Gives `update` the next position, or finds the position that it has. Durable when it returns.

        Raises:
            AlreadyExists: the job has used this update id for an update of another digest.
            NotFound: no such weighter, or it has no job of the update's job id.
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
    def read(self, weighter_uid: str, after: int, limit: int) -> list[tuple[int, MetaUpdate]]:
        """Up to `limit` entries from position `after` + 1 on, in order and without gaps; empty at the head.

        Raises:
            FailedPrecondition: some of these entries are trimmed, or `after` is beyond the head (a state from another
                history than this log's).
            Internal: an entry is damaged or missing; the message names weighter and position.
        """

    @abc.abstractmethod
    def last_taught(self, job_id: str) -> tuple[int, int]:
        """(step, position) of the job's update of the highest step, trimmed or not; (-1, 0) where it has none."""

    @abc.abstractmethod
    def trim(self, weighter_uid: str, up_to: int) -> None:
        """Drops the entries at positions <= `up_to` (at most up to the head); later positions don't move."""

    @abc.abstractmethod
    def size_bytes(self) -> int:
        """What the log occupies, in bytes; space of trimmed entries is used again before it grows."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the storage; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
