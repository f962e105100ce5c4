"""A job's way to the service: attaches the job, and again where the service forgot or closed it; keeps positions.

Every call of a job passes here: circuit breaker outside, transport inside. Knows no thread and no queue.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Literal

from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.breaker import CircuitBreaker, repeat
from trainer_client.transports.base import Transport
from weighting_contract.errors import (
    JOB_CLOSED,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WeighbridgeError,
)

logger = logging.getLogger(__name__)

OlderService = Literal["resend", "continue", "stop"]

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
        on_older_service: what to do where the service has lost updates that it had acknowledged.

    Attributes:
        rewinds: how often the service was found to be older than what it had acknowledged.
        stopped: why the job has nothing to do with its weighter any more; None: it has.
        answered_at: when the service answered last, of `time.monotonic`.
    """

    def __init__(
        self,
        transport: Transport,
        breaker: CircuitBreaker,
        opening: pb.OpenJobRequest,
        creation: pb.CreateWeighterRequest | None,
        upload: pb.PutReferenceRequest | None = None,
        on_older_service: OlderService = "resend",
    ) -> None:
        self.breaker = breaker
        self.rewinds = 0
        self.stopped: FailedPrecondition | None = None
        self.attached = False
        self.failure: WeighbridgeError = Unavailable("the job has not reached the weighting service yet")
        self.position = 0  # of the weighter, as last heard
        self.last_step = -1  # highest step that the weighter was taught by this job, -1: none
        self.last_position = 0  # of the last own update in the weighter's log
        self._transport = transport
        self._opening = opening
        self._creation = creation
        self._upload = upload
        self._on_older_service = on_older_service
        self.answered_at = time.monotonic()
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
                if not self._attach_again(method, request, deadline):
                    raise _older(method) from exc
                return self._send(method, request, deadline.left_s())
            if method == "MetaUpdate" and isinstance(exc, FailedPrecondition):
                # A position that is ahead of the log is refused: the first word of a service that was restored.
                if not self._attach_again(method, request, deadline):
                    raise _older(method) from exc
                raise
            # About a meta-update it says nothing of the job; elsewhere the job was reset, or the token is not enough.
            if method != "MetaUpdate" or isinstance(exc, Unauthenticated):
                self._detach(exc)
            raise

    def attach(self, timeout_s: float, *, trial: bool = False) -> None:
        """Makes weighter and reference where they are missing and opens the job; all of it is idempotent."""
        deadline = Deadline(timeout_s)
        self.check_not_stopped()
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

    def check_not_stopped(self) -> None:
        """Raises FailedPrecondition where it has."""
        if self.stopped is not None:
            raise FailedPrecondition("the job has stopped, as its service is older than what it had acknowledged")

    def _attach_again(self, method: str, request: Any, deadline: Deadline) -> bool:
        """Attaches the job; whether `request` may be sent then: no update, where others may have to go before it."""
        rewinds = self.rewinds
        self.attach(deadline.left_s())
        if self.rewinds == rewinds:
            return True
        if method == "Score":
            request.min_position = min(request.min_position, self.last_position)
        return method != "MetaUpdate"

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
            self.stopped = None
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
        taught = job.last_step if job.last_position else -1
        with self._positions:
            step, position = self.last_step, self.last_position
            older = taught < step or job.position < position
            if not older:
                self.last_step, self.last_position = taught, max(position, job.last_position)
            elif self._on_older_service != "stop":
                self.last_step, self.last_position = taught, job.last_position
        if older:
            self._rewind(
                f"weighter {self._opening.weighter!r} is at position {job.position} and knows this job's updates up to "
                f"step {taught}, but had acknowledged them up to step {step}, position {position}: it was made anew or "
                "restored from an older state",
            )
        self.position = job.position
        self.attached = True

    def _rewind(self, finding: str) -> None:
        """What `on_older_service` says. Raises FailedPrecondition where that is to stop."""
        if self._on_older_service == "stop":
            self.stopped = FailedPrecondition(
                f"{finding}; the job has stopped, as on_older_service is 'stop': restore a newer state of the service, "
                "go on from a checkpoint of that time, or choose 'resend' or 'continue'"
            )
            logger.warning("%s", self.stopped.message)
            raise self.stopped
        if self._on_older_service == "resend":
            logger.warning("%s; what is kept of the later ones is sent again", finding)
        else:
            logger.warning("%s; going on from there", finding)
        self.rewinds += 1

    def _detach(self, exc: WeighbridgeError) -> None:
        self.failure = exc
        self.attached = False

    def _send(self, method: str, request: Message, timeout_s: float, trial: bool = False) -> Any:
        def attempt() -> Any:
            if timeout_s <= 0:
                raise DeadlineExceeded(f"no time was left for {method}")
            try:
                answer = self._transport.call(method, request, timeout_s)
            except (Unavailable, DeadlineExceeded):
                raise
            except WeighbridgeError as exc:
                self.answered_at = time.monotonic()
                if method == "MetaUpdate" and lasting(exc):
                    return exc  # learning has no room; scoring may go on, so the breaker stays closed
                raise
            except Exception as exc:  # a bug in a transport must not end a training run
                self.answered_at = time.monotonic()
                raise Internal(f"{method} failed in the client: {exc!r}") from exc
            self.answered_at = time.monotonic()
            return answer

        answer = self.breaker.call(attempt, trial=trial)
        if isinstance(answer, WeighbridgeError):
            raise answer
        return answer


def lasting(exc: WeighbridgeError) -> bool:
    """Whether the service wants to be left alone for so long that an update is given up (a full disk)."""
    return isinstance(exc, ResourceExhausted) and exc.retry_after_s > LASTING_S


def _older(method: str) -> Unavailable:
    return Unavailable(f"{method} waits: the service is older than what it had acknowledged; what it lost goes first")


def _lost(exc: WeighbridgeError) -> bool:
    """Whether the service has no such job (it was restored, or the weighter made anew) or closed it (it was idle)."""
    return isinstance(exc, NotFound) or exc.message.endswith(JOB_CLOSED)


def checked_state(state: Any) -> tuple[str, int, int]:
    """job_id, last_step and last_position of a checkpoint. Raises InvalidArgument where one of them is missing."""
    kinds = {"job_id": str, "last_step": int, "last_position": int}
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise InvalidArgument(
                f"state must be what Job.state_dict returned, with {key} of type {kind.__name__}; got {state!r}"
            )
    return state["job_id"], state["last_step"], state["last_position"]
