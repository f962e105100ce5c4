"""Full disks, damaged files, a Redis that is away or has forgotten: what the service says, serves and leaves alone."""

from __future__ import annotations

import hashlib
import re
import resource
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.forked import ForkedService
from benchmarks.soak import FLAGS, Remains, differences, log_flags, undisturbed
from benchmarks.soak_client import SAMPLES, WEIGHTER, Trainer, score, update
from protos.weighting.v1 import weighting_pb2 as pb
from tests.redis_server import RedisServer
from weighting_contract.tensors import from_message

SEED = 30
OLDER_AT = 60
KILLED_AT = 100  # snapshots at 40 and 80, the log trimmed up to 24
UPDATES = 130

Start = Callable[..., Trainer]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Remains]:
    return undisturbed(tmp_path_factory.mktemp("twin"), SEED, UPDATES)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A trainer of a service that is up: `start(failpoint=..., redis=...)`."""
    services = []

    def begin(failpoint: str = "", redis: RedisServer | None = None) -> Trainer:
        state = tmp_path / "state"
        services.append(ForkedService(state, *FLAGS, *log_flags(state, redis)))
        trainer = Trainer(services[-1], SEED, redis)
        trainer.begin(failpoint)
        return trainer

    yield begin
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Of a service that was killed at KILLED_AT. Beside its log lies a copy of it as it was at OLDER_AT."""
    trainer = Trainer(ForkedService(tmp_path_factory.mktemp("taught"), *FLAGS), SEED)
    try:
        for updates in (OLDER_AT, KILLED_AT):
            trainer.begin()
            trainer.teach(updates)
            trainer.service.kill()
            with closing(sqlite3.connect(log_of(trainer))) as db:  # brings all of it into its one file
                assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            if updates == OLDER_AT:
                shutil.copy(log_of(trainer), older_log_of(trainer))
    finally:
        trainer.service.close()
    return trainer


@pytest.fixture
def killed(taught: Trainer, tmp_path: Path) -> Iterator[Trainer]:
    """`taught` with files of its own."""
    state = tmp_path / "state"
    shutil.copytree(taught.service.state, state)
    service = ForkedService(state, *FLAGS)
    yield replace(taught, service=service, positions=[*taught.positions], scores={**taught.scores})
    service.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        yield server


def finishes_as(twin: tuple[Trainer, Remains], trainer: Trainer) -> None:
    """Teaches the rest; nothing was lost, and the state is that of an undisturbed service."""
    trainer.teach(UPDATES)
    assert trainer.audit() == []
    assert differences(trainer, Remains.of(trainer.service), *twin) == []


def refused(trainer: Trainer, method: str, request: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(trainer.service.stub, method)(request, timeout=30)
    return caught.value


def next_update(trainer: Trainer) -> pb.MetaUpdateRequest:
    return update(SEED, len(trainer.positions))


def scores_at(trainer: Trainer, position: int) -> None:
    """Weights of the state at `position` are served."""
    scores = trainer.service.stub.Score(score(SEED, 7, position), timeout=30)
    assert scores.position == position
    assert from_message(scores.weights, "weights").sum() == pytest.approx(SAMPLES, rel=1e-5)


def serves_nothing(trainer: Trainer, *words: str) -> None:
    """A running service says why it does not serve the weighter, and gives no weights of it."""
    for method, request in (("Score", score(SEED, 7, 0)), ("MetaUpdate", next_update(trainer))):
        error = refused(trainer, method, request)
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION), error
        for word in (WEIGHTER, *words):
            assert word in error.details()


def refuses_to_start(service: ForkedService, *words: str) -> None:
    service.said.clear()
    service.start()
    assert not service.ready()
    assert service.wait() == 2
    said = "".join(service.said)
    assert "Traceback" not in said
    for word in words:
        assert word in said


def starts(trainer: Trainer) -> None:
    """The service comes up, whatever it has and has not."""
    trainer.service.start()
    assert trainer.service.ready(), trainer.service.last_words()


def log_of(trainer: Trainer) -> Path:
    return trainer.service.state / "log.sqlite"


def older_log_of(trainer: Trainer) -> Path:
    return trainer.service.state / "older.sqlite"


