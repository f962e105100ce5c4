"""Wraps one call of a transport: counts, times, traces it, and turns what nobody expected into Internal with an id.

The use cases say here which class of job a call is of; only the metrics ask for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from weighting_contract.errors import Internal, WeighbridgeError
from weighting_service.domain import Role
from weighting_service.logs import current_request_id
from weighting_service.metrics import Metrics
from weighting_service.tracing import TRACER

log = logging.getLogger(__name__)

NO_JOB = "none"  # class of the calls that are of no job, or of one that is not known


@dataclass
class _UnderWay:
    job_class: str = NO_JOB


_under_way: ContextVar[_UnderWay | None] = ContextVar("call under way", default=None)


def is_of_job(role: Role) -> None:
    """The call under way in this context is one of a job of that role; the first who says so is right."""
    this = _under_way.get()
    if this and this.job_class == NO_JOB:
        this.job_class = role.value


@contextmanager
def call(metrics: Metrics, method: str) -> Iterator[None]:
    """Around the work of one call. WeighbridgeError passes; a bug becomes Internal, with its traceback in the log."""
    started = time.monotonic()
    code, this = "OK", _UnderWay()
    _under_way.set(this)
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
        metrics.requests.labels(method, code, this.job_class).inc()
        metrics.request_seconds.labels(method).observe(time.monotonic() - started)
