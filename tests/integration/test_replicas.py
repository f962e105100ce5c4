"""Several services on one real Redis and one folder of snapshots: what is done through one shows through the others."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.weighting.v1 import weighting_pb2 as pb
from tests.conftest import ServiceProcess
from tests.redis_server import RedisServer
from tests.waiting import wait_for
from trainer_client import connect
from weighting_contract.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable, WeighbridgeError
from weighting_contract.tensors import from_message, to_message
from weighting_service.embedded import EmbeddedService

NAMES = ("a", "b", "c")
SPEC = pb.WeighterSpec(  # without trust, or random cotangents would soon make all weights 1
    features=pb.FeatureSpec(names=NAMES), head=pb.HeadSpec(width=8), learning=pb.LearningSpec(trust=False)
)
EVERY = 5  # positions between two snapshots
SAMPLES = 10


class Replica:
    """A service in this process, on a log and snapshots that it shares with others."""

    def __init__(self, folder: Path, redis: RedisServer, name: str, **settings: Any) -> None:
        flags: dict[str, Any] = {"snapshot_every": EVERY, "sync_s": 0.02, "threads": 1, **settings}
        self._service = EmbeddedService(folder / name, log=redis.url, snapshots=(folder / "shared").as_uri(), **flags)
        self.close = self._service.close

    def __getattr__(self, method: str) -> Any:
        """The answer of an RPC: `replica.Score(job_id=..., ...)`."""

        def call(**fields: Any) -> Any:
            return self._service.call(method, getattr(pb, f"{method}Request")(**fields), 60)

        return call

    def open(self) -> None:
        self.CreateWeighter(name="w", spec=SPEC, exist_ok=True)
        self.OpenJob(weighter="w", job_id="job")

    def teach(self, step: int, scored_position: int = 0) -> int:
        """The position of the update of that step."""
        rng = np.random.default_rng(step)
        features = rng.standard_normal((SAMPLES, 3), np.float32)
        cotangent = features[:, 1] + rng.standard_normal(SAMPLES, np.float32)
        answer = self.MetaUpdate(
            job_id="job",
            step=step,
            inputs=pb.Inputs(features=to_message(features)),
            cotangent=to_message(cotangent),
            scored_position=scored_position,
        )
        return int(answer.position)

    def weights(self, position: int) -> np.ndarray:
        """Of the state at `position` or later."""
        features = np.random.default_rng(1 << 20).standard_normal((SAMPLES, 3), np.float32)
        inputs = pb.Inputs(features=to_message(features))
        answer = self.Score(job_id="job", inputs=inputs, min_position=position)
        assert answer.position >= position
        return from_message(answer.weights, "weights")

    def files(self) -> dict[str, bytes]:
        return dict(self.ExportWeighter(name="w").files)

    def entry(self) -> Any:
        return self._service._service._weighters._entries["w"]

    def until(self, condition: Callable[[pb.Weighter], bool]) -> pb.Weighter:
        """The weighter once it is so; looks again whenever its applied position has moved."""
        for view in self._service.watch("w"):
            if condition(view):
                return view
        raise AssertionError("the watch ended")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        yield server


@pytest.fixture
def replica(tmp_path: Path, redis: RedisServer) -> Iterator[Callable[..., Replica]]:
    """`replica("name", **settings)`; each is closed at the end."""
    made: list[Replica] = []

    def make(name: str, **settings: Any) -> Replica:
        made.append(Replica(tmp_path, redis, name, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[..., Replica]


def patiently(call: Callable[[], int]) -> int:
    """Tries again as long as the service says that this may help, as a trainer does."""
    answers: list[int] = []

    def answered() -> bool:
        with contextlib.suppress(Unavailable):
            answers.append(call())
        return bool(answers)

    wait_for(answered, timeout_s=60)
    return answers[0]


# ---- Reads and writes -----------------------------------------------------------------------------------------------


def test_any_replica_takes_updates_and_scores_what_another_took(replica: Make) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    for step in range(0, 12, 2):
        assert one.teach(step, scored_position=step) == step + 1
        assert two.teach(step + 1, scored_position=step + 1) == step + 2  # of weights that the other one gave
        one.weights(step + 2)
    np.testing.assert_array_equal(one.weights(12), two.weights(12))
    assert one.files() == two.files()
    assert one.teach(3) == 4, "a retry with another replica is the same update"
    views = [each.GetWeighter(name="w") for each in (one, two)]
    assert [(v.position, v.applied_position) for v in views] == [(12, 12)] * 2
    assert list(views[0].snapshot_positions) == list(views[1].snapshot_positions) == [0, 5, 10]
    with pytest.raises(FailedPrecondition, match="min_position is 13, but the log ends at 12"):
        two.weights(13)


def test_replicas_follow_a_weighter_that_started_from_an_export(replica: Make) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    for step in range(3):
        one.teach(step)
    one.weights(3)
    files = one.files()
    one.DeleteWeighter(name="w")
    wait_for(lambda: not two.ListWeighters().weighters, timeout_s=60)  # or it would compare with the one that is gone
    made = one.CreateWeighter(name="w", files=files)
    assert made.initial.startswith("export:")
    assert two.CreateWeighter(name="w", files=files, exist_ok=True).created_unix_ms == made.created_unix_ms
    two.OpenJob(weighter="w", job_id="job")
    for step in range(10, 17):  # beyond a snapshot
        (one, two)[step % 2].teach(step)
    np.testing.assert_array_equal(one.weights(7), two.weights(7))
    three = replica("three")
    assert three.until(lambda view: view.applied_position == 7).initial == made.initial
    assert one.files() == two.files() == three.files() != files


def test_states_are_equal_at_equal_positions(replica: Make) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    two.open()
    with ThreadPoolExecutor(2) as pool:
        positions = pool.map(lambda step: (one, two)[step % 2].teach(step), range(20))
    assert sorted(positions) == list(range(1, 21))
    np.testing.assert_array_equal(one.weights(20), two.weights(20))
    assert one.files() == two.files()
    assert one.entry().hosted.out_of_service == two.entry().hosted.out_of_service == ""
    late = replica("late")
    np.testing.assert_array_equal(late.weights(20), one.weights(20))


def test_a_weighter_is_made_once_whoever_asks(replica: Make) -> None:
    replicas = [replica("one"), replica("two")]
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda i: replicas[i % 2].CreateWeighter(name="w", spec=SPEC, exist_ok=True), range(4)))
    assert len({view.created_unix_ms for view in views}) == 1
    with pytest.raises(AlreadyExists, match="exists; choose another name"):
        replicas[1].CreateWeighter(name="w", spec=SPEC)
    other = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES), head=pb.HeadSpec(width=16))
    with pytest.raises(AlreadyExists, match="another spec"):
        replicas[0].CreateWeighter(name="w", spec=other, exist_ok=True)


def test_what_one_changes_the_other_knows(replica: Make) -> None:
    one, two = replica("one"), replica("two", sync_s=60)
    one.open()
    assert two.Heartbeat(job_id="job").position == 0
    one.teach(0)
    assert two.OpenJob(weighter="w", job_id="other").job_id == "other"
    one.DeleteWeighter(name="w")
    one.CreateWeighter(name="w", spec=SPEC)
    with pytest.raises(NotFound):
        two.GetWeighter(name="nothing")  # looks at the log once more
    assert two.GetWeighter(name="w").position == 0
    with pytest.raises(NotFound):
        two.Heartbeat(job_id="job")
    one.DeleteWeighter(name="w")
    with pytest.raises(NotFound):
        two.GetWeighter(name="nothing")
    with pytest.raises(NotFound, match="there is no weighter 'w'"):
        two.GetWeighter(name="w")


def test_a_closed_or_quarantined_job_is_so_everywhere(replica: Make) -> None:
    one, two = replica("one"), replica("two", sync_s=60)
    one.open()
    two.teach(0)
    one.QuarantineJob(job_id="job", reason="its losses exploded")
    with pytest.raises(NotFound):
        two.GetWeighter(name="nothing")
    with pytest.raises(FailedPrecondition, match="its losses exploded"):
        two.teach(1)
    one.CloseJob(job_id="job")
    with pytest.raises(NotFound):
        two.GetWeighter(name="nothing")
    with pytest.raises(FailedPrecondition, match="is closed"):
        two.weights(0)
    assert two.GetWeighter(name="w").jobs_open == 0


def test_a_rollback_reaches_every_replica(replica: Make) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    for step in range(5):
        one.teach(step)
    before = one.weights(5)
    for step in range(5, 8):
        two.teach(step)
    assert not np.array_equal(two.weights(8), before)
    with pytest.raises(
        FailedPrecondition, match=r"to_position is 3, but .* has no snapshot there; it has them at 0, 5"
    ):
        two.RollbackWeighter(name="w", to_position=3)
    with pytest.raises(FailedPrecondition, match="ends at position 8, not at the expected 7"):
        two.RollbackWeighter(name="w", to_position=5, expected_position=7)
    assert two.RollbackWeighter(name="w", to_position=5, expected_position=8).position == 9
    for each in (one, two):
        np.testing.assert_array_equal(each.weights(9), before)
    assert one.teach(8) == 10
    np.testing.assert_array_equal(one.weights(10), two.weights(10))
    assert one.files() == two.files()


# ---- Deaths and outages ---------------------------------------------------------------------------------------------


def test_a_client_moves_on_when_its_service_is_killed(tmp_path: Path, redis: RedisServer, replica: Make) -> None:
    flags = ("--log", redis.url, "--snapshots", (tmp_path / "shared").as_uri(), "--snapshot-every", str(EVERY))
    doomed, other = ServiceProcess(tmp_path / "doomed", *flags), ServiceProcess(tmp_path / "other", *flags)
    try:
        url = f"grpc://127.0.0.1:{doomed.address.grpc_port},127.0.0.1:{other.address.grpc_port}"
        with connect(url, on_failure="raise") as client:
            job = client.open_job("job", weighter="w", spec={"features": {"names": list(NAMES)}, "head": {"width": 8}})
            rng = np.random.default_rng(0)
            batches = [rng.standard_normal((SAMPLES, 3), np.float32) for _ in range(20)]
            for step, features in enumerate(batches):
                if step == 10:
                    doomed.kill()
                job.meta_update(features[:, 1], features, step, scored_position=0)
            assert job.flush(60)
            assert client.get_weighter("w").position == 20
    finally:
        for process in (doomed, other):
            if process.process.poll() is None:
                process.kill()
    last = replica("last")
    assert last.GetWeighter(name="w").learning.updates_applied == 20


def test_redis_dies_under_both_and_comes_back(replica: Make, redis: RedisServer) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    for step in range(7):
        one.teach(step)
    for each in (one, two):
        each.weights(7)  # what is not applied by now can't be while Redis is away
    redis.kill()
    for each in (one, two):
        with pytest.raises(Unavailable, match="Redis"):
            each.teach(7)
        each.weights(7)
    redis.start()
    assert patiently(lambda: two.teach(7)) == 8
    assert patiently(lambda: one.teach(8)) == 9
    np.testing.assert_array_equal(one.weights(9), two.weights(9))
    assert one.files() == two.files()


def test_a_log_that_lost_its_end_is_refused_by_name(replica: Make, redis: RedisServer, tmp_path: Path) -> None:
    one, two = replica("one"), replica("two")
    one.open()
    for step in range(6):
        one.teach(step)
    redis.kill()
    shutil.copytree(redis.folder, tmp_path / "older")
    redis.start()
    for step in range(6, 9):
        assert patiently(lambda step=step: one.teach(step)) == step + 1  # type: ignore[misc]
    for each in (one, two):  # two may have met the weighter for the first time while Redis was away
        patiently(lambda each=each: len(each.weights(9)))  # type: ignore[misc]
    redis.kill()
    shutil.rmtree(redis.folder)
    shutil.copytree(tmp_path / "older", redis.folder)
    snapshots = {path: path.read_bytes() for path in (tmp_path / "shared").rglob("*.safetensors")}
    redis.start()
    for each in (one, two):
        with pytest.raises(WeighbridgeError):
            each.until(lambda view: False)
        # Whoever looks first says it: the watch of heads, or the follower.
        watch, follower = "its log ended at position 9 and ends at 6 now", "ends at position 6, but entries after 9"
        with pytest.raises(Unavailable, match=rf"'w' .* is not served: .*({watch}|{follower})"):
            each.weights(0)
        each.close()
    assert {path: path.read_bytes() for path in (tmp_path / "shared").rglob("*.safetensors")} == snapshots


def test_an_update_where_another_was_lost_is_not_acknowledged(replica: Make, redis: RedisServer) -> None:
    one = replica("one", sync_s=60)  # the append is the first to see it
    one.open()
    for step in range(3):
        one.teach(step)
    with redis.client() as client:
        older = {key: client.dump(key) for key in client.scan_iter()}
        one.teach(3)
        one.weights(4)
        with client.pipeline(transaction=True) as at_once:  # nobody sees it empty
            at_once.flushall()
            for key, value in older.items():
                at_once.restore(key, 0, value)
            at_once.execute()
    append, follower = "its log ended at position 4 and ends at 4 now", "ends at position 3, but entries after 4"
    for _ in range(2):
        with pytest.raises(Unavailable, match=rf"'w' .* is not served: .*({append}|{follower})"):
            one.teach(4)
    with pytest.raises(Unavailable, match="is not served"):
        one.weights(0)


def test_a_log_that_was_emptied_is_not_taken_for_a_deletion(replica: Make, redis: RedisServer, tmp_path: Path) -> None:
    one = replica("one")
    one.open()
    for step in range(6):
        one.teach(step)
    one.weights(6)
    with redis.client() as client:
        client.flushall()
    with pytest.raises(WeighbridgeError):
        one.until(lambda view: False)
    watch, follower = "no record of it any more.* at position 6", "has no weighter of uid"  # whoever looks first
    with pytest.raises(Unavailable, match=rf"'w' .* is not served: .*({watch}|{follower})"):
        one.GetWeighter(name="w")
    assert sorted(int(path.stem) for path in (tmp_path / "shared").rglob("*.safetensors")) == [0, 5]


# ---- Divergence -----------------------------------------------------------------------------------------------------


def test_a_replica_that_diverged_reloads_itself(replica: Make, caplog: pytest.LogCaptureFixture) -> None:
    # The first checksum at a position holds: the bad one must not be the first, so it looks when it is asked only.
    good, bad = replica("good"), replica("bad", sync_s=60)
    good.open()
    for step in range(12):
        good.teach(step)
    for each in (good, bad):
        each.weights(12)
    tampered = bad.entry().hosted.weighter
    with torch.no_grad():
        next(iter(tampered._trainable.values())).view(-1)[0].add_(0.5)
    for step in range(12, 14):
        good.teach(step)
    assert not np.array_equal(bad.weights(14), good.weights(14))
    good.teach(14)
    good.weights(15)
    patiently(lambda: len(bad.weights(15)))
    assert bad.entry().hosted.weighter is not tampered
    np.testing.assert_array_equal(bad.weights(15), good.weights(15))
    assert bad.files() == good.files()
    assert "at position 15 is not the one that holds" in caplog.text