def snapshots(trainer: Trainer) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(trainer.service.state.glob("snapshots/*/*.safetensors"))}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digests(folder: Path) -> Counter[str]:
    """Of all files: a file that was moved aside is still the evidence that it was."""
    return Counter(digest(path) for path in folder.rglob("*") if path.is_file())


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(content)


# ---- Full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_an_update_and_takes_it_later(start: Start, twin: tuple[Trainer, Remains]) -> None:
    trainer = start(failpoint="before_append=full@31")
    trainer.teach(30)
    error = refused(trainer, "MetaUpdate", next_update(trainer))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "disk" in error.details()
    assert "nothing was recorded" in error.details()
    scores_at(trainer, 30)
    finishes_as(twin, trainer)


def test_a_disk_too_full_for_a_snapshot_only_lengthens_replay(start: Start, twin: tuple[Trainer, Remains]) -> None:
    trainer = start(failpoint="during_snapshot_write=full@3")  # after those at 0 and 40
    trainer.teach(110)
    scores_at(trainer, 110)
    assert 80 not in snapshots(trainer)
    assert list(trainer.service.state.glob("snapshots/**/*.tmp")) == []
    trainer.service.kill()
    assert any("snapshot" in line and "No space left" in line for line in trainer.service.said)
    trainer.begin()
    scores_at(trainer, 110)
    finishes_as(twin, trainer)


