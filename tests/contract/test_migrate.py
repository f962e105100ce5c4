"""The command that moves an update log from one storage to another, with real files and a real Redis."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from log_samples import (
    JOB,
    OTHER,
    OTHER_UID,
    REFERENCE_JOB,
    UID,
    WEIGHTER,
    assert_profile,
    assert_same,
    profile_of,
    update_in,
    update_of,
)

from tests.redis_server import RedisServer
from weighting_service.domain import JobRecord, Role, Rollback
from weighting_service.migrate import main
from weighting_service.update_log import RedisUpdateLog, SqliteUpdateLog

CODE_JOB = JobRecord("job-3", OTHER_UID, Role.LEARN, quarantined="nonsense")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two weighters; the first has 250 updates, of which 40 are trimmed, and a rollback."""
    with SqliteUpdateLog(tmp_path / "state" / "log.sqlite") as log:
        log.create_weighter(dataclasses.replace(WEIGHTER, shared_with=("team-b",)))
        log.put_job(JOB)
        log.put_job(REFERENCE_JOB, profile_of(1))
        for step in range(1, 251):
            log.append(UID, update_of(step))
        log.append_rollback(UID, Rollback(7, b"state" * 100), 250)
        log.trim(UID, 40)
        log.vouch(UID, 200, "cpu", "checksum")
        log.touch_jobs({"job-1": 1_700_000_000_123})
        log.create_weighter(OTHER)
        log.put_job(CODE_JOB)
        log.append(OTHER_UID, update_of(1, "job-3"))
    return tmp_path / "state"


def test_all_of_a_log_moves_to_redis_and_back(
    state: Path, redis_server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, back = redis_server.new_log_url(), tmp_path / "back"
    assert main(["--from", str(state), "--to", url]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "2 weighters, of which 0 are there already"
    assert [f"weighter 'prose': {percent} %" for percent in range(10, 110, 10)][:9] == told[1:10]
    assert "weighter 'prose': 251 updates, 2 jobs: copied and compared" in told
    assert main(["--from", url, "--to", str(back / "log.sqlite")]) == 0

    with (
        SqliteUpdateLog(state / "log.sqlite") as source,
        RedisUpdateLog(url) as moved,
        SqliteUpdateLog(back / "log.sqlite") as again,
    ):
        for log in (moved, again):
            assert log.weighters() == source.weighters()
            assert [log.export(uid) for uid in (UID, OTHER_UID)] == [source.export(uid) for uid in (UID, OTHER_UID)]
            assert log.trimmed(UID) == 40
            for ours, theirs in zip(source.read(UID, 40, 1000), log.read(UID, 40, 1000), strict=True):
                assert (ours.position, ours.chain) == (theirs.position, theirs.chain)
                if ours.position <= 250:
                    assert_same(update_in(theirs), update_of(ours.position))
            assert_profile(log, "job-2", profile_of(1))
            for step in (3, 250):  # trimmed, and not
                appended = log.append(UID, update_of(step))
                assert (appended.position, appended.duplicate) == (step, True)
            assert log.append(UID, update_of(251)).position == 252


def test_repeated_after_an_interruption_it_copies_the_rest(
    state: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = redis_server.new_log_url()
    with SqliteUpdateLog(state / "log.sqlite") as source, RedisUpdateLog(url) as target:
        target.import_(source.export(OTHER_UID), source.read(OTHER_UID, 0, 10), source.taken(OTHER_UID))
    assert main(["--from", str(state / "log.sqlite"), "--to", url]) == 0
    assert "2 weighters, of which 1 are there already" in capsys.readouterr().out
    with RedisUpdateLog(url) as target:
        assert target.heads().positions == {UID: 251, OTHER_UID: 1}
    assert main(["--from", str(state), "--to", url]) == 0


def test_target_that_went_on_is_refused_before_anything_is_copied(
    state: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = redis_server.new_log_url()
    with SqliteUpdateLog(state / "log.sqlite") as source, RedisUpdateLog(url) as target:
        target.import_(source.export(OTHER_UID), source.read(OTHER_UID, 0, 10), source.taken(OTHER_UID))
        target.append(OTHER_UID, update_of(2, "job-3"))
    assert main(["--from", str(state), "--to", url]) == 1
    assert "the target has weighter 'code' already, with another history" in capsys.readouterr().err
    with RedisUpdateLog(url) as target:
        assert target.heads().positions == {OTHER_UID: 2}


def test_taken_name_is_refused_before_anything_is_copied(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SqliteUpdateLog(tmp_path / "target" / "log.sqlite") as target:
        target.create_weighter(dataclasses.replace(OTHER, uid="c" * 32))
    assert main(["--from", str(state), "--to", str(tmp_path / "target")]) == 1
    assert "another weighter of the name 'code'" in capsys.readouterr().err
    with SqliteUpdateLog(tmp_path / "target" / "log.sqlite") as target:
        assert [record.uid for record in target.weighters()] == ["c" * 32]


def test_what_stands_in_the_way_is_said(
    state: Path, redis_server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = redis_server.new_log_url()
    assert main(["--from", str(tmp_path / "nowhere"), "--to", url]) == 1
    assert "there is no update log" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    with SqliteUpdateLog(state / "log.sqlite"):
        assert main(["--from", str(state), "--to", url]) == 1
    assert "is in use by another service" in capsys.readouterr().err
    assert main(["--from", str(state), "--to", "http://localhost"]) == 1
    assert "expected redis://HOST:PORT/DB" in capsys.readouterr().err
