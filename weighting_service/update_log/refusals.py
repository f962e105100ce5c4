"""What all logs refuse, in the same words."""

from __future__ import annotations

from weighting_contract.errors import AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound
from weighting_service.domain import MetaUpdate
from weighting_service.update_log.base import Trimmed


def no_weighter(uid: str) -> NotFound:
    return NotFound(f"the update log has no weighter of uid {uid!r}; it was never created, or it was deleted")


def weighter_taken(column: str, value: str) -> AlreadyExists:
    """`column` is name or uid."""
    return AlreadyExists(
        f"a weighter of {column} {value!r} exists already; choose another {column}, or delete it first"
    )


def no_job(job_id: str) -> NotFound:
    return NotFound(f"the weighter has no job {job_id!r}; open the job before it teaches")


def job_of_another_weighter(job_id: str) -> AlreadyExists:
    return AlreadyExists(f"job {job_id!r} belongs to another weighter; choose another job id")


def taken_otherwise(update: MetaUpdate, position: int) -> AlreadyExists:
    """The update's id was used for other content."""
    return AlreadyExists(
        f"update {update.update_id!r} of job {update.job_id!r} was taken at position {position} with other content; "
        "a retry must send the same content, another update needs another update_id"
    )


def unexpected_head(name: str, head: int, expected_head: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"the log of weighter {name!r} ends at position {head}, not at the expected {expected_head}: it went on "
        "meanwhile; look at its state again and repeat the rollback if it is still wanted"
    )


def check_range(after: int, limit: int) -> None:
    """Raises InvalidArgument for a range that no log can have."""
    if after < 0 or limit < 1:
        raise InvalidArgument(f"read needs after >= 0 and limit >= 1, got after {after} and limit {limit}")


def other_history(name: str, after: int, head: int) -> FailedPrecondition:
    """The reader is at a position, or has a chain there, that this log doesn't know."""
    found = f"ends at position {head}" if after > head else f"has another history up to position {after}"
    return FailedPrecondition(
        f"the log of weighter {name!r} {found}, but entries after {after} were asked for: that state comes from "
        "another history (an older copy of the log was put back, or the log lost its end?)"
    )


def entries_trimmed(name: str, after: int, trimmed: int) -> Trimmed:
    return Trimmed(
        f"entries 1 to {trimmed} of weighter {name!r} are trimmed, but those after {after} were asked for; start from "
        f"a snapshot at position {trimmed} or later"
    )


def entry_missing(name: str, uid: str, position: int, where: str) -> Internal:
    return Internal(f"entry {position} of weighter {name!r} ({uid}) is missing from {where}")
