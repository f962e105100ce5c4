"""Wraps one call of a transport: counts, times, traces it, and turns what nobody expected into Internal with an id."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from weighting_contract.errors import Internal, WeighbridgeError
from weighting_service.logs import current_request_id
from weighting_service.metrics import Metrics
from weighting_service.tracing import TRACER

log = logging.getLogger(__name__)


@contextmanager
def call(metrics: Metrics, method: str) -> Iterator[None]:
    """Around the work of one call. WeighbridgeError passes; a bug becomes Internal, with its traceback in the log."""
    started = time.monotonic()
    code = "OK"
    try:
        with TRACER.span(method, "SERVER", request_id=current_request_id()):
            yield
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    except WeighbridgeError as exc:
        code = exc.code
        raise
    except Exception as exc:
        code = Internal.code
        error_id = current_request_id() or uuid.uuid4().hex
        log.exception("error %s in %s", error_id, method)
        raise Internal(f"the service failed on this call; its log has the details under {error_id}") from exc
    finally:
        metrics.requests.labels(method, code).inc()
        metrics.request_seconds.labels(method).observe(time.monotonic() - started)
