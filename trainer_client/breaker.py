"""Circuit breaker: a service that is away costs one deadline, not one per step. Knows no transport and no job."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from weighting_contract.errors import DeadlineExceeded, ResourceExhausted, Unavailable, WeighbridgeError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

TRIAL_POLL_S = 0.1  # how soon to look again while somebody else's trial is under way


class CircuitBreaker:
    """Lets calls through until one finds the service away; then answers for it, until a trial call gets through.

    Closed: calls go out. A call that ends in Unavailable or DeadlineExceeded opens it for a period (jittered, doubling
    up to a cap); ResourceExhausted opens it for the time that the service asked for, or a little longer. Open: calls
    fail at once with the kind of error that opened it. Once the period is over, one trial call at a time may go out: it
    is made by a background thread (`trial=True`), so the training loop never pays for it. Its success closes the
    breaker.

    A failure soon after closing carries on with the doubled period: a service that answers trials but hangs on real
    calls is left alone for longer and longer too. Thread-safe; shared by the jobs of a client.
    """

    def __init__(self, period_s: float, max_period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff = Backoff(period_s, max_period_s)
        self._max_period_s = max_period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._error: WeighbridgeError | None = None  # what opened it; None: closed
        self._open_until = 0.0
        self._period_s = 0.0  # the last one
        self._closed_at = clock()
        self._trial_under_way = False

    def call(self, attempt: Callable[[], Answer], *, trial: bool = False) -> Answer:
        """The answer of `attempt`, or its error; while open, an error of the kind that opened the breaker, at once."""
        is_trial = self._admit(trial)
        try:
            answer = attempt()
        except (Unavailable, DeadlineExceeded, ResourceExhausted) as exc:
            self._failed(exc, is_trial)
            raise
        except WeighbridgeError:
            self._answered(is_trial)
            raise
        except BaseException:  # an interrupt says nothing about the service
            with self._lock:
                self._trial_under_way = self._trial_under_way and not is_trial
            raise
        self._answered(is_trial)
        return answer

    def check(self) -> None:
        """Raises what `call` would raise at once."""
        self._admit(trial=False)

    @property
    def is_open(self) -> bool:
        return self._error is not None

    @property
    def is_away(self) -> bool:
        """Whether it is open because the service did not answer: one that is overloaded did."""
        return self._error is not None and not isinstance(self._error, ResourceExhausted)

    def trial_in_s(self) -> float | None:
        """Seconds until a trial call may go out; None while closed."""
        with self._lock:
            if self._error is None:
                return None
            wait_s = max(0.0, self._open_until - self._clock())
            return max(wait_s, TRIAL_POLL_S) if self._trial_under_way else wait_s

    def _admit(self, trial: bool) -> bool:
        with self._lock:
            if self._error is None:
                return False
            wait_s = self._open_until - self._clock()
            if trial and wait_s <= 0 and not self._trial_under_way:
                self._trial_under_way = True
                return True
            raise repeat(self._error, f"not called, as the last call failed: {self._error.message}")

    def _failed(self, error: WeighbridgeError, is_trial: bool) -> None:
        with self._lock:
            if self._error is not None and not is_trial:
                return  # a call from before it opened; its failure is no news
            now = self._clock()
            self._trial_under_way = False
            if isinstance(error, ResourceExhausted):
                asked_s = min(max(error.retry_after_s, 0.0), self._max_period_s)
                self._open_until = now + asked_s * random.uniform(1.0, 1.2)  # not all that were refused in one instant
            else:
                if not is_trial and now - self._closed_at > self._period_s:
                    self._backoff.reset()
                self._period_s = self._backoff.next_s()
                self._open_until = now + self._period_s
            self._error = error

    def _answered(self, is_trial: bool) -> None:
        if not is_trial:
            return
        with self._lock:
            self._trial_under_way = False
            self._error = None
            self._closed_at = self._clock()
        logger.info("the weighting service answers again")


class Backoff:
    """Waiting times that double from `initial_s` up to `cap_s`; jittered, so that clients don't move in step."""

    def __init__(self, initial_s: float, cap_s: float, jitter: float = 0.2) -> None:
        self._initial_s = initial_s
        self._cap_s = cap_s
        self._jitter = jitter
        self._base_s = initial_s

    def next_s(self) -> float:
        base_s, self._base_s = self._base_s, min(self._base_s * 2, self._cap_s)
        return jittered(base_s, self._jitter)

    def reset(self) -> None:
        self._base_s = self._initial_s


def jittered(mean_s: float, jitter: float = 0.2) -> float:
    """A time drawn evenly from mean_s * (1 - jitter) to mean_s * (1 + jitter)."""
    return mean_s * (1 + jitter * (2 * random.random() - 1))


def repeat(error: WeighbridgeError, message: str) -> WeighbridgeError:
    """A new error of the same kind, so that an old traceback is not dragged along."""
    if isinstance(error, ResourceExhausted):
        return ResourceExhausted(message, error.retry_after_s)
    return type(error)(message)
