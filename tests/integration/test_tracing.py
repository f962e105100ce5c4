"""OpenTelemetry: one trace from the client's call to the forward pass and the log, at a real OTLP collector."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from protos.weighting.v1 import weighting_pb2 as pb
from tests.conftest import Address, ServiceThread
from trainer_client import tracing as client_tracing
from trainer_client.transports import open_transport
from weighting_contract.errors import NotFound
from weighting_contract.tensors import to_message
from weighting_contract.tracing import ENDPOINTS, Tracer
from weighting_service import tracing as service_tracing

TRACERS = (client_tracing.TRACER, service_tracing.TRACER)
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
BATCH = pb.Inputs(features=to_message(np.ones((4, 1), np.float32)))


class Collector:
    """Takes OTLP over HTTP, as an OpenTelemetry collector does, and keeps the spans."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any]] = []  # with the name of the service
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector._receive(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def spans(self) -> list[tuple[str, Any]]:
        """What was sent, once both sides have sent all."""
        for tracer in TRACERS:
            tracer.shutdown()
        return self._spans

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _receive(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            self._spans += [(names["service.name"], span) for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with closing(Collector()) as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        for tracer in TRACERS:
            tracer.shutdown()  # they look at the environment anew
        yield running
        monkeypatch.undo()
        for tracer in TRACERS:
            tracer.shutdown()


@pytest.fixture
def traced(collector: Collector, tmp_path: Path) -> Iterator[Address]:
    running = ServiceThread(tmp_path / "state")
    yield running.address
    running.stop()


def score_and_teach(url: str) -> None:
    """A weighter is made, scores once and is taught once."""
    spec = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss"]))
    update = pb.MetaUpdateRequest(job_id="job", inputs=BATCH, cotangent=to_message(np.arange(4, dtype=np.float32)))
    with closing(open_transport(url)) as transport:
        transport.call("CreateWeighter", pb.CreateWeighterRequest(name="w", spec=spec), 30)
        transport.call("OpenJob", pb.OpenJobRequest(weighter="w", job_id="job"), 30)
        transport.call("Score", pb.ScoreRequest(job_id="job", inputs=BATCH), 30)
        transport.call("MetaUpdate", update, 30)


def check_trace(spans: list[tuple[str, Any]], method: str, below: set[str]) -> None:
    """A client's call, the service's below it, and what that did below that: each within its parent, of one trace."""
    (call,) = [s for service, s in spans if (service, s.name) == ("weighbridge-client", method)]
    trace = [(service, s) for service, s in spans if s.trace_id == call.trace_id]
    (served,) = [s for service, s in trace if (service, s.name) == ("weighbridge-service", method)]
    work = [s for service, s in trace if service == "weighbridge-service" and s.parent_span_id == served.span_id]
    assert call.kind == call.SPAN_KIND_CLIENT
    assert served.kind == served.SPAN_KIND_SERVER
    assert call.parent_span_id == b""
    assert served.parent_span_id == call.span_id
    assert {s.name for s in work} == below
    assert len(trace) == 2 + len(below)
    assert all(s.start_time_unix_nano <= s.end_time_unix_nano for _, s in trace)
    assert served.start_time_unix_nano >= call.start_time_unix_nano
    assert min(s.start_time_unix_nano for s in work) >= served.start_time_unix_nano - 1_000_000  # two clocks


@pytest.mark.parametrize("kind", ["grpc", "rest", "embedded"])
def test_one_trace_from_the_client_to_the_engine_and_the_log(collector: Collector, kind: str, tmp_path: Path) -> None:
    if kind == "embedded":
        score_and_teach("embedded")
    else:
        running = ServiceThread(tmp_path / "state")
        score_and_teach(running.address.grpc_url if kind == "grpc" else running.address.rest_url)
        running.stop()
    spans = collector.spans()
    check_trace(spans, "Score", {"queue", "forward pass"})
    check_trace(spans, "MetaUpdate", {"log append"})
    waited, passed = (next(s for _, s in spans if s.name == name) for name in ("queue", "forward pass"))
    assert waited.end_time_unix_nano == pytest.approx(passed.start_time_unix_nano, abs=1_000_000)
    assert {a.key: a.value.int_value for a in passed.attributes} == {"samples": 4, "tokens": 0}


def test_a_trace_that_the_caller_began_goes_on(collector: Collector, traced: Address) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "x-request-id": "mine"}
    with httpx.Client(base_url=traced.rest_url) as rest:
        rest.get("/v1/weighters", headers=headers)
        rest.get("/v1/weighters", headers={"traceparent": "nonsense"})
    first, second = (span for _, span in collector.spans() if span.name == "ListWeighters")
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert {a.key: a.value.string_value for a in first.attributes} == {"request_id": "mine"}
    assert second.trace_id != first.trace_id
    assert second.parent_span_id == b""


def test_an_error_is_in_the_spans_of_both_sides(collector: Collector, traced: Address) -> None:
    with closing(open_transport(traced.grpc_url)) as transport, pytest.raises(NotFound):
        transport.call("GetWeighter", pb.GetWeighterRequest(name="nobody"), 30)
    spans = [span for _, span in collector.spans()]
    assert len(spans) == 2
    for span in spans:
        assert "NOT_FOUND" in {a.value.string_value for a in span.attributes if a.key == "error.type"}
        assert span.status.code == span.status.STATUS_CODE_ERROR


def test_without_an_endpoint_nothing_is_imported() -> None:
    program = (
        "import sys\n"
        "from weighting_contract.tracing import Tracer\n"
        "tracer = Tracer('quiet')\n"
        "with tracer.span('work'):\n"
        "    print(tracer.headers(), tracer.current(), any(m.startswith('opentelemetry') for m in sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={}, timeout=60)
    assert (run.stdout, run.stderr) == ("{} None False\n", "")


@pytest.mark.parametrize("variable", ENDPOINTS)
def test_a_missing_sdk_is_said_once_and_stops_nothing(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    tracer = Tracer("without")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with tracer.span("work"):
                assert tracer.headers() == {}
    (said,) = caplog.messages
    assert variable in said
    assert "pip install 'weighbridge[otel]'" in said
