"""The follower over a real log and real snapshots: replay, rollback, divergence, trims, outages, other histories."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from weighting_contract.errors import Unavailable
from weighting_contract.spec import FeatureSpec, HeadSpec, WeighterSpec
from weighting_service import failpoints
from weighting_service.domain import Inputs, JobRecord, MetaUpdate, Role, Rollback, WeighterRecord
from weighting_service.follower import Follower
from weighting_service.snapshots import SnapshotStore
from weighting_service.states import Hosted, States, environment
from weighting_service.update_log import SqliteUpdateLog, UpdateLog

CPU = torch.device("cpu")
SPEC = WeighterSpec(features=FeatureSpec(names=("a", "b", "c")), head=HeadSpec(width=8), seed=3)
RECORD = WeighterRecord("prose", "a" * 32, SPEC, created_unix_ms=1)
EVERY = 4  # positions between two snapshots


def update_of(step: int, seed: int = 0) -> MetaUpdate:
    rng = np.random.default_rng([seed, step])
    features = rng.standard_normal((10, 3), np.float32)
    cotangent = features[:, 1] + rng.standard_normal(10, np.float32)
    return MetaUpdate(f"job-{step % 2}", str(step), step, Inputs(features), cotangent, step)


def new_log(file: Path, updates: int = 0, seed: int = 0) -> SqliteUpdateLog:
    log = SqliteUpdateLog(file)
    log.create_weighter(RECORD)
    for name in ("job-0", "job-1"):
        log.put_job(JobRecord(name, RECORD.uid, Role.LEARN))
    teach(log, updates, seed)
    return log


def teach(log: UpdateLog, to: int, seed: int = 0) -> None:
    for step in range(log.head(RECORD.uid), to):
        log.append(RECORD.uid, update_of(step, seed))


class Replica:
    """One weighter that a follower of its own keeps up with `log`."""

    def __init__(
        self, log: UpdateLog, snapshots: SnapshotStore, *, updates_kept: int = 1000, restore: bool = True
    ) -> None:
        self.log, self.snapshots = log, snapshots
        self.states = States(log, snapshots, device=CPU, models_dir=None)
        self.hosted: Hosted = self.states.restore(RECORD) if restore else self.states.create(RECORD)
        self.on_applied: Callable[[], object] = lambda: None
        self._follower = Follower(
            log,
            self.states,
            snapshot_every=EVERY,
            updates_kept=updates_kept,
            on_applied=lambda hosted: self.on_applied(),
        )
        self._follower.start()

    def follow(self) -> None:
        """Applies all that is in the log now, unless it fails."""
        self.hosted.caught_up.clear()
        self._follower.host(self.hosted)
        assert self.hosted.caught_up.wait(60)

    def stop(self) -> None:
        self._follower.stop()


Make = Callable[..., Replica]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteUpdateLog]:
    with new_log(tmp_path / "log.sqlite") as log:
        yield log


@pytest.fixture
def replica(tmp_path: Path, log: SqliteUpdateLog) -> Iterator[Make]:
    """`replica(name of its snapshots' folder, ...)` over the log; each is stopped at the end."""
    made: list[Replica] = []

    def make(folder: str = "snapshots", *, over: UpdateLog = log, kept: int = 3, **options: bool | int) -> Replica:
        made.append(Replica(over, SnapshotStore(tmp_path / folder, keep=kept), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.stop()


def state_of(replica: Replica) -> tuple[str, dict[str, bytes], str]:
    weighter = replica.hosted.weighter
    tensors = {name: t.numpy().tobytes() for name, t in weighter.state_tensors().items()}
    return json.dumps(weighter.state_metadata(), sort_keys=True), tensors, replica.hosted.chain


def snapshot_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tamper(replica: Replica) -> None:
    """What a bit that flips in memory does."""
    parameters = next(iter(replica.hosted.weighter._trainable.values()))
    with torch.no_grad():
        parameters.view(-1)[0].add_(0.5)


# ---- Replay ---------------------------------------------------------------------------------------------------------


def test_a_replay_is_the_live_state_bit_for_bit_through_a_rollback(log: SqliteUpdateLog, replica: Make) -> None:
    live = replica("live", restore=False)
    for position in range(1, 11):
        teach(log, position)
        live.follow()
    log.append_rollback(RECORD.uid, Rollback(4, live.snapshots.read_bytes(RECORD.uid, 4)), expected_head=10)
    live.follow()
    put_back = live.hosted.weighter
    assert put_back.position == 11
    for position in range(12, 20):
        teach(log, position)
        live.follow()
    replayed = replica("replayed", restore=False)
    replayed.follow()
    assert replayed.hosted.weighter.position == 19
    assert state_of(replayed) == state_of(live)
    assert live.hosted.failure == replayed.hosted.failure == ""


def test_a_rollback_puts_everything_back_but_the_position(log: SqliteUpdateLog, replica: Make) -> None:
    one = replica(restore=False)
    teach(log, 4)
    one.follow()
    metadata, tensors, _ = state_of(one)
    teach(log, 9)
    one.follow()
    assert state_of(one)[1] != tensors
    log.append_rollback(RECORD.uid, Rollback(4, one.snapshots.read_bytes(RECORD.uid, 4)), None)
    one.follow()
    assert state_of(one)[1] == tensors
    assert json.loads(state_of(one)[0]) == {**json.loads(metadata), "position": 10}


def test_snapshots_lie_at_multiples_and_at_the_stop(log: SqliteUpdateLog, replica: Make) -> None:
    one = replica(restore=False, kept=9)
    teach(log, 10)
    one.follow()
    assert one.snapshots.positions(RECORD.uid) == [0, 4, 8]
    one.stop()
    assert one.snapshots.positions(RECORD.uid) == [0, 4, 8, 10]
    again = replica()
    assert (again.hosted.weighter.position, again.hosted.snapshot_position) == (10, 10)
    assert state_of(again) == state_of(one)


def test_a_turn_of_many_entries_publishes_in_between(log: SqliteUpdateLog, replica: Make) -> None:
    teach(log, 30)
    one = replica(restore=False)
    seen: set[int] = set()
    one.on_applied = lambda: seen.add(one.hosted.weighter.published.position)
    one.follow()
    assert seen == {8, 16, 24, 30}


# ---- Trims ----------------------------------------------------------------------------------------------------------


def test_the_log_is_trimmed_behind_the_oldest_snapshot_that_is_kept(log: SqliteUpdateLog, replica: Make) -> None:
    one = replica(restore=False, kept=2, updates_kept=3)
    teach(log, 14)
    one.follow()
    assert one.snapshots.positions(RECORD.uid) == [8, 12]
    assert log.trimmed(RECORD.uid) == 8 - 3
    one.stop()
    assert log.trimmed(RECORD.uid) == 5


def test_a_replica_behind_a_trim_goes_on_from_a_snapshot(log: SqliteUpdateLog, replica: Make) -> None:
    fast, slow = replica(restore=False, kept=2, updates_kept=0), replica(kept=2)
    teach(log, 14)
    fast.follow()
    assert log.trimmed(RECORD.uid) == 8
    assert slow.hosted.weighter.position == 0
    slow.follow()
    assert slow.hosted.failure == ""
    assert state_of(slow) == state_of(fast)


def test_a_replica_behind_a_trim_without_a_snapshot_says_so(log: SqliteUpdateLog, replica: Make) -> None:
    fast, slow = replica(restore=False, kept=2, updates_kept=0), replica("own", restore=False)
    teach(log, 14)
    fast.follow()
    slow.follow()
    for words in ("entries 1 to 8", "trimmed", "no snapshot behind position 0"):
        assert words in slow.hosted.failure


# ---- Divergence -----------------------------------------------------------------------------------------------------


def test_a_state_that_diverged_is_withdrawn_and_made_anew(
    log: SqliteUpdateLog, replica: Make, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = replica(restore=False), replica("own", restore=False)
    teach(log, 6)
    bad.follow()
    tampered = bad.hosted.weighter
    tamper(bad)
    teach(log, 9)
    good.follow()
    bad.follow()
    assert bad.hosted.out_of_service == ""
    assert state_of(bad) == state_of(good)
    assert bad.snapshots.positions(RECORD.uid) == [0, 4, 8]
    assert bad.snapshots.load(RECORD.uid, 8).digest == good.snapshots.load(RECORD.uid, 8).digest
    assert "at position 8 is not the one that holds" in caplog.text
    assert "replayed from position 4" in caplog.text
    assert "served again, at position 8" in caplog.text
    with pytest.raises(Unavailable, match=r"'prose' is not served.*at position 8"):  # to whoever still holds it
        tampered.score([update_of(1).inputs])
    assert len(bad.hosted.weighter.score([update_of(1).inputs])) == 1


def test_a_snapshot_of_a_diverged_state_is_passed_over(log: SqliteUpdateLog, replica: Make) -> None:
    good, bad = replica(restore=False), replica("own", restore=False)
    teach(log, 6)
    bad.follow()
    tamper(bad)
    bad.stop()
    assert bad.snapshots.positions(RECORD.uid) == [0, 4, 6]
    teach(log, 9)
    good.follow()
    again = replica("own")
    assert again.hosted.weighter.position == 6
    again.follow()
    assert again.hosted.out_of_service == ""
    assert state_of(again) == state_of(good)


def test_a_state_that_diverges_twice_stays_out(log: SqliteUpdateLog, replica: Make) -> None:
    log.vouch(RECORD.uid, 8, environment(CPU), "f" * 64)
    one = replica(restore=False)
    teach(log, 9)
    one.follow()
    assert "at position 8 is not the one that holds" in one.hosted.failure
    assert "made anew" in one.hosted.failure
    one.stop()
    assert one.snapshots.positions(RECORD.uid) == [0, 4]
    with pytest.raises(Unavailable, match="is not served"):
        one.hosted.weighter.score([update_of(1).inputs])


def test_states_of_other_environments_are_not_compared(log: SqliteUpdateLog, replica: Make) -> None:
    log.vouch(RECORD.uid, 4, "torch 1.0, cpu ABACUS, 64 threads", "f" * 64)
    one = replica(restore=False)
    teach(log, 5)
    one.follow()
    assert one.hosted.out_of_service == ""
    snapshot = one.snapshots.load(RECORD.uid, 4)
    assert log.vouch(RECORD.uid, 4, environment(CPU), "other") == snapshot.digest
    abroad = SnapshotStore(one.snapshots._storage.within("abroad"))
    abroad.save(RECORD.uid, 4, snapshot.tensors, {**snapshot.metadata, "environment": "torch 1.0, cpu ABACUS"})
    moved = replica("snapshots/abroad")
    moved.follow()
    assert moved.hosted.environment.startswith(f"{environment(CPU)}, from ")
    assert state_of(moved)[1] == state_of(one)[1]


# ---- Outages and other histories ------------------------------------------------------------------------------------


def test_what_passes_is_waited_for_and_said_once(
    log: SqliteUpdateLog, replica: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(failpoints, "_SET", failpoints._parsed("during_apply=error@3"))
    one = replica(restore=False)
    teach(log, 6)
    one.follow()
    assert "applied again" in caplog.text
    assert one.hosted.weighter.published.position == 6
    assert one.hosted.failure == ""
    assert caplog.text.count("updates wait") == 1


def test_a_snapshot_that_cannot_be_written_only_lengthens_replay(
    log: SqliteUpdateLog, replica: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = replica(restore=False)
    monkeypatch.setattr(failpoints, "_SET", failpoints._parsed("during_snapshot_write=full"))
    teach(log, 6)
    one.follow()
    assert one.snapshots.positions(RECORD.uid) == [0]
    assert "no snapshot of weighter 'prose' at position 4" in caplog.text
    one.stop()
    assert one.snapshots.positions(RECORD.uid) == [0, 6]


@pytest.mark.parametrize(("updates", "words"), [(5, "ends at position 5"), (12, "another history up to position 8")])
def test_a_state_of_another_history_is_refused_and_nothing_overwritten(
    tmp_path: Path, log: SqliteUpdateLog, replica: Make, updates: int, words: str
) -> None:
    before = replica(restore=False)
    teach(log, 8)
    before.follow()
    before.stop()
    kept = snapshot_files(tmp_path / "snapshots")
    with new_log(tmp_path / "other.sqlite", updates, seed=1) as other:
        one = replica(over=other)
        one.follow()
        assert words in one.hosted.failure
        assert "8" in one.hosted.failure
        one.stop()
    assert snapshot_files(tmp_path / "snapshots") == kept


def test_a_damaged_entry_stops_the_weighter(tmp_path: Path, replica: Make, log: SqliteUpdateLog) -> None:
    teach(log, 6)
    log._db.execute("UPDATE entries SET payload = zeroblob(length(payload)) WHERE position = 3")  # type: ignore[union-attr]
    one = replica(restore=False)
    one.follow()
    assert "entry 3" in one.hosted.failure
    assert one.hosted.weighter.published.position == 0
