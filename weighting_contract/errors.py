"""The error tree that service and clients share; each transport maps it once, at its edge.

    WeighbridgeError
    +-- InvalidArgument       the request itself is wrong: which field, what was given, what is expected
    +-- Unauthenticated       no token, or one that is wrong or expired
    +-- PermissionDenied      a good token without the role for this
    +-- NotFound              no such weighter or job, or none that the caller may see
    +-- AlreadyExists         the name or update id is taken by something else
    +-- FailedPrecondition    right request, wrong moment: job closed, weights too stale
    +-- ResourceExhausted     overload or a limit; `retry_after_s` says how long to wait
    +-- Unavailable           service not reachable, not ready, or draining
    +-- DeadlineExceeded      no answer in time
    +-- Internal              our fault; the message carries an id that the service's log has too

Messages are sentences for people.
"""

from __future__ import annotations

from typing import Self


class WeighbridgeError(Exception):
    """Base of all errors; `code` is the gRPC status name, `http_status` its REST counterpart."""

    code = "UNKNOWN"
    http_status = 500
    reason = ""  # a word for the service's metrics where the code says too little; never sent

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def because(self, reason: str) -> Self:
        """Itself, with its reason set."""
        self.reason = reason
        return self


class InvalidArgument(WeighbridgeError):
    code = "INVALID_ARGUMENT"
    http_status = 400


class Unauthenticated(WeighbridgeError):
    code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(WeighbridgeError):
    code = "PERMISSION_DENIED"
    http_status = 403


class NotFound(WeighbridgeError):
    code = "NOT_FOUND"
    http_status = 404


class AlreadyExists(WeighbridgeError):
    code = "ALREADY_EXISTS"
    http_status = 409


class FailedPrecondition(WeighbridgeError):
    code = "FAILED_PRECONDITION"
    http_status = 412


class ResourceExhausted(WeighbridgeError):
    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(WeighbridgeError):
    code = "UNAVAILABLE"
    http_status = 503


class DeadlineExceeded(WeighbridgeError):
    code = "DEADLINE_EXCEEDED"
    http_status = 504


class Internal(WeighbridgeError):
    code = "INTERNAL"
    http_status = 500


BY_CODE: dict[str, type[WeighbridgeError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Internal,
    )
}

JOB_CLOSED = "is closed; open it again to go on"  # ends the message of a FailedPrecondition that a client heals itself
