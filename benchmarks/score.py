"""Score and meta-update over gRPC on localhost, features [256, 72] float32; the service in a process of its own.

    python -m benchmarks.score [--calls 400]

Prints the round trip, the forward pass it contains (same model, same rows, this process, one thread), the difference,
which is the service's own share, the time to acknowledge a meta-update, and the memory of the idle service.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks.machine import describe, quantile
from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from weighting_contract.spec import FeatureSpec, WeighterSpec
from weighting_contract.tensors import to_message
from weighting_service.domain import Inputs
from weighting_service.weighter import Weighter

SAMPLES, COLUMNS = 256, 72
NAMES = tuple(f"column_{i}" for i in range(COLUMNS))
GOAL_ROUND_TRIP_MS, GOAL_OWN_SHARE_MS, GOAL_MEMORY_MB = 5.0, 2.0, 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=400)
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    print(describe())
    rows = np.random.default_rng(0).normal(size=(SAMPLES, COLUMNS)).astype(np.float32)
    with tempfile.TemporaryDirectory() as state:
        service, port = start_service(Path(state))
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                trips, acknowledgements = measure_service(WeightingServiceStub(channel), rows, calls)
            memory = resident_mb(service.pid)
        finally:
            service.terminate()
            service.wait()
    weighter = Weighter(WeighterSpec(features=FeatureSpec(names=NAMES)), device=torch.device("cpu"))
    forward = timed_ms(lambda: weighter.score([Inputs(features=rows)]), calls)
    trip = quantile(trips, 0.5)
    own = trip - quantile(forward, 0.5)
    print(f"features [{SAMPLES}, {COLUMNS}] float32, {calls} calls, default weighter, one thread, gRPC on localhost")
    print(
        f"score round trip     median {trip:6.2f} ms   p99 {quantile(trips, 0.99):6.2f} ms",
        goal(trip, GOAL_ROUND_TRIP_MS),
    )
    print(f"the model's forward  median {quantile(forward, 0.5):6.2f} ms")
    print(f"service's own share         {own:6.2f} ms                ", goal(own, GOAL_OWN_SHARE_MS))
    print(f"meta-update acknowledged, median {quantile(acknowledgements, 0.5):.2f} ms (SQLite, synchronous=FULL)")
    print(
        f"resident memory of the idle service with the default weighter {memory:.0f} MB", goal(memory, GOAL_MEMORY_MB)
    )
    return 0


def start_service(state: Path) -> tuple[subprocess.Popen[str], int]:
    """A service on free ports with one CPU thread, ready."""
    command = [sys.executable, "-m", "weighting_service", "--state", str(state), "--threads", "1"]
    service = subprocess.Popen([*command, "--grpc-port", "0", "--rest-port", "0"], stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    for line in service.stderr:
        if match := re.search(r"ready: gRPC on [^ ]*:(\d+)", line):
            return service, int(match[1])
    raise RuntimeError("the service did not start")


def measure_service(stub: Any, rows: np.ndarray, calls: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each Score and of each MetaUpdate (idle service between updates)."""
    spec = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES))
    stub.CreateWeighter(pb.CreateWeighterRequest(name="default", spec=spec))
    stub.OpenJob(pb.OpenJobRequest(weighter="default", job_id="bench"))
    inputs = pb.Inputs(features=to_message(rows))
    trips = timed_ms(lambda: stub.Score(pb.ScoreRequest(job_id="bench", inputs=inputs)), calls)
    acknowledgements = []
    for step in range(calls // 4):
        cotangent = to_message(np.random.default_rng(step).normal(size=SAMPLES).astype(np.float32))
        request = pb.MetaUpdateRequest(job_id="bench", step=step, inputs=inputs, cotangent=cotangent)
        started = time.perf_counter()
        position = stub.MetaUpdate(request).position
        acknowledgements.append((time.perf_counter() - started) * 1e3)
        stub.Score(pb.ScoreRequest(job_id="bench", inputs=inputs, min_position=position))  # until it is applied
    return trips, acknowledgements


def timed_ms(call: Callable[[], object], calls: int) -> list[float]:
    for _ in range(20):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def goal(value: float, at_most: float) -> str:
    return f"(goal: at most {at_most:g}: {'reached' if value <= at_most else 'MISSED'})"


if __name__ == "__main__":
    sys.exit(main())
