"""A real gRPC server with a scripted service behind it: counts what it is asked, and fails as a test tells it to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceServicer, add_WeightingServiceServicer_to_server
from trainer_client import Limits, Timeouts
from weighting_contract.tensors import from_message, to_message

Fault = Callable[[Any, grpc.ServicerContext], None]

FEATURES = np.array([[1.0, 5.0], [3.0, 6.0]], np.float32)
WEIGHTS = [0.5, 1.5]  # what the service makes of FEATURES
COTANGENT = np.array([0.1, -0.1], np.float32)

PATIENT = Timeouts(score_s=20, meta_update_s=20, admin_s=20, close_s=20)
SHORT = Timeouts(score_s=0.3, meta_update_s=0.3, admin_s=20, close_s=0.3)
NO_TRIALS = Limits(breaker_period_s=1000, breaker_max_period_s=1000, heartbeat_s=1000)


def abort(code: grpc.StatusCode, message: str, **metadata: str) -> Fault:
    """A fault that answers with a status; `retry_after_s="2"` becomes trailing metadata."""
    trailing = tuple((key.replace("_", "-"), value) for key, value in metadata.items())

    def fault(request: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(trailing)
        context.abort(code, message)

    return fault


class ScriptedService(WeightingServiceServicer):
    """Weights are the first column of features or tokens, scaled to mean 1; statistics are that column and its double.

    Faults run before the method's own work, or after it.
    """

    def __init__(self) -> None:
        self.before: dict[str, Fault] = {}
        self.after: dict[str, Fault] = {}
        self.calls: Counter[str] = Counter()
        self.requests: dict[str, list[Any]] = {}
        self.order: list[tuple[str, int]] = []  # (method, step) of scores and updates as they were answered
        self.weighters: set[str] = {"default"}
        self.jobs: set[str] = set()
        self.log: dict[tuple[str, str], int] = {}  # (job, update id) -> position
        self.answer_score: Callable[[np.ndarray], np.ndarray] = lambda w: w
        self.answer_statistics: Callable[[np.ndarray], np.ndarray] = lambda s: s
        self.taught: dict[str, tuple[int, int]] = {}  # job -> last step and position, as OpenJob says
        self.released = threading.Event()
        self._lock = threading.Lock()

    def hang(self, request: Any, context: grpc.ServicerContext) -> None:
        """A fault: no answer until the test ends or sets `released`."""
        self.released.wait(30)

    def steps_taught(self) -> list[int]:
        return [request.step for request in self.requests.get("MetaUpdate", [])]

    def CreateWeighter(self, request: Any, context: grpc.ServicerContext) -> pb.Weighter:
        self._enter("CreateWeighter", request, context)
        self.weighters.add(request.name)
        return pb.Weighter(name=request.name, spec=request.spec)

    def OpenJob(self, request: Any, context: grpc.ServicerContext) -> pb.Job:
        self._enter("OpenJob", request, context)
        if request.weighter not in self.weighters:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no weighter {request.weighter!r}")
        resumed = request.job_id in self.jobs
        self.jobs.add(request.job_id)
        last_step, last_position = self.taught.get(request.job_id, (-1, 0))
        return pb.Job(
            job_id=request.job_id,
            weighter=request.weighter,
            resumed=resumed,
            position=len(self.log),
            last_step=last_step,
            last_position=last_position,
        )

    def CloseJob(self, request: Any, context: grpc.ServicerContext) -> pb.Job:
        self._enter("CloseJob", request, context)
        return pb.Job(job_id=request.job_id)

    def Heartbeat(self, request: Any, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        self._enter("Heartbeat", request, context)
        self._check_job(request, context)
        return pb.HeartbeatResponse(position=len(self.log), applied_position=len(self.log))

    def Score(self, request: Any, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self._enter("Score", request, context)
        self._check_job(request, context)
        name = "features" if request.inputs.HasField("features") else "tokens"
        column = from_message(getattr(request.inputs, name), name)[:, 0].astype(np.float32)
        weights = self.answer_score(column / column.mean())
        statistics = np.stack([column, 2 * column], 1)
        self.order.append(("Score", request.step))
        return pb.ScoreResponse(
            weights=to_message(weights),
            logits=to_message(weights),
            position=len(self.log),
            effective_sample_size=1.5,
            statistics=to_message(self.answer_statistics(statistics)) if request.return_statistics else None,
            trust=0.75,
        )

    def MetaUpdate(self, request: Any, context: grpc.ServicerContext) -> pb.MetaUpdateResponse:
        self._enter("MetaUpdate", request, context)
        self._check_job(request, context)
        with self._lock:
            key = (request.job_id, request.update_id)
            duplicate = key in self.log
            position = self.log.setdefault(key, len(self.log) + 1)
            if not duplicate and request.step >= self.taught.get(request.job_id, (-1, 0))[0]:
                self.taught[request.job_id] = (request.step, position)
            self.order.append(("MetaUpdate", request.step))
        self._run(self.after, "MetaUpdate", request, context)
        return pb.MetaUpdateResponse(position=position, duplicate=duplicate, applied_position=position)

    def WatchWeighter(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.Weighter]:
        self._enter("WatchWeighter", request, context)
        yield pb.Weighter(name=request.name, applied_position=len(self.log))
        self.hang(request, context)

    def _enter(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        with self._lock:
            self.calls[method] += 1
            self.requests.setdefault(method, []).append(request)
        self._run(self.before, method, request, context)

    def _run(self, faults: dict[str, Fault], method: str, request: Any, context: grpc.ServicerContext) -> None:
        if fault := faults.get(method):
            fault(request, context)

    def _check_job(self, request: Any, context: grpc.ServicerContext) -> None:
        if request.job_id not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {request.job_id!r}; open it first")


class ScriptedServer:
    """Listens on `port` (0: a free one) until `stop`."""

    def __init__(self, service: ScriptedService, port: int = 0) -> None:
        self.service = service
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        add_WeightingServiceServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """As if killed: nothing under way is answered."""
        self.service.released.set()
        self._server.stop(None).wait()
        self._pool.shutdown()
