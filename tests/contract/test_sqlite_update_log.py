"""What is particular to the SQLite log's file: who may use it; what happens where it is damaged, foreign or full."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from log_samples import (
    JOB,
    REFERENCE_JOB,
    UID,
    WEIGHTER,
    assert_profile,
    assert_same,
    profile_of,
    rows,
    update_in,
    update_of,
)

from weighting_contract.errors import FailedPrecondition, Internal, ResourceExhausted, Unavailable
from weighting_service.domain import JobRecord, Role
from weighting_service.update_log import SqliteUpdateLog

APPENDER = Path(__file__).with_name("append_until_killed.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "log.sqlite"
    with SqliteUpdateLog(path) as log:
        log.create_weighter(WEIGHTER)
        log.put_job(JOB)
        for step in range(1, 21):
            log.append(UID, update_of(step, samples=500))
    return path


def test_second_opener_is_refused_until_the_first_closes(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    with SqliteUpdateLog(path):
        with pytest.raises(FailedPrecondition, match=rf"log.sqlite is in use .*process {os.getpid()}"):
            SqliteUpdateLog(path)
        with pytest.raises(FailedPrecondition, match="is in use"):
            SqliteUpdateLog(link)
        second = subprocess.run(
            [sys.executable, str(APPENDER), str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert f"is in use by another service (process {os.getpid()})" in second.stderr
    with SqliteUpdateLog(link) as log:
        assert log.head(UID) == 20


@pytest.mark.parametrize("content", [b"not a database, but someone's notes\n" * 100, b"SQLite format 3\0" * 300])
def test_other_file_is_refused_and_untouched(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for _ in range(2):  # the first refusal holds no lock
        with pytest.raises(FailedPrecondition, match=r"notes\.txt is damaged or not an update log"):
            SqliteUpdateLog(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("version", [0, 3])
def test_database_of_another_program_is_refused_and_untouched(version: int, tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE songs (title TEXT)")
    other.execute(f"PRAGMA user_version = {version}")
    other.close()
    content = path.read_bytes()
    with pytest.raises(FailedPrecondition, match=r"other\.sqlite is a database of another program"):
        SqliteUpdateLog(path)
    assert path.read_bytes() == content


def test_newer_version_is_refused_and_untouched(path: Path) -> None:
    newer = sqlite3.connect(path, isolation_level=None)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    content = path.read_bytes()
    with pytest.raises(FailedPrecondition, match="newer version of the service: its schema is version 99"):
        SqliteUpdateLog(path)
    assert path.read_bytes() == content


def test_truncated_file_is_refused_and_untouched(path: Path) -> None:
    content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(FailedPrecondition, match=r"log\.sqlite is damaged"):
        SqliteUpdateLog(path)
    assert path.read_bytes() == content


def test_empty_file_is_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    path.touch()  # what a crash right after the creation leaves
    with SqliteUpdateLog(path) as log:
        log.create_weighter(WEIGHTER)
        assert log.head(UID) == 0


def test_folder_in_place_of_the_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"update log .* could not be read or written"):
        SqliteUpdateLog(tmp_path)


def test_flipped_bit_in_an_entry_is_found(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.find(update_of(7, samples=500).cotangent[:8].tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with SqliteUpdateLog(path) as log:
        assert len(log.read(UID, 0, 6)) == 6
        with pytest.raises(Internal, match=rf"entry 7 of weighter 'prose' \({UID}\).*log\.sqlite is damaged"):
            log.read(UID, 0, 20)
        assert len(log.read(UID, 7, 20)) == 13


def test_lost_and_swapped_entries_are_found(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DELETE FROM entries WHERE position IN (9, 20)")
    payload, crc = other.execute("SELECT payload, crc32 FROM entries WHERE position = 3").fetchone()
    other.execute("UPDATE entries SET payload = ?, crc32 = ? WHERE position = 4", (payload, crc))
    other.close()
    with SqliteUpdateLog(path) as log:
        with pytest.raises(Internal, match="entry 4 of weighter 'prose'"):
            log.read(UID, 3, 1)
        with pytest.raises(Internal, match=r"entry 9 of weighter 'prose' .* is missing"):
            log.read(UID, 4, 10)
        with pytest.raises(Internal, match=r"entry 20 of weighter 'prose' .* is missing"):
            log.read(UID, 19, 10)


def test_failed_write_records_nothing_and_can_be_tried_again(path: Path) -> None:
    with SqliteUpdateLog(path) as log:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))  # of any file that this process writes
        try:
            with pytest.raises(Unavailable, match=r"log\.sqlite .*nothing was recorded"):
                log.append(UID, update_of(21, samples=50_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert log.head(UID) == 20
        assert log.find(UID, update_of(21, samples=50_000)) is None
        appended = log.append(UID, update_of(21, samples=50_000))
        assert (appended.position, appended.duplicate) == (21, False)
        assert_same(update_in(log.read(UID, 20, 1)[0]), update_of(21, samples=50_000))


def test_full_disk_says_so_and_records_nothing(path: Path) -> None:
    with SqliteUpdateLog(path) as log:
        db = log._db  # the one way to a full disk that needs no root
        assert db is not None
        db.execute("PRAGMA max_page_count = 1")  # as small as the file is
        with pytest.raises(ResourceExhausted, match=r"disk of the update log .*log\.sqlite is full") as caught:
            log.append(UID, update_of(21, samples=5000))
        assert caught.value.retry_after_s > 0
        assert log.head(UID) == 20
        db.execute("PRAGMA max_page_count = 1000000")
        assert log.append(UID, update_of(21, samples=5000)).position == 21


def test_damaged_profile_is_found_and_its_job_still_listed(path: Path) -> None:
    with SqliteUpdateLog(path) as log:
        log.put_job(REFERENCE_JOB, profile_of(1))
    content = bytearray(path.read_bytes())
    at = content.find(profile_of(1)[:8].tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with SqliteUpdateLog(path) as log:
        assert log.jobs(UID) == [JOB, REFERENCE_JOB]
        with pytest.raises(Internal, match=r"profile of job 'job-2' in .*log\.sqlite is damaged"):
            log.profile("job-2")
        log.put_job(REFERENCE_JOB, profile_of(1))
        assert_profile(log, "job-2", profile_of(1))


def test_open_jobs_cost_nothing_for_closed_ones(path: Path) -> None:
    with SqliteUpdateLog(path) as log:

        def steps() -> int:
            """Of SQLite's machine, for the open jobs."""
            count = 0

            def counted() -> int:
                nonlocal count
                count += 1
                return 0

            db = log._db
            assert db is not None
            db.set_progress_handler(counted, 1)
            assert log.open_jobs(UID) == [JOB]
            db.set_progress_handler(None, 1)
            return count

        before = steps()
        for number in range(20):
            log.put_job(JobRecord(f"closed-{number}", UID, Role.LEARN, open=False))
        assert steps() == before > 0


def test_deleted_weighter_frees_the_space_of_its_profiles(path: Path) -> None:
    with SqliteUpdateLog(path) as log:
        log.put_job(REFERENCE_JOB, profile_of(1))
        log.delete_weighter(UID)
    assert rows(path, "SELECT count(*) FROM profiles") == [(0,)]


def test_commits_are_synced(path: Path) -> None:
    """No test can cut the power; this one guards the two settings that the durability of an append rests on."""
    with SqliteUpdateLog(path) as log:
        assert log._db is not None
        assert log._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert log._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_trimmed_space_is_used_again(path: Path) -> None:
    with SqliteUpdateLog(path) as log:
        for step in range(21, 41):
            log.append(UID, update_of(step, samples=5000))
            log.trim(UID, step - 1)
    after_twenty = path.stat().st_size
    with SqliteUpdateLog(path) as log:
        for step in range(41, 141):
            log.append(UID, update_of(step, samples=5000))
            log.trim(UID, step - 1)
    assert path.stat().st_size <= after_twenty + 32 * 1024  # update ids stay; 100 entries would be 6 MB
