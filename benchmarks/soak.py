"""Kills a real service again and again while a client teaches, and compares what is left with an uninterrupted twin.

    python -m benchmarks.soak [--kills 100] [--seed S] [--log sqlite|redis] [--minutes 15]

One client teaches a small weighter over gRPC with seeded updates, in order, each retried until it is acknowledged, and
scores now and then. Half of the kills come from a random failpoint at a random hit (`weighting_service/failpoints.py`),
half from a timer; every life begins on the state and the ports of the one before. With `--log redis` some lives lose
redis-server too. The seed fixes updates, failpoints and moments; where a timer strikes in the code is chance. A life
begins in half a second, as a fork (`forked.py`), so that 100 of them take some minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.forked import ForkedService
from benchmarks.soak_client import ANSWER_S, WEIGHTER, Death, Redis, Trainer, score
from protos.weighting.v1 import weighting_pb2 as pb
from weighting_service import failpoints

# Snapshots and trims come often; a trim takes more than one portion, else nothing could happen between two of them.
FLAGS = ("--threads", "1", "--snapshot-every", "40", "--snapshots-kept", "2", "--updates-kept", "16")

MOST_HITS = {"before_append": 100, "after_append": 100, "during_apply": 60}  # others: MOST_OTHER_HITS
MOST_OTHER_HITS = 3
LIFE_S = 2.0  # longest life that a timer ends
REDIS_DIES = 0.2  # of all lives
TIME_FOR_KILLS = 2 / 3  # of the budget; the rest is for audit and twin


def random_deaths(seed: int, *, redis: bool = False) -> Iterator[Death]:
    """Failpoints and timers in turn, without end. Over Redis none in a trim: it is one portion there."""
    names = [name for name in failpoints.NAMES if not (redis and name == "during_trim")]
    draw = np.random.default_rng(seed)
    for number in itertools.count():
        redis_after_s = draw.uniform(0, LIFE_S) if redis and draw.random() < REDIS_DIES else None
        if number % 2:
            yield Death(after_s=draw.uniform(0, LIFE_S), redis_after_s=redis_after_s)
        else:
            name = str(draw.choice(names))
            hit = int(draw.integers(1, MOST_HITS.get(name, MOST_OTHER_HITS), endpoint=True))
            yield Death(name, hit, redis_after_s=redis_after_s)


# ---- The comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remains:
    """What a service has at the end."""

    head: int
    exported: bytes  # the parameters that score
    snapshot: Path  # left at its stop

    @classmethod
    def of(cls, service: ForkedService) -> Remains:
        """Stops the service."""
        head = service.stub.GetWeighter(pb.GetWeighterRequest(name=WEIGHTER)).position
        service.stub.Score(score(0, 0, head), timeout=ANSWER_S)  # all of the log is applied
        files = service.stub.ExportWeighter(pb.ExportWeighterRequest(name=WEIGHTER)).files
        exported = b"".join(content for name, content in sorted(files.items()) if name.endswith(".safetensors"))
        if status := service.stop():
            raise AssertionError(f"the service stopped with status {status}:\n{service.last_words()}")
        return cls(head, exported, max(service.state.glob("snapshots/*/*.safetensors"), key=lambda path: path.name))


def differences(ours: Trainer, left: Remains, twin: Trainer, twins: Remains) -> list[str]:
    """What is not equal, bit for bit, by name."""
    found = []
    for what, one, other in (
        ("acknowledged positions", ours.positions, twin.positions),
        ("log head", left.head, twins.head),
        ("weights", ours.scores, twin.scores),
        ("exported parameters", left.exported, twins.exported),
        ("position of the last snapshot", left.snapshot.name, twins.snapshot.name),
    ):
        if one != other:
            found.append(what)
    return found + differing_entries(contents(left.snapshot), contents(twins.snapshot))


def contents(snapshot: Path) -> dict[str, object]:
    """Every tensor of a snapshot, and every value of its metadata, by name."""
    with safetensors.safe_open(snapshot, framework="numpy") as file:
        found: dict[str, object] = {}
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            found[f"tensor {name}"] = (tensor.dtype.str, tensor.shape, tensor.tobytes())
        for name, text in file.metadata().items():
            found |= _flat(name, json.loads(text)) if text.startswith("{") else {name: text}
    return found


def differing_entries(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _flat(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, part in value.items() for path, leaf in _flat(f"{name}.{key}", part).items()}


@dataclass(frozen=True)
class Outcome:
    """What a soak found. `twice`: entries of the log beyond the acknowledged updates."""

    trainer: Trainer
    lost: list[int]  # steps
    twice: int
    differences: list[str]

    @property
    def good(self) -> bool:
        return not (self.lost or self.twice or self.differences)


def soak(
    folder: Path,
    deaths: Iterable[Death],
    *,
    seed: int,
    updates: int = 0,
    redis: Redis | None = None,
    twin: tuple[Trainer, Remains] | None = None,
    on_life: Callable[[Trainer], None] = lambda trainer: None,
) -> Outcome:
    """Lives through `deaths`, then teaches up to `updates`, then compares with a twin that lived undisturbed.

    Args:
        twin: one that was taught as many updates; None: one is taught here. It always has an SQLite log, so that a soak
            over Redis compares the two logs as well.
    """
    service = ForkedService(folder / "soaked", *FLAGS, *log_flags(folder / "soaked", redis))
    trainer = Trainer(service, seed, redis)
    try:
        for death in deaths:
            trainer.live(death)
            on_life(trainer)
        trainer.begin()
        # One more at least: the update under way at the last death, which is perhaps in the log without an answer.
        trainer.teach(max(updates, len(trainer.positions) + 1))
        twice = service.stub.GetWeighter(pb.GetWeighterRequest(name=WEIGHTER)).position - len(trainer.positions)
        lost = trainer.audit()
        left = Remains.of(service)
    finally:
        service.close()
    twin = twin or undisturbed(folder / "twin", seed, len(trainer.positions))
    return Outcome(trainer, lost, max(0, twice), differences(trainer, left, *twin))


def log_flags(state: Path, redis: Redis | None) -> tuple[str, ...]:
    """For a service with its log in Redis, where there is one; snapshots lie in the state directory all the same."""
    return ("--log", redis.url, "--snapshots", state.as_uri()) if redis else ()


def undisturbed(folder: Path, seed: int, updates: int) -> tuple[Trainer, Remains]:
    """The same updates, taught to a service that nobody kills."""
    service = ForkedService(folder, *FLAGS)
    twin = Trainer(service, seed)
    try:
        twin.begin()
        twin.teach(updates)
        return twin, Remains.of(service)
    finally:
        service.close()


# ---- The command ----------------------------------------------------------------------------------------------------

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[acknowledged]} updates"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where nothing was lost, nothing applied twice, and the states are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="default: the time's")
    parser.add_argument("--log", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--minutes", type=float, default=15.0, help="budget; the last third is for the comparison")
    options = parser.parse_args(arguments)
    console = Console()
    console.print(f"seed {options.seed}, log {options.log}, {options.kills} kills, at most {options.minutes:g} minutes")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="weighbridge-soak-"))
    console.print(f"state in {folder}, removed where all is well")
    outcome = _soak_with_progress(folder, options, console)
    console.print(_table(outcome))
    if outcome.trainer.lives < options.kills:
        console.print(f"{outcome.trainer.lives} kills of {options.kills}: the time for more was up (--minutes)")
    if outcome.good:
        shutil.rmtree(folder)
    return 0 if outcome.good else 1


def _soak_with_progress(folder: Path, options: argparse.Namespace, console: Console) -> Outcome:
    give_up = time.monotonic() + options.minutes * 60 * TIME_FOR_KILLS
    with ExitStack() as resources:
        redis = resources.enter_context(_redis_server(folder)) if options.log == "redis" else None
        bar = resources.enter_context(Progress(*_COLUMNS, console=console))
        task = bar.add_task("kills", total=options.kills, acknowledged=0)

        def on_life(trainer: Trainer) -> None:
            bar.update(task, completed=trainer.lives, acknowledged=len(trainer.positions))

        deaths = itertools.takewhile(
            lambda _: not bar.finished and time.monotonic() < give_up,
            random_deaths(options.seed, redis=redis is not None),
        )
        return soak(folder, deaths, seed=options.seed, redis=redis, on_life=on_life)


@contextmanager
def _redis_server(folder: Path) -> Iterator[Redis]:
    from tests.redis_server import RedisServer  # brings the binary of a package that only tests have

    (folder / "redis").mkdir()
    with RedisServer(folder / "redis") as server:
        yield server


def _table(outcome: Outcome) -> Table:
    trainer = outcome.trainer
    table = Table(title="soak", show_header=False)
    for kind, count in sorted(trainer.kills.items()):
        table.add_row(f"kills: {kind}", str(count))
    table.add_section()
    table.add_row("updates acknowledged", str(len(trainer.positions)))
    table.add_row("duplicates answered", str(trainer.duplicates))
    table.add_row("lost", _short(outcome.lost))
    table.add_row("applied twice", str(outcome.twice))
    table.add_row("states equal", "yes" if not outcome.differences else f"no: {_short(outcome.differences)}")
    if trainer.recovery_s:
        median, most = statistics.median(trainer.recovery_s), max(trainer.recovery_s)
        table.add_row("recovery, death to acknowledgement", f"median {median:.2f} s, longest {most:.2f} s")
    return table


def _short(found: Sequence[object]) -> str:
    return f"{len(found)}: {', '.join(map(str, found[:12]))}" if found else "0"


if __name__ == "__main__":
    sys.exit(main())