def test_files_that_may_not_grow(start: Start, twin: tuple[Trainer, Remains]) -> None:
    trainer = start()
    trainer.teach(60)
    soft, hard = resource.prlimit(trainer.service.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(trainer.service.pid, resource.RLIMIT_FSIZE, (1, hard))
    error = refused(trainer, "MetaUpdate", next_update(trainer))
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert "log.sqlite" in error.details()
    scores_at(trainer, 60)
    resource.prlimit(trainer.service.pid, resource.RLIMIT_FSIZE, (soft, hard))
    finishes_as(twin, trainer)


# ---- A damaged log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["half", "a part of a page"])
def test_a_log_that_was_cut_short(killed: Trainer, left: str) -> None:
    file = log_of(killed)
    size = file.stat().st_size
    with open(file, "r+b") as cut:
        cut.truncate(size // 2 if left == "half" else size - 1000)
    before = digest(file)
    refuses_to_start(killed.service, str(file), "damaged")
    assert digest(file) == before


def test_a_log_that_is_empty_or_gone(killed: Trainer) -> None:
    file = log_of(killed)
    before = digests(killed.service.state / "snapshots")
    for lose in (lambda: file.write_bytes(b""), file.unlink):
        lose()
        refuses_to_start(killed.service, "the update log is empty, but there are snapshots of 1 weighters")
    assert digests(killed.service.state / "snapshots") == before


def test_flipped_bits_in_the_header_of_the_log(killed: Trainer) -> None:
    file = log_of(killed)
    flip(file, 3)
    before = digest(file)
    refuses_to_start(killed.service, str(file), "damaged or not an update log", "restore it from a copy")
    assert digest(file) == before


def test_flipped_bits_in_an_entry(killed: Trainer) -> None:
    file, position = log_of(killed), 90
    with closing(sqlite3.connect(file)) as db:
        payload = db.execute("SELECT payload FROM entries WHERE position = ?", (position,)).fetchone()[0]
    flip(file, file.read_bytes().index(payload) + len(payload) // 2)
    before = digest(file)
    starts(killed)
    serves_nothing(killed, f"entry {position}", "damaged", str(file))
    killed.service.kill()
    assert digest(file) == before


def test_an_older_copy_of_the_log(killed: Trainer) -> None:
    file = log_of(killed)
    shutil.copy(older_log_of(killed), file)
    before = digest(file), digests(killed.service.state / "snapshots")
    starts(killed)
    serves_nothing(killed, "at position 80", f"ends at {OLDER_AT}", "the log has lost updates")
    killed.service.kill()
    assert (digest(file), digests(killed.service.state / "snapshots")) == before


# ---- Damaged snapshots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["half written", "flipped bits"])
def test_the_newest_snapshot_is_damaged(killed: Trainer, twin: tuple[Trainer, Remains], damage: str) -> None:
    newest = snapshots(killed)[80]
    spoil(newest, damage)
    before = digest(newest)
    killed.begin()
    scores_at(killed, KILLED_AT)
    assert any(str(newest) in line and "damaged" in line for line in killed.service.said)
    finishes_as(twin, killed)
    assert digests(newest.parent)[before] == 1


def test_all_snapshots_are_damaged_and_the_log_is_trimmed(killed: Trainer) -> None:
    for path, damage in zip(snapshots(killed).values(), ("half written", "flipped bits"), strict=True):
        spoil(path, damage)
    before = digests(killed.service.state / "snapshots")
    starts(killed)
    serves_nothing(killed, "snapshot", "trimmed")
    killed.service.kill()
    assert digests(killed.service.state / "snapshots") == before


def spoil(snapshot: Path, damage: str) -> None:
    size = snapshot.stat().st_size
    if damage == "flipped bits":
        flip(snapshot, size - 40)  # in a tensor
    else:
        with open(snapshot, "r+b") as file:
            file.truncate(size // 2)


# ---- Redis ----------------------------------------------------------------------------------------------------------


def test_redis_gone_and_back(start: Start, redis: RedisServer, twin: tuple[Trainer, Remains]) -> None:
    trainer = start(redis=redis)
    trainer.teach(60)
    scores_at(trainer, 60)
    redis.kill()
    for _ in range(2):
        error = refused(trainer, "MetaUpdate", next_update(trainer))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "Redis" in error.details()
        scores_at(trainer, 60)
    redis.restart()
    finishes_as(twin, trainer)


def test_redis_that_lost_its_end_under_a_running_service(start: Start, redis: RedisServer, tmp_path: Path) -> None:
    trainer = start(redis=redis)
    trainer.teach(60)
    redis.kill()
    shutil.copytree(redis.folder, tmp_path / "older")
    redis.restart()
    trainer.teach(100)
    put_back(redis, tmp_path / "older")
    before = digests(trainer.service.state / "snapshots")
    wait_until_refused(trainer)
    serves_nothing(trainer, "ended at position 100", "ends at 60", "the log has lost updates")
    trainer.service.kill()
    assert before <= digests(trainer.service.state / "snapshots")


def test_redis_that_lost_its_end_while_the_service_was_down(start: Start, redis: RedisServer, tmp_path: Path) -> None:
    trainer = start(redis=redis)
    trainer.teach(60)
    redis.kill()
    shutil.copytree(redis.folder, tmp_path / "older")
    redis.restart()
    trainer.teach(100)
    trainer.service.kill()
    put_back(redis, tmp_path / "older")
    before = digests(trainer.service.state / "snapshots")
    starts(trainer)
    serves_nothing(trainer, "at position 80", "ends at 60", "the log has lost updates")
    trainer.service.kill()
    assert before <= digests(trainer.service.state / "snapshots")


def test_redis_that_lost_everything(start: Start, redis: RedisServer, tmp_path: Path) -> None:
    trainer = start(redis=redis)
    empty = tmp_path / "empty"
    empty.mkdir()
    trainer.teach(60)
    put_back(redis, empty)
    wait_until_refused(trainer)
    error = refused(trainer, "GetWeighter", pb.GetWeighterRequest(name=WEIGHTER))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert re.search("log has no (record of it|weighter of uid)", error.details())
    code = refused(trainer, "Score", score(SEED, 7, 0)).code()
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)  # the log has no record of its job either
    trainer.service.kill()
    refuses_to_start(trainer.service, "the update log is empty, but there are snapshots of 1 weighters")


def put_back(redis: RedisServer, copy: Path) -> None:
    """Redis comes up with what it had when the copy was made."""
    redis.kill()
    shutil.rmtree(redis.folder)
    shutil.copytree(copy, redis.folder)
    redis.restart()


def wait_until_refused(trainer: Trainer) -> None:
    """The service looks at the log every so often; a watch ends when it takes the weighter out of service."""
    with pytest.raises(grpc.RpcError):
        for _ in trainer.service.stub.WatchWeighter(pb.WatchWeighterRequest(name=WEIGHTER), timeout=30):
            pass
