"""Score and meta-update over gRPC on localhost, features [256, 72] float32; the service in a process of its own.

    python -m benchmarks.score [--blocks 12]

Prints the round trip, the forward pass that it contains (as the service's own metrics time it, in the same calls), the
difference, which is the service's own share (the client's part of the call included), the time to acknowledge a
meta-update, and the memory of the idle service. Calls come in blocks; a goal is judged by the quietest block, for what
the others take longer is what else the machine does (all of it moves by half from minute to minute), and the mean over
all blocks is printed beside it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import describe, goal, quantile
from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from weighting_contract.tensors import to_message

SAMPLES, COLUMNS = 256, 72
BLOCK = 100  # calls
NAMES = tuple(f"column_{i}" for i in range(COLUMNS))
GOAL_ROUND_TRIP_MS, GOAL_OWN_SHARE_MS, GOAL_MEMORY_MB = 5.0, 2.0, 600.0
GOAL_ACKNOWLEDGED_MS = 10.0


@dataclass(frozen=True)
class Block:
    """Milliseconds of consecutive calls."""

    round_trip: float  # median
    forward: float  # mean
    own: float  # mean round trip less the forward pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    count = parser.parse_args().blocks
    print(describe())
    rows = np.random.default_rng(0).normal(size=(SAMPLES, COLUMNS)).astype(np.float32)
    with tempfile.TemporaryDirectory() as state:
        service, grpc_port, rest_port = start_service(Path(state))
        try:
            with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                stub = WeightingServiceStub(channel)
                blocks = measure_score(stub, f"http://127.0.0.1:{rest_port}/metrics", rows, count)
                memory = resident_mb(service.pid)
                acknowledged = quantile(measure_meta_update(stub, rows, 100), 0.5)
        finally:
            service.terminate()
            service.wait()
    print(
        f"features [{SAMPLES}, {COLUMNS}] float32, {count} blocks of {BLOCK} calls, default weighter, one thread, gRPC "
        "on localhost"
    )
    for field, name, most in (
        ("round_trip", "score round trip, median", GOAL_ROUND_TRIP_MS),
        ("forward", "the model's forward, mean", None),
        ("own", "service's own share, mean", GOAL_OWN_SHARE_MS),
    ):
        values = [float(getattr(block, field)) for block in blocks]
        print(
            f"{name}: quietest block {min(values):.2f} ms, all blocks {statistics.mean(values):.2f} ms",
            goal(min(values), most) if most else "",
        )
    print(
        f"meta-update acknowledged, median {acknowledged:.2f} ms (SQLite, synchronous=FULL)",
        goal(acknowledged, GOAL_ACKNOWLEDGED_MS),
    )
    print(f"resident memory of the service, one weighter: {memory:.0f} MB", goal(memory, GOAL_MEMORY_MB))
    return 0


def start_service(state: Path, *flags: str) -> tuple[subprocess.Popen[str], int, int]:
    """A service on free ports (gRPC, REST) with one CPU thread, ready."""
    command = [sys.executable, "-m", "weighting_service", "--state", str(state), "--threads", "1", *flags]
    service = subprocess.Popen([*command, "--grpc-port", "0", "--rest-port", "0"], stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    for line in service.stderr:
        if match := re.search(r"ready: gRPC on [^ ]*:(\d+), REST on [^ ]*:(\d+)", line):
            return service, int(match[1]), int(match[2])
    raise RuntimeError("the service did not start")


def open_job(stub: Any) -> None:
    """The job "bench" of a default weighter."""
    spec = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES))
    stub.CreateWeighter(pb.CreateWeighterRequest(name="default", spec=spec))
    stub.OpenJob(pb.OpenJobRequest(weighter="default", job_id="bench"))


def measure_score(stub: Any, metrics_url: str, rows: np.ndarray, blocks: int) -> list[Block]:
    open_job(stub)
    request = pb.ScoreRequest(job_id="bench", inputs=pb.Inputs(features=to_message(rows)))
    timed_ms(lambda: stub.Score(request), 20)
    measured = []
    for _ in range(blocks):
        before = device_seconds(metrics_url)
        trips = timed_ms(lambda: stub.Score(request), BLOCK)
        forward = (device_seconds(metrics_url) - before) / BLOCK * 1e3
        measured.append(Block(quantile(trips, 0.5), forward, statistics.mean(trips) - forward))
    return measured


def measure_meta_update(stub: Any, rows: np.ndarray, calls: int) -> list[float]:
    """Milliseconds until each of the job's is acknowledged; between two the service applies the first."""
    inputs = pb.Inputs(features=to_message(rows))
    acknowledgements = []
    for step in range(calls):
        cotangent = to_message(np.random.default_rng(step).normal(size=SAMPLES).astype(np.float32))
        request = pb.MetaUpdateRequest(job_id="bench", step=step, inputs=inputs, cotangent=cotangent)
        started = time.perf_counter()
        position = stub.MetaUpdate(request).position
        acknowledgements.append((time.perf_counter() - started) * 1e3)
        stub.Score(pb.ScoreRequest(job_id="bench", inputs=inputs, min_position=position))
    return acknowledgements


def device_seconds(metrics_url: str) -> float:
    families = text_string_to_metric_families(httpx.get(metrics_url).text)
    return next(f.samples[0].value for f in families if f.name == "weighbridge_device_seconds")


def timed_ms(call: Callable[[], object], calls: int) -> list[float]:
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


if __name__ == "__main__":
    sys.exit(main())
