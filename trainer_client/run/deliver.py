"""Seeing to it that a job's meta-updates are in the weighter's log. Knows jobs only."""

from __future__ import annotations

import time

from trainer_client.job import Job

_PATIENCE_S = 10.0
_POLL_S = 0.1


def deliver(job: Job, timeout_s: float = _PATIENCE_S) -> None:
    """Waits until the meta-updates so far are delivered, but not for a service that is away, or goes away meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not job.away and time.monotonic() < deadline:
        if job.flush(_POLL_S):
            return
