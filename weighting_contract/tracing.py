"""OpenTelemetry spans of either side, sent where an OTLP endpoint is set; where none is, nothing is imported or done.

A trace begins with a client's call, or with the span that the trainer has around it, and goes on in the service: the
call carries it in the header `traceparent` (W3C Trace Context). The SDK's other variables (OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) hold too. Knows no call and no side.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACEPARENT = "traceparent"  # the header or metadata that carries a trace

Kind = Literal["INTERNAL", "CLIENT", "SERVER"]

log = logging.getLogger(__name__)


class Tracer:
    """Makes the spans of one side. Looks at the environment when it is first used; safe to use from any thread.

    Args:
        service_name: what the spans are said to come from, unless OTEL_SERVICE_NAME says it.
    """

    def __init__(self, service_name: str) -> None:
        self._service_name = service_name
        self._looking = threading.Lock()
        self._looked = False
        self._spans: _Spans | None = None

    def span(self, name: str, kind: Kind = "INTERNAL", **attributes: str | int | float) -> AbstractContextManager[None]:
        """Around work of this context: a child of the span that is around already. An error that passes is noted."""
        spans = self._of_environment()
        return spans.around(name, kind, attributes) if spans else nullcontext()

    def begin(self, traceparent: str | None) -> None:
        """The work that begins in this context belongs to the trace of its caller; None: to none yet."""
        if spans := self._of_environment():
            spans.begin(traceparent)

    def headers(self) -> dict[str, str]:
        """What a call has to carry for its trace to go on, by name."""
        spans = self._of_environment()
        return spans.headers() if spans else {}

    def current(self) -> object | None:
        """Where this context is in its trace, for `record`; None without tracing."""
        spans = self._of_environment()
        return spans.current() if spans else None

    def record(
        self, parent: object | None, name: str, began_at: float, ended_at: float, **attributes: str | int | float
    ) -> None:
        """A span of work that is over, below `parent` (of `current`; None: nothing is recorded).

        Args:
            began_at, ended_at: by `time.monotonic`, seconds.
        """
        if parent is not None and (spans := self._of_environment()):
            spans.record(parent, name, began_at, ended_at, attributes)

    def shutdown(self) -> None:
        """Sends what is left, as the end of a process does; after it the environment is looked at anew."""
        with self._looking:
            spans, self._spans, self._looked = self._spans, None, False
        if spans:
            spans.shutdown()

    def _of_environment(self) -> _Spans | None:
        if not self._looked:
            with self._looking:
                if not self._looked:
                    self._spans = _spans(self._service_name)
                    self._looked = True
        return self._spans


def _spans(service_name: str) -> _Spans | None:
    variable = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if variable is None:
        return None
    try:
        return _Spans(os.environ.get("OTEL_SERVICE_NAME") or service_name)
    except ImportError as exc:
        log.warning("%s is set, but there are no traces: %s; pip install 'weighbridge[otel]'", variable, exc)
    except Exception as exc:  # a mistake in the SDK's variables must not stop a trainer or a service
        log.warning("%s is set, but there are no traces: %s", variable, exc)
    return None


class _Spans:
    """The part that needs the SDK."""

    def __init__(self, service_name: str) -> None:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._context, self._trace = context, trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("weighbridge")

    @contextmanager
    def around(self, name: str, kind: Kind, attributes: Mapping[str, str | int | float]) -> Iterator[None]:
        before = self._context.get_current()
        span = self._tracer.start_span(name, kind=self._trace.SpanKind[kind], attributes=dict(attributes))
        self._context.attach(self._trace.set_span_in_context(span))
        try:
            yield
        except BaseException as exc:
            span.set_attribute("error.type", str(getattr(exc, "code", type(exc).__name__)))
            span.set_status(self._trace.StatusCode.ERROR)
            raise
        finally:
            # Not `detach`: the generator of a stream may be closed in another context, which is an error to it.
            self._context.attach(before)
            span.end()

    def begin(self, traceparent: str | None) -> None:
        carrier = {TRACEPARENT: traceparent} if traceparent else {}
        self._context.attach(self._propagator.extract(carrier, context=self._context.Context()))

    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def current(self) -> object:
        return self._context.get_current()

    def record(
        self,
        parent: Any,
        name: str,
        began_at: float,
        ended_at: float,
        attributes: Mapping[str, str | int | float],
    ) -> None:
        unix, monotonic = time.time(), time.monotonic()
        began_ns, ended_ns = (int((unix - monotonic + at) * 1e9) for at in (began_at, ended_at))
        span = self._tracer.start_span(name, context=parent, start_time=began_ns, attributes=dict(attributes))
        span.end(ended_ns)

    def shutdown(self) -> None:
        self._provider.shutdown()
