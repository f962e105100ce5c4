"""How fast a service recovers: it replays a log of meta-updates with the default weighters on one core.

    python -m benchmarks.replay [--updates 600] [--rounds 3]

The weighters are those that `trainer_client.run` makes for selection: the one of its own spec, and the pretaught one.
An update is of 16 samples, as `run` sends them, or of 256, for which attention among the samples costs most.
A round is what happens at a start: restore the snapshot at position 0, then read, decode and apply every entry of an
SQLite log, with a snapshot every 200. The goal is judged by the quietest round, for what the others take longer is what
else the machine does; a core that others use meanwhile shows in the processor's time beside it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe, goal_at_least
from trainer_client.run.session import SELECT_SPEC
from weighting_contract.spec import WeighterSpec
from weighting_service import pretaught
from weighting_service.domain import Estimator, Inputs, JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.follower import Follower
from weighting_service.snapshots import SnapshotStore
from weighting_service.states import Hosted, States
from weighting_service.update_log import SqliteUpdateLog, UpdateLog
from weighting_service.weighter import Weighter

SAMPLES = (16, 256)  # an update
JOBS, SNAPSHOT_EVERY = 4, 200
GOAL_PER_S = 200.0


@dataclass(frozen=True)
class Round:
    """What one replay took."""

    wall_s: float
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=600, help="entries of the log")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    packaged = Weighter.from_pretrained(pretaught.weighter_folder()).spec
    weighters = (("fresh", SELECT_SPEC, ""), (pretaught.NAME, packaged, pretaught.NAME))
    for samples, (name, spec, initial) in itertools.product(SAMPLES, weighters):
        with tempfile.TemporaryDirectory() as folder:
            rounds = measure(Path(folder), spec, initial, samples, given.updates, given.rounds)
        quietest = min(rounds, key=lambda each: each.wall_s)
        best, mean = (given.updates / wall_s for wall_s in (quietest.wall_s, statistics.mean(r.wall_s for r in rounds)))
        print(
            f"{name}, {samples} samples: {best:.0f} updates/s in the quietest of {given.rounds} rounds, {mean:.0f} on "
            "average; "
            f"{1000 * quietest.cpu_s / given.updates:.2f} ms of processor time each",
            goal_at_least(best, GOAL_PER_S),
        )
    return 0


def measure(folder: Path, spec: WeighterSpec, initial: str, samples: int, updates: int, rounds: int) -> list[Round]:
    record = WeighterRecord("weighter", "a" * 32, spec, created_unix_ms=0, initial=initial)
    with SqliteUpdateLog(folder / "log.sqlite") as log:
        states = States(log, SnapshotStore(folder / "0"), device=torch.device("cpu"), models_dir=None)
        states.create(record, states.packaged_files() if initial else None)
        write(log, record, samples, updates)
        return [replay(log, folder, record, number) for number in range(1, rounds + 1)]


def write(log: UpdateLog, record: WeighterRecord, samples: int, updates: int) -> None:
    assert record.spec.features is not None
    rng = np.random.default_rng(0)
    columns = len(record.spec.features.names)
    log.create_weighter(record)
    for number in range(JOBS):
        log.put_job(JobRecord(f"job-{number}", record.uid, Role.LEARN))
    for step in range(updates):
        features = rng.standard_normal((samples, columns), np.float32)
        log.append(
            record.uid,
            MetaUpdate(
                f"job-{step % JOBS}",
                str(step),
                step,
                Inputs(features),
                1e-5 * (features[:, 0] + 2 * rng.standard_normal(samples, np.float32)),
                step,
                Estimator.SCORE_FUNCTION,
                probes=rng.random(samples) < 0.25,
            ),
        )


def replay(log: UpdateLog, folder: Path, record: WeighterRecord, number: int) -> Round:
    """From the start of a service to the state at the log's head; each round keeps its own snapshots."""
    snapshots = SnapshotStore(folder / str(number))
    first = SnapshotStore(folder / "0").load(record.uid, 0)
    snapshots.save(record.uid, 0, first.tensors, first.metadata)
    states = States(log, snapshots, device=torch.device("cpu"), models_dir=None)
    follower = Follower(log, states, snapshot_every=SNAPSHOT_EVERY, updates_kept=1 << 30, on_applied=_ignore)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    hosted = states.restore(record)
    follower.host(hosted)
    follower.start()
    hosted.caught_up.wait()
    took = Round(time.perf_counter() - begun, time.process_time() - cpu_begun)
    follower.stop()
    if hosted.failure or hosted.weighter.position != log.head(record.uid):
        raise RuntimeError(f"the replay ended at position {hosted.weighter.position}: {hosted.failure}")
    return took


def _ignore(hosted: Hosted) -> None:
    """Nobody watches."""


if __name__ == "__main__":
    sys.exit(main())
