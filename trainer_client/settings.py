"""Time and size limits of a client, as value objects. Knows no transport."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from weighting_contract.errors import InvalidArgument


@dataclass(frozen=True)
class Timeouts:
    """Longest that a call may take, in seconds. All of them are finite: there is no call without a deadline.

    Args:
        score_s: what one `Job.score` may cost the training loop, waiting for its own updates included.
        meta_update_s: one attempt to deliver a meta-update; spent in the background.
        admin_s: calls on `Client`, and attaching a job.
        close_s: what `Job.close` may spend on updates that are not delivered yet.

    Raises:
        InvalidArgument: a value that is not a finite number above 0.
    """

    score_s: float = 1.0
    meta_update_s: float = 5.0
    admin_s: float = 10.0
    close_s: float = 5.0

    def __post_init__(self) -> None:
        _check_positive(self)

    @classmethod
    def embedded(cls) -> Timeouts:
        """Defaults of a service in this process: it can't be away, so waiting beats giving up."""
        return cls(score_s=60.0, meta_update_s=60.0, admin_s=120.0, close_s=60.0)


@dataclass(frozen=True)
class Limits:
    """What a job keeps and how patient it is with a service that is away.

    Args:
        pending_updates: meta-updates kept for delivery; when there is one more, the oldest is dropped.
        update_age_s: a meta-update that could not be delivered for this long is dropped.
        kept_updates: acknowledged meta-updates kept to be sent again to a service that was restored from an older
            state, and part of `Job.state_dict`; of 4 MiB at most in all. 0: none.
        heartbeat_s: mean time between heartbeats.
        breaker_period_s: how long the service is left alone after it was away or didn't answer in time ...
        breaker_max_period_s: ... doubling at each further failure up to this.

    Raises:
        InvalidArgument: a value that is not a finite number above 0, or of kept_updates from 0.
    """

    pending_updates: int = 32
    update_age_s: float = 120.0
    kept_updates: int = 64
    heartbeat_s: float = 15.0
    breaker_period_s: float = 5.0
    breaker_max_period_s: float = 60.0

    def __post_init__(self) -> None:
        _check_positive(self)
        for name in ("pending_updates", "kept_updates"):
            if not isinstance(getattr(self, name), int):
                raise InvalidArgument(f"Limits.{name} is {getattr(self, name)!r}, expected a whole number")
        if self.breaker_max_period_s < self.breaker_period_s:
            raise InvalidArgument(
                f"Limits.breaker_max_period_s is {self.breaker_max_period_s}, "
                f"expected at least breaker_period_s ({self.breaker_period_s})"
            )


def _check_positive(settings: Timeouts | Limits) -> None:
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        may_be_none = setting.name == "kept_updates"
        if not (number and math.isfinite(value) and (value > 0 or (may_be_none and value == 0))):
            least = "from 0" if may_be_none else "above 0"
            raise InvalidArgument(
                f"{type(settings).__name__}.{setting.name} is {value!r}, expected a finite number {least}"
            )
