"""A job's way to the service: attaches the job, and again where the service forgot or closed it; keeps positions.

Every call of a job passes here: circuit breaker outside, transport inside. Knows no thread and no queue.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.breaker import CircuitBreaker, repeat
from trainer_client.transports.base import Transport
from weighting_contract.errors import (
    JOB_CLOSED,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WeighbridgeError,
)

logger = logging.getLogger(__name__)

LASTING_S = 10.0  # longer than any time that passing overload asks for


class Deadline:
    """A point in time that several steps of one call share."""

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        return max(0.0, self._at - time.monotonic())


class JobLink:
    """One job as its service knows it. Thread-safe.

    Args:
        transport: carries the calls.
        breaker: shared by the jobs of a client.
        opening: opens the job; its `job_id` is set, so opening again is no new job.
        creation: makes the weighter where it is missing; None: it must be there.
        upload: gives the service the job's reference where it is missing; None: it must be there.
    """

    def __init__(
        self,
        transport: Transport,
        breaker: CircuitBreaker,
        opening: pb.OpenJobRequest,
        creation: pb.CreateWeighterRequest | None,
        upload: pb.PutReferenceRequest | None = None,
    ) -> None:
        self.breaker = breaker
        self.attached = False
        self.failure: WeighbridgeError = Unavailable("the job has not reached the weighting service yet")
        self.position = 0  # of the weighter, as last heard
        self.last_step = -1  # highest step that the weighter was taught by this job, -1: none
        self.last_position = 0  # of the last own update in the weighter's log
        self._transport = transport
        self._opening = opening
        self._creation = creation
        self._upload = upload
        self._attaching = threading.Lock()
        self._positions = threading.Lock()

    @property
    def job_id(self) -> str:
        return self._opening.job_id

    @property
    def frozen(self) -> bool:
        return self._opening.role == pb.ROLE_FROZEN

    def check(self) -> None:
        """Raises at once what a call would fail with before it leaves."""
        self.breaker.check()
        if not self.attached:
            raise repeat(self.failure, f"the job is not attached: {self.failure.message}")

    @property
    def usable(self) -> bool:
        return self.attached and not self.breaker.is_open

    @property
    def away(self) -> bool:
        """Whether nothing can be delivered for now: the job is not attached, or the service did not answer."""
        return not self.attached or self.breaker.is_away

    def call(self, method: str, request: Message, timeout_s: float, *, trial: bool = False) -> Any:
        """The answer to a call of this job, within `timeout_s` all in all. Raises WeighbridgeError and nothing else."""
        deadline = Deadline(timeout_s)
        if not self.attached:
            self.check()
        try:
            return self._send(method, request, timeout_s, trial)
        except (NotFound, FailedPrecondition, Unauthenticated, PermissionDenied) as exc:
            if _lost(exc):
                self.attach(deadline.left_s())
                return self._send(method, request, deadline.left_s())
            # About a meta-update it says nothing of the job; elsewhere the job was reset, or the token is not enough.
            if method != "MetaUpdate" or isinstance(exc, Unauthenticated):
                self._detach(exc)
            raise

    def attach(self, timeout_s: float, *, trial: bool = False) -> None:
        """Makes weighter and reference where they are missing and opens the job; all of it is idempotent."""
        deadline = Deadline(timeout_s)
        if not self._attaching.acquire(timeout=timeout_s):
            raise DeadlineExceeded("the job was being attached already, and that did not end in time")
        try:
            if self._creation is not None:
                self._send("CreateWeighter", self._creation, deadline.left_s(), trial)
                trial = False  # it closed the breaker
            if self._upload is not None:
                self._send_reference(self._upload, deadline, trial)
                trial = False
            self._opened(self._send("OpenJob", self._opening, deadline.left_s(), trial))
        except WeighbridgeError as exc:
            self._detach(exc)
            raise
        finally:
            self._attaching.release()

    def _send_reference(self, upload: pb.PutReferenceRequest, deadline: Deadline, trial: bool) -> None:
        """It may be large, so only a service without one of its name gets it; OpenJob compares the checksums."""
        try:
            self._send("GetReference", pb.GetReferenceRequest(name=upload.name), deadline.left_s(), trial)
        except NotFound:
            self._send("PutReference", upload, deadline.left_s())

    def close(self, timeout_s: float) -> None:
        """Closes the job in the service, as far as that is there."""
        if not self.usable or timeout_s <= 0:
            return
        try:
            self._send("CloseJob", pb.CloseJobRequest(job_id=self.job_id), timeout_s)
        except WeighbridgeError as exc:
            logger.info("job %s could not be closed in the service: %s", self.job_id, exc.message)
        self.attached = False
        self.failure = FailedPrecondition("the job is closed")

    def restore(self, job_id: str, last_step: int, last_position: int) -> None:
        """Takes up another job; it is attached at the next `attach`."""
        with self._attaching:
            if job_id != self.job_id:
                self.attached = False
                self.failure = Unavailable("the restored job has not reached the weighting service yet")
                self._opening.job_id = job_id
        with self._positions:
            self.last_step, self.last_position = last_step, last_position

    def acknowledged(self, step: int, position: int) -> None:
        """An own update is in the weighter's log at `position`."""
        with self._positions:
            self.last_step = max(self.last_step, step)
            self.last_position = max(self.last_position, position)

    def heard(self, position: int) -> None:
        self.position = position

    def _opened(self, job: pb.Job) -> None:
        with self._positions:
            mine = max(self.last_position, job.last_position)
            self.last_position = min(mine, job.position)
            taught = job.last_step if job.last_position else -1
            self.last_step = max(self.last_step, taught) if mine <= job.position else taught
        if mine > job.position:
            logger.warning(
                "weighter %r is at position %d, but this job had taught it up to %d: it was made anew or restored from "
                "an older state; going on from there",
                self._opening.weighter,
                job.position,
                mine,
            )
        self.position = job.position
        self.attached = True

    def _detach(self, exc: WeighbridgeError) -> None:
        self.failure = exc
        self.attached = False

    def _send(self, method: str, request: Message, timeout_s: float, trial: bool = False) -> Any:
        def attempt() -> Any:
            if timeout_s <= 0:
                raise DeadlineExceeded(f"no time was left for {method}")
            try:
                return self._transport.call(method, request, timeout_s)
            except WeighbridgeError as exc:
                if method == "MetaUpdate" and lasting(exc):
                    return exc  # learning has no room; scoring may go on, so the breaker stays closed
                raise
            except Exception as exc:  # a bug in a transport must not end a training run
                raise Internal(f"{method} failed in the client: {exc!r}") from exc

        answer = self.breaker.call(attempt, trial=trial)
        if isinstance(answer, WeighbridgeError):
            raise answer
        return answer


def lasting(exc: WeighbridgeError) -> bool:
    """Whether the service wants to be left alone for so long that an update is given up (a full disk)."""
    return isinstance(exc, ResourceExhausted) and exc.retry_after_s > LASTING_S


def _lost(exc: WeighbridgeError) -> bool:
    """Whether the service has no such job (it was restored, or the weighter made anew) or closed it (it was idle)."""
    return isinstance(exc, NotFound) or exc.message.endswith(JOB_CLOSED)
