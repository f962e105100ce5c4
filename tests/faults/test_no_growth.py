"""A trainer whose service is dead for thousands of steps holds no more threads, files and memory than before."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.faults.proxy import Fault, FaultyProxy
from trainer_client import Job, Limits, Timeouts, connect
from trainer_client.select import Selector

STEPS, WARM_UP = 2000, 1000
MOST_BYTES = 5 * 2**20
FEATURES = np.random.default_rng(0).normal(size=(32, 20)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 1024, (64, 65)).astype(np.uint16)
TIMEOUTS = Timeouts(score_s=0.1, meta_update_s=0.1, admin_s=0.1, close_s=0.1)
MANY_TRIALS = Limits(breaker_period_s=0.02, breaker_max_period_s=0.02, heartbeat_s=0.02)


@dataclass(frozen=True)
class Held:
    """What a process has."""

    threads: int
    files: int
    resident_bytes: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), resident)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def dead_port(kind: str) -> Iterator[int]:
    """Where nobody listens, or where everything is swallowed."""
    if kind == "refuses":
        yield unused_port()
        return
    with FaultyProxy(unused_port()) as proxy:
        proxy.set(Fault.BLACK_HOLE)
        yield proxy.port


def weigh(job: Job, steps: range) -> None:
    for step in steps:
        assert job.score(FEATURES, step).fallback
        job.meta_update(FEATURES[:, 0], FEATURES, step)


def weigh_late(job: Job, steps: range) -> None:
    for step in steps:
        pending = job.score_soon(FEATURES, step)
        assert pending.result().fallback
        job.meta_update(FEATURES[:, 0], FEATURES, step)


def choose(job: Job, steps: range) -> None:
    with_look_ahead = Selector(job, keep=16)
    for step in steps:
        with_look_ahead.submit(step, TOKENS)
        selection = with_look_ahead.result(step)
        assert selection.fallback
        with_look_ahead.teach(step, FEATURES[:16, 0], selection)
    with_look_ahead.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("loop", [weigh, weigh_late, choose])
@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("kind", ["refuses", "swallows"])
def test_a_dead_service_makes_nothing_grow(kind: str, scheme: str, loop: object) -> None:
    assert callable(loop)
    with dead_port(kind) as port:
        client = connect(f"{scheme}://127.0.0.1:{port}", timeouts=TIMEOUTS, limits=MANY_TRIALS)
        with client, client.open_job(weighter="w") as job:
            loop(job, range(WARM_UP))
            before = Held.now()
            loop(job, range(WARM_UP, WARM_UP + STEPS))
            after = Held.now()
            assert job.counters.failed_steps == WARM_UP + STEPS
    assert after.threads <= before.threads
    assert after.files <= before.files + 4, "connections that are being made come and go"
    assert after.resident_bytes - before.resident_bytes < MOST_BYTES
