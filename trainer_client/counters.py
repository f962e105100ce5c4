"""What a job did, counted; and each kind of trouble logged once, so that a long run doesn't drown its own log."""

from __future__ import annotations

import dataclasses
import logging
import threading
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("trainer_client")


@dataclass(frozen=True)
class Counters:
    """A snapshot. updates_sent = updates_acknowledged + updates_refused + updates_dropped + those still pending."""

    scored: int = 0  # steps that got the weighter's weights
    fallback_steps: int = 0  # steps that got uniform weights
    fallbacks: dict[str, int] = field(default_factory=dict)  # the same by error code, e.g. {"UNAVAILABLE": 3}
    updates_sent: int = 0  # handed to meta_update
    updates_acknowledged: int = 0  # in the weighter's log
    updates_duplicate: int = 0  # of these, in the log before
    updates_refused: int = 0  # turned down: wrong, or stale
    updates_dropped: int = 0  # given up: too many, too old, or not delivered by close
    score_seconds: float = 0.0  # that the caller spent in score
    meta_seconds: float = 0.0  # that the caller spent in meta_update; delivery runs in the background

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class Tally:
    """The counters while they grow. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._fallbacks: dict[str, int] = {}
        self._logged: set[str] = set()

    def add(self, counter: str, amount: float = 1) -> None:
        """Adds to the field of Counters that is called `counter`."""
        with self._lock:
            self._counts[counter] = self._counts.get(counter, 0) + amount

    def fallback(self, code: str) -> None:
        self.add("fallback_steps")
        with self._lock:
            self._fallbacks[code] = self._fallbacks.get(code, 0) + 1

    def warn_once(self, kind: str, message: str, exc: BaseException | None = None) -> None:
        """Logs the first message of its kind; `exc` adds its traceback."""
        with self._lock:
            if kind in self._logged:
                return
            self._logged.add(kind)
        logger.warning("%s (further ones are counted, not logged)", message, exc_info=exc)

    def snapshot(self) -> Counters:
        with self._lock:
            counts: dict[str, Any] = dict(self._counts)
            return Counters(fallbacks=dict(self._fallbacks), **counts)
