"""Files of the update log's first schema: everything is there after the upgrade, or nothing has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import zlib
from pathlib import Path

import numpy as np
import pytest
from log_samples import (
    JOB,
    OTHER_UID,
    REFERENCE_JOB,
    UID,
    assert_profile,
    assert_same,
    profile_of,
    rows,
    update_in,
    update_of,
)

from weighting_contract.errors import FailedPrecondition, Unavailable
from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service.domain import Estimator, Inputs, JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log import Heads, SqliteUpdateLog, Trimmed
from weighting_service.update_log.encoding import decode, encode

V1_SCHEMA = (
    """CREATE TABLE weighters (
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
        created_unix_ms INTEGER NOT NULL, head INTEGER NOT NULL DEFAULT 0, trimmed INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, job_id TEXT NOT NULL UNIQUE,
        weighter INTEGER NOT NULL REFERENCES weighters (id) ON DELETE CASCADE,
        role TEXT NOT NULL, feature_names TEXT NOT NULL, open INTEGER NOT NULL,
        last_step INTEGER NOT NULL DEFAULT -1, last_position INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX jobs_of_weighter ON jobs (weighter)",
    """CREATE TABLE entries (
        weighter INTEGER NOT NULL REFERENCES weighters (id) ON DELETE CASCADE,
        position INTEGER NOT NULL, crc32 INTEGER NOT NULL, payload BLOB NOT NULL, UNIQUE (weighter, position))""",
    """CREATE TABLE update_ids (
        job INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        update_id TEXT NOT NULL, position INTEGER NOT NULL, digest BLOB NOT NULL,
        PRIMARY KEY (job, update_id)) WITHOUT ROWID""",
    "PRAGMA application_id = 1463964231",
    "PRAGMA user_version = 1",
)
# What version 1 wrote for V1_UPDATE.
V1_PAYLOAD = bytes.fromhex(
    "0a056a6f622d31120137180722210a1f0a07666c6f61743332120202021a100000c03f000000c00000803e000040402a"
    "160a07666c6f617433321201021a080000003f000000bf30063802"
)
V1_DIGEST = bytes.fromhex("e313dc38d76c19d6a63bdfa9c1d07c426a33e95ff7f17902318870bd4df6d59f")
V1_UPDATE = MetaUpdate(
    job_id="job-1",
    update_id="7",
    step=7,
    inputs=Inputs(features=np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)),
    cotangent=np.array([0.5, -0.5], np.float32),
    scored_position=6,
    estimator=Estimator.SCORE_FUNCTION,
)
V1_SPEC = WeighterSpec(features=FeatureSpec(names=("loss", "größe")), head=HeadSpec(temperature=0.5))
# There was no trust, running mean or penalty then, whatever is usual by now.
AS_IT_LEARNED = dataclasses.replace(V1_SPEC, learning=LearningSpec(trust=False, averaging=0.0, logit_penalty=0.0))


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    names = [str(name) for (name,) in rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: rows(path, f"PRAGMA table_info({name})") for name in names}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two weighters; the first, trimmed up to 1, was taught twice by job-1."""
    path = tmp_path / "log.sqlite"
    spec = V1_SPEC.to_dict()
    del spec["features"]["tokenizer_checksum"]  # not known then
    for name in ("trust", "averaging", "logit_penalty"):
        del spec["learning"][name]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        for statement in V1_SCHEMA:
            db.execute(statement)
        weighter = "INSERT INTO weighters (uid, name, spec, created_unix_ms, head, trimmed) VALUES (?, ?, ?, ?, ?, ?)"
        db.execute(weighter, (UID, "prose", json.dumps(spec), 1_700_000_000_123, 2, 1))
        db.execute(weighter, (OTHER_UID, "code", json.dumps(spec), 5, 0, 0))
        job = "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        db.execute(job, (1, "job-1", 1, "learn", '["gr\\u00f6\\u00dfe", "loss"]', 1, 7, 2))
        db.execute(job, (2, "job-2", 2, "frozen", "[]", 0, -1, 0))
        db.execute("INSERT INTO update_ids VALUES (1, '3', 1, ?)", (b"d" * 32,))
        db.execute("INSERT INTO update_ids VALUES (1, '7', 2, ?)", (V1_DIGEST,))
        crc = zlib.crc32(V1_PAYLOAD, zlib.crc32(f"{UID}:2;".encode()))
        db.execute("INSERT INTO entries VALUES (1, 2, ?, ?)", (crc, V1_PAYLOAD))
    return path


def test_everything_is_there_and_new_things_are_kept(path: Path) -> None:
    for _ in range(2):
        with SqliteUpdateLog(path) as log:
            assert log.weighters() == [
                WeighterRecord("prose", UID, AS_IT_LEARNED, 1_700_000_000_123),
                WeighterRecord("code", OTHER_UID, AS_IT_LEARNED, 5),
            ]
            assert log.job("job-1") == JOB
            assert log.jobs(OTHER_UID) == [JobRecord("job-2", OTHER_UID, Role.FROZEN, open=False)]
            assert (log.open_jobs(UID), log.open_jobs(OTHER_UID)) == ([JOB], [])
            assert log.profile("job-1") is None
            assert (log.head(UID), log.last_taught("job-1"), log.last_taught("job-2")) == (2, (7, 2), (-1, 0))
            (entry,) = log.read(UID, 1, 10, chain="anything: entries had no chain then")
            assert (entry.position, entry.chain) == (2, "")
            assert_same(update_in(entry), V1_UPDATE)
            assert log.read(UID, 2, 10, chain="anything") == []
            assert log.heads() == Heads(0, {UID: 2, OTHER_UID: 0})
            assert log.jobs_seen(["job-1", "job-2"]) == {}
            appended = log.append(UID, V1_UPDATE)
            assert (appended.position, appended.duplicate) == (2, True)
            with pytest.raises(Trimmed, match="1 to 1 of weighter 'prose' are trimmed"):
                log.read(UID, 0, 10)
    assert rows(path, "PRAGMA user_version") == [(3,)]

    referring = dataclasses.replace(REFERENCE_JOB, job_id="job-1", role=Role.LEARN)
    with SqliteUpdateLog(path) as log:
        log.put_job(referring, profile_of(1))
        assert log.append(UID, update_of(12)).position == 3
    with SqliteUpdateLog(path) as log:
        assert log.job("job-1") == referring
        assert log.last_taught("job-1") == (12, 3)
        assert_profile(log, "job-1", profile_of(1))
        (entry,) = log.read(UID, 2, 1)
        assert_same(update_in(entry), update_of(12))
        assert log.read(UID, 3, 1, chain=entry.chain) == []
        with pytest.raises(FailedPrecondition, match="another history up to position 3"):
            log.read(UID, 3, 1, chain="0" * 40)


def test_an_upgraded_file_is_like_a_new_one(path: Path, tmp_path: Path) -> None:
    SqliteUpdateLog(path).close()
    SqliteUpdateLog(tmp_path / "new.sqlite").close()
    assert columns(path) == columns(tmp_path / "new.sqlite")
    indexes = "SELECT name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
    assert rows(path, indexes) == rows(tmp_path / "new.sqlite", indexes)


def test_an_upgrade_that_fails_changes_nothing(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE vouched (anything TEXT)")  # one of the last that the upgrade makes
    before = columns(path)
    with pytest.raises(Unavailable, match=r"log\.sqlite .*vouched already exists.*nothing was recorded"):
        SqliteUpdateLog(path)
    assert columns(path) == before
    assert rows(path, "PRAGMA user_version") == [(1,)]


def test_entries_without_probes_are_written_as_before() -> None:
    assert_same(decode(V1_PAYLOAD), V1_UPDATE)
    assert encode(V1_UPDATE) == V1_PAYLOAD
    assert V1_UPDATE.digest() == V1_DIGEST
