"""Fair shares: the Score latency of a job beside one that sends 50 times as much, each from a process of its own.

    python -m benchmarks.fairness [--rate 5] [--rounds 5] [--calls 60]

The job sends a batch of features [256, 72] float32 at a steady rate, over gRPC on localhost. It does so alone, then
beside a job that sends 50 times as many batches of the same size, whether or not they are answered; and so on in turn.
The goal is judged by the median over the rounds of each round's p99, so that a round that something else disturbed does
not decide. Prints median and p99 over all calls too, and what became of the flood's calls: CANCELLED are
those under way when it stopped.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.machine import describe, goal, quantile
from benchmarks.score import COLUMNS, NAMES, SAMPLES, start_service
from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from weighting_contract.tensors import to_message

Rounds = list[list[float]]

TIMES = 50
GOAL_RATIO = 2.0
DEADLINE_S = 10.0
SETTLING = 10  # calls that are not counted, after the flood has begun or ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=5.0, help="calls a second of the job")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=60, help="of the job, a round alone and a round beside the flood")
    parser.add_argument("--flood", type=int, help=argparse.SUPPRESS)  # the port: this process is the flood
    given = parser.parse_args()
    if given.flood:
        flood(given.flood, given.rate * TIMES)
        return 0
    print(describe())
    with tempfile.TemporaryDirectory() as state:
        service, port, _ = start_service(Path(state))
        try:
            alone, beside, answers = measure(port, given.rate, given.rounds, given.calls)
        finally:
            service.terminate()
            service.wait()
    print(
        f"a job with {given.rate:g} Score calls a second of [{SAMPLES}, {COLUMNS}] float32, alone and beside one with "
        f"{given.rate * TIMES:g}; {given.rounds} rounds of {given.calls} calls each; one thread, gRPC on localhost"
    )
    for words, rounds in (("alone", alone), ("beside the flood", beside)):
        times = [ms for each in rounds for ms in each]
        print(
            f"{words}: median {quantile(times, 0.5):.2f} ms, p99 {quantile(times, 0.99):.2f} ms, "
            f"median p99 of a round {usual_p99(rounds):.2f} ms"
        )
    total = sum(answers.values()) or 1
    print("the flood's calls: " + ", ".join(f"{code} {n / total:.0%}" for code, n in answers.most_common()))
    ratio = usual_p99(beside) / usual_p99(alone)
    print(f"ratio of the p99 {ratio:.2f}", goal(ratio, GOAL_RATIO))
    return 0


def usual_p99(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(quantile(times, 0.99) for times in rounds)


def measure(port: int, rate: float, rounds: int, calls: int) -> tuple[Rounds, Rounds, Counter[str]]:
    """Milliseconds of the job's calls alone and beside the flood, by round, and how the flood's calls ended."""
    alone: Rounds = []
    beside: Rounds = []
    answers: Counter[str] = Counter()
    with job_of(port, "job") as (stub, request):
        for _ in range(rounds):
            steady_ms(stub, request, rate, SETTLING)
            alone.append(steady_ms(stub, request, rate, calls))
            with flooding(port, rate, answers):
                steady_ms(stub, request, rate, SETTLING)
                beside.append(steady_ms(stub, request, rate, calls))
    return alone, beside, answers


@contextmanager
def job_of(port: int, job_id: str) -> Iterator[tuple[Any, pb.ScoreRequest]]:
    """An open job and what it sends."""
    rows = np.random.default_rng(0).normal(size=(SAMPLES, COLUMNS)).astype(np.float32)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = WeightingServiceStub(channel)  # type: ignore[no-untyped-call]
        spec = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES))
        stub.CreateWeighter(pb.CreateWeighterRequest(name="default", spec=spec, exist_ok=True), timeout=60)
        stub.OpenJob(pb.OpenJobRequest(weighter="default", job_id=job_id), timeout=60)
        yield stub, pb.ScoreRequest(job_id=job_id, inputs=pb.Inputs(features=to_message(rows)))


def steady_ms(stub: Any, request: pb.ScoreRequest, rate: float, calls: int) -> list[float]:
    """Milliseconds of calls that are due at a steady rate, from when each was due."""
    times, start = [], time.perf_counter()
    for i in range(calls):
        due = start + i / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        sent = max(due, start)
        stub.Score(request, timeout=DEADLINE_S)
        times.append((time.perf_counter() - sent) * 1e3)
    return times


@contextmanager
def flooding(port: int, rate: float, answers: Counter[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.fairness", "--flood", str(port), "--rate", str(rate)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    try:
        yield
    finally:
        output, _ = process.communicate("stop\n")
        answers.update({code: int(n) for code, n in (line.split() for line in output.splitlines())})


def flood(port: int, rate: float) -> None:
    """Sends at `rate`, waiting for no answer, until a line comes in; then prints how the calls ended."""
    answers: Counter[str] = Counter()

    def ended(call: grpc.Future) -> None:
        answers[call.code().name] += 1

    os.nice(10)  # elsewhere it would not be on the cores of the service
    with job_of(port, "flood") as (stub, request):
        print("flooding", flush=True)
        start, sent = time.perf_counter(), 0
        while not _stopped():
            due = start + sent / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            stub.Score.future(request, timeout=DEADLINE_S).add_done_callback(ended)
            sent += 1
    for code, count in answers.items():
        print(code, count)


def _stopped() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    sys.exit(main())
