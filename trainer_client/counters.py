"""What a job did, counted; and each kind of trouble logged once, so that a long run doesn't drown its own log."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from weighting_contract.errors import Internal, WeighbridgeError

logger = logging.getLogger("trainer_client")

FEW_CANDIDATES = "FEW_CANDIDATES"  # why a step is unselected where nothing failed: no more candidates than places


@dataclass(frozen=True)
class Counters:
    """A snapshot. updates_sent = updates_acknowledged + updates_refused + updates_dropped + those still pending."""

    scored: int = 0  # steps that got the weighter's weights
    fallback_steps: int = 0  # steps that got uniform weights
    fallbacks: dict[str, int] = field(default_factory=dict)  # the same by error code, e.g. {"UNAVAILABLE": 3}
    selected: int = 0  # steps whose batch was chosen from its candidates
    unselected: int = 0  # steps that took their first candidates as they came
    unselected_for: dict[str, int] = field(default_factory=dict)  # the same by error code, or FEW_CANDIDATES
    updates_sent: int = 0  # handed to meta_update
    updates_acknowledged: int = 0  # in the weighter's log
    updates_duplicate: int = 0  # of these, in the log before
    updates_resent: int = 0  # acknowledged before, lost by the service since, and in the weighter's log again
    updates_refused: int = 0  # turned down: wrong, or stale
    updates_dropped: int = 0  # given up: too many, too old, or not delivered by close
    score_seconds: float = 0.0  # that the caller spent in score, or waiting for the batch of a step to be selected
    ahead_seconds: float = 0.0  # that scoring ahead took in the background
    meta_seconds: float = 0.0  # that the caller spent in meta_update; delivery runs in the background

    @property
    def failed_steps(self) -> int:
        """Steps that went without the weighter because something went wrong."""
        return self.fallback_steps + self.unselected - self.unselected_for.get(FEW_CANDIDATES, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class Tally:
    """The counters while they grow. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._fallbacks: Counter[str] = Counter()
        self._unselected: Counter[str] = Counter()
        self._logged: set[str] = set()

    def add(self, counter: str, amount: float = 1) -> None:
        """Adds to the field of Counters that is called `counter`."""
        with self._lock:
            self._counts[counter] = self._counts.get(counter, 0) + amount

    def fallback(self, code: str) -> None:
        with self._lock:
            self._fallbacks[code] += 1

    def unselected(self, code: str) -> None:
        with self._lock:
            self._unselected[code] += 1

    def warn_once(self, kind: str, message: str, exc: WeighbridgeError | None = None) -> None:
        """Logs the first message of its kind; with a traceback where `exc` is a surprise in this process."""
        with self._lock:
            if kind in self._logged:
                return
            self._logged.add(kind)
        bug = exc.__cause__ if isinstance(exc, Internal) else None
        logger.warning("%s (further ones are counted, not logged)", message, exc_info=bug)

    def snapshot(self) -> Counters:
        with self._lock:
            counts: dict[str, Any] = dict(self._counts)
            return Counters(
                fallback_steps=self._fallbacks.total(),
                fallbacks=dict(self._fallbacks),
                unselected=self._unselected.total(),
                unselected_for=dict(self._unselected),
                **counts,
            )


def unexpected(what: str, exc: Exception) -> WeighbridgeError:
    """Arguments that nothing can be made of, mostly: still no reason to end a training run."""
    error = Internal(f"{what} failed in the client: {exc!r}")
    error.__cause__ = exc
    return error
