"""One Score call of a job: what has to hold before it leaves, which position it asks for, its answer in numpy.

Raises whatever goes wrong and counts nothing: what follows from a failure is the job's to say. Knows no threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import wire
from trainer_client.link import Deadline, JobLink
from trainer_client.sender import Sender
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import DeadlineExceeded, WeighbridgeError


@dataclass(frozen=True)
class Scores:
    """What `Job.score` answers for B samples; torch tensors on the inputs' device where these were torch tensors."""

    weights: Any  # [B] float32, mean 1
    position: int  # of the weighter that scored; on a fallback the last one known
    effective_sample_size: float  # (sum w)^2 / sum w^2, in samples
    fallback: bool  # uniform weights, as the weighter could not be asked
    logits: Any  # [B] float32, before trust, temperature and guard; on a fallback 0
    statistics: Any = None  # [B, F] float32, columns as in the weighter's spec; None: not asked for, or a fallback
    trust: float = 0.0  # the factor in [0, 1] that was on the logits; on a fallback 0
    computed_samples: int | None = None  # that the job's reference computed for this; None: not known, or a fallback

    @classmethod
    def uniform(cls, rows: int, position: int) -> Self:
        """A fallback, in numpy."""
        return cls(np.ones(rows, np.float32), position, float(rows), True, np.zeros(rows, np.float32))

    def like(self, batch: wire.Batch) -> Self:
        """The same, given as the inputs were."""
        weights, logits, statistics = map(batch.like, (self.weights, self.logits, self.statistics))
        return replace(self, weights=weights, logits=logits, statistics=statistics)


class Asking:
    """Asks for weights. Thread-safe."""

    def __init__(
        self, link: JobLink, sender: Sender, timeouts: Timeouts, limits: Limits, read_your_writes: bool
    ) -> None:
        self._link, self._sender, self._timeouts, self._limits = link, sender, timeouts, limits
        self._read_your_writes = read_your_writes
        self._patient_at = 0.0  # from when on a score waits for updates that are not acknowledged

    def request(
        self, batch: wire.Batch, step: int, min_effective_share: float | None, return_statistics: bool
    ) -> pb.ScoreRequest:
        """All of the request but the position; the inputs are read. Raises at once what a call would fail with."""
        try:
            self._link.check()
        except WeighbridgeError:
            self._sender.wake()  # another job may have opened the breaker: the thread looks for the service from now on
            raise
        return pb.ScoreRequest(
            job_id=self._link.job_id,
            step=step,
            inputs=batch.message(),
            min_effective_share=min_effective_share,
            return_statistics=return_statistics,
        )

    def send(self, batch: wire.Batch, request: pb.ScoreRequest, min_position: int | None) -> Scores:
        """The answer, within `Timeouts.score_s`.

        Args:
            batch: that the request was made of.
            min_position: None: that of the job's last update if it reads its own writes, else any.
        """
        deadline = Deadline(self._timeouts.score_s)
        try:
            request.min_position = self._own_position(deadline) if min_position is None else min_position
            response: pb.ScoreResponse = self._link.call("Score", request, deadline.left_s())
            answer = wire.read_scores(response, batch.rows() or 0)
        except WeighbridgeError:
            self._sender.wake()  # the breaker may have opened
            raise
        self._link.heard(response.position)
        return Scores(
            weights=answer.weights,
            position=response.position,
            effective_sample_size=response.effective_sample_size,
            fallback=False,
            logits=answer.logits,
            statistics=answer.statistics,
            trust=response.trust,
            computed_samples=answer.computed_samples,
        )

    def _own_position(self, deadline: Deadline) -> int:
        """Position of the last own update, once all that are outstanding have one."""
        if not self._read_your_writes:
            return 0
        # Who waited in vain waits again only after a while: a backlog costs no deadline a step. The breaker stays
        # closed, or the backlog would never be delivered.
        patient = time.monotonic() >= self._patient_at
        wait_s = deadline.left_s() if patient else 0.0
        if not self._sender.wait(wait_s, until=lambda: not self._link.usable):
            self._link.check()
            if patient:
                self._patient_at = time.monotonic() + self._limits.breaker_period_s
            raise DeadlineExceeded("earlier meta-updates of this job were not acknowledged in time")
        return self._link.last_position
