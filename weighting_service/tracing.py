"""The service's spans: one a call, and below it the log append, the wait for the device and the forward pass.

Knows times and traces; no transport, no model, no log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from weighting_contract.tracing import Tracer

TRACER = Tracer("weighbridge-service")


def record_pass(calls: Iterable[tuple[object | None, float]], began_at: float, samples: int, tokens: int) -> None:
    """Spans for every call of a pass that has just ended: what it waited, and the pass that it shared.

    Args:
        calls: where each is in its trace, and when it was queued; times are by `time.monotonic`.
        samples, tokens: of the whole pass.
    """
    ended_at = time.monotonic()
    for trace, queued_at in calls:
        TRACER.record(trace, "queue", queued_at, began_at)
        TRACER.record(trace, "forward pass", began_at, ended_at, samples=samples, tokens=tokens)
