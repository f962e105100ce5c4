"""What every update log keeps to, and what the SQLite one does with damaged, foreign and contended files.

`UpdateLogContract` runs once for each implementation: a subclass says how to open the log and how to name its storage
to another process. Run as a program, this file appends to a log until it is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from weighting_contract.spec import FeatureSpec, HeadSpec, WeighterSpec
from weighting_service.domain import Estimator, Inputs, JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log import SqliteUpdateLog, UpdateLog
from weighting_service.update_log.encoding import decode, encode

UID, OTHER_UID = "a" * 32, "b" * 32
SPEC = WeighterSpec(features=FeatureSpec(names=("loss", "größe")), head=HeadSpec(temperature=0.1 + 0.2), seed=7)
WEIGHTER = WeighterRecord("prose", UID, SPEC, created_unix_ms=1_700_000_000_123)
OTHER = WeighterRecord("code", OTHER_UID, WeighterSpec(features=FeatureSpec(hidden_size=3)), 5, initial="pretaught")
JOB = JobRecord("job-1", UID, Role.LEARN, ("größe", "loss"))
REFERENCE_JOB = JobRecord(
    "job-2",
    UID,
    Role.FROZEN,
    reference="pretaught",
    reference_checksum="1" * 64,
    documents_checksum="2" * 64,
)

Opener = Callable[[], UpdateLog]


def update_of(step: int, job_id: str = "job-1", samples: int = 4) -> MetaUpdate:
    """A different update for every (job, step), the same one each time; of every kind in turn."""
    rng = np.random.default_rng([step, *job_id.encode()])
    return MetaUpdate(
        job_id=job_id,
        update_id=str(step),
        step=step,
        inputs=Inputs(features=rng.standard_normal((samples, 2), np.float32)),
        cotangent=rng.standard_normal(samples, np.float32),
        scored_position=max(0, step - 1),
        estimator=Estimator.SCORE_FUNCTION if step % 2 else Estimator.VJP,
        probes=rng.random(samples) < 0.5 if step % 3 == 0 else None,
        trust_only=step % 6 == 0,
    )


def arrays_of(update: MetaUpdate) -> dict[str, np.ndarray]:
    arrays = {**update.inputs.arrays(), "cotangent": update.cotangent}
    return arrays if update.probes is None else {**arrays, "probes": update.probes}


def assert_same(got: MetaUpdate, expected: MetaUpdate) -> None:
    arrays, wanted = arrays_of(got), arrays_of(expected)
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    scalars = [f.name for f in dataclasses.fields(MetaUpdate) if f.name not in ("inputs", "cotangent", "probes")]
    assert [getattr(got, name) for name in scalars] == [getattr(expected, name) for name in scalars]
    assert got.digest() == expected.digest()


def profile_of(seed: int, buckets: int = 1024) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(buckets).astype(np.float16)


def assert_profile(log: UpdateLog, job_id: str, expected: np.ndarray) -> None:
    profile = log.profile(job_id)
    assert profile is not None
    assert profile.dtype == np.float16
    np.testing.assert_array_equal(profile, expected)


def rows(path: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(statement).fetchall()


class UpdateLogContract:
    """The tests that every implementation passes; `opener` opens the same storage each time it is called."""

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        raise NotImplementedError

    def storage(self, tmp_path: Path) -> str:
        """What `python test_update_log.py STORAGE` opens."""
        raise NotImplementedError

    @pytest.fixture
    def log(self, opener: Opener) -> Iterator[UpdateLog]:
        with opener() as log:
            log.create_weighter(WEIGHTER)
            log.put_job(JOB)
            yield log

    # ---- weighters and jobs

    def test_weighters_come_back_as_they_were_in_order_of_creation(self, log: UpdateLog, opener: Opener) -> None:
        log.create_weighter(OTHER)
        assert log.weighters() == [WEIGHTER, OTHER]
        log.close()
        with opener() as again:
            assert again.weighters() == [WEIGHTER, OTHER]

    def test_taken_name_or_uid_is_refused(self, log: UpdateLog) -> None:
        with pytest.raises(AlreadyExists, match="name 'prose'"):
            log.create_weighter(dataclasses.replace(OTHER, name="prose"))
        with pytest.raises(AlreadyExists, match=f"uid '{UID}'"):
            log.create_weighter(dataclasses.replace(OTHER, uid=UID))
        assert log.weighters() == [WEIGHTER]

    def test_deleted_weighter_leaves_nothing_and_its_name_is_free(self, log: UpdateLog) -> None:
        log.create_weighter(OTHER)
        log.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN))
        log.append(OTHER_UID, update_of(1, "job-2"))
        log.append(UID, update_of(1))
        log.delete_weighter(UID)
        assert log.weighters() == [OTHER]
        assert log.job("job-1") is None
        assert log.last_taught("job-1") == (-1, 0)
        with pytest.raises(NotFound, match=UID):
            log.head(UID)
        assert log.head(OTHER_UID) == 1

        again = dataclasses.replace(WEIGHTER, uid="c" * 32)
        log.create_weighter(again)
        log.put_job(dataclasses.replace(JOB, weighter_uid=again.uid))
        assert log.head(again.uid) == 0
        appended = log.append(again.uid, update_of(1))
        assert (appended.position, appended.duplicate) == (1, False)

    def test_unknown_weighter_is_not_found(self, log: UpdateLog) -> None:
        for call in (
            lambda: log.append(OTHER_UID, update_of(1)),
            lambda: log.find(OTHER_UID, update_of(1)),
            lambda: log.head(OTHER_UID),
            lambda: log.read(OTHER_UID, 0, 1),
            lambda: log.trim(OTHER_UID, 1),
            lambda: log.jobs(OTHER_UID),
            lambda: log.delete_weighter(OTHER_UID),
            lambda: log.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN)),
        ):
            with pytest.raises(NotFound, match=OTHER_UID):
                call()

    def test_jobs_are_kept_and_replaced(self, log: UpdateLog, opener: Opener) -> None:
        second = JobRecord("job-2", UID, Role.FROZEN, open=False)
        log.put_job(second)
        log.append(UID, update_of(3))
        closed = dataclasses.replace(JOB, open=False, feature_names=("loss", "größe"))
        log.put_job(closed)
        assert log.last_taught("job-1") == (3, 1)
        log.close()
        with opener() as again:
            assert again.jobs(UID) == [closed, second]
            assert again.job("job-2") == second
            assert again.job("job-3") is None

    def test_job_stays_with_its_weighter(self, log: UpdateLog) -> None:
        log.create_weighter(OTHER)
        with pytest.raises(AlreadyExists, match="job-1"):
            log.put_job(dataclasses.replace(JOB, weighter_uid=OTHER_UID))
        with pytest.raises(NotFound, match="job-1"):
            log.append(OTHER_UID, update_of(1))
        assert log.job("job-1") == JOB
        assert log.head(OTHER_UID) == 0

    def test_reference_and_documents_of_a_job_are_kept_and_replaced(self, log: UpdateLog, opener: Opener) -> None:
        log.put_job(REFERENCE_JOB)
        assert log.jobs(UID) == [JOB, REFERENCE_JOB]
        other = dataclasses.replace(
            REFERENCE_JOB, reference="größer", reference_checksum="3" * 64, documents_checksum="4" * 64
        )
        log.put_job(other)
        log.close()
        with opener() as again:
            assert again.job("job-2") == other
            assert again.jobs(UID) == [JOB, other]

    # ---- target profiles

    def test_profile_is_kept_beside_its_job(self, log: UpdateLog, opener: Opener) -> None:
        log.put_job(REFERENCE_JOB, profile_of(1))
        log.put_job(dataclasses.replace(REFERENCE_JOB, open=False))  # leaves the profile as it is
        log.close()
        with opener() as again:
            assert_profile(again, "job-2", profile_of(1))
            assert again.profile("job-1") is None
            assert again.profile("job-9") is None
            assert again.job("job-2") == dataclasses.replace(REFERENCE_JOB, open=False)

            again.put_job(JOB, profile_of(2, buckets=64))
            again.put_job(REFERENCE_JOB, profile_of(3))
            assert_profile(again, "job-1", profile_of(2, buckets=64))
            assert_profile(again, "job-2", profile_of(3))

    def test_profile_of_a_refused_job_is_not_kept(self, log: UpdateLog) -> None:
        log.create_weighter(OTHER)
        log.put_job(JOB, profile_of(1))
        with pytest.raises(AlreadyExists, match="job-1"):
            log.put_job(dataclasses.replace(JOB, weighter_uid=OTHER_UID), profile_of(2))
        assert_profile(log, "job-1", profile_of(1))

    @pytest.mark.parametrize("wrong", [np.zeros(4, np.float32), np.zeros((2, 2), np.float16)])
    def test_profile_of_another_form_is_refused(self, wrong: np.ndarray, log: UpdateLog) -> None:
        with pytest.raises(InvalidArgument, match=r"\[buckets\] float16, got float(32|16) of shape"):
            log.put_job(REFERENCE_JOB, wrong)
        assert log.job("job-2") is None

    def test_profiles_go_with_their_weighter(self, log: UpdateLog) -> None:
        log.create_weighter(OTHER)
        log.put_job(JOB, profile_of(1))
        log.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN), profile_of(2))
        log.delete_weighter(UID)
        assert log.profile("job-1") is None
        log.put_job(dataclasses.replace(JOB, weighter_uid=OTHER_UID))
        assert log.profile("job-1") is None
        assert_profile(log, "job-2", profile_of(2))

    # ---- appending

    def test_positions_are_gapless_and_content_is_kept(self, log: UpdateLog, opener: Opener) -> None:
        assert (log.head(UID), log.read(UID, 0, 10)) == (0, [])
        for step in range(1, 6):
            assert log.append(UID, update_of(step)).position == step
        log.close()
        with opener() as again:
            assert again.head(UID) == 5
            entries = again.read(UID, 0, 10)
            assert [position for position, _ in entries] == [1, 2, 3, 4, 5]
            for position, update in entries:
                assert_same(update, update_of(position))

    def test_retry_finds_the_first_position_also_after_reopening(self, log: UpdateLog, opener: Opener) -> None:
        log.append(UID, update_of(10))
        log.append(UID, update_of(11))
        retry = dataclasses.replace(update_of(10), scored_position=99)  # not part of what is taught
        assert log.append(UID, retry).position == 1
        log.close()
        with opener() as again:
            appended = again.append(UID, retry)
            assert (appended.position, appended.duplicate) == (1, True)
            assert again.find(UID, retry) == 1
            assert again.head(UID) == 2

    def test_other_content_under_a_taken_id_is_refused(self, log: UpdateLog) -> None:
        log.append(UID, update_of(1))
        other = dataclasses.replace(update_of(1), cotangent=-update_of(1).cotangent)
        for call in (log.append, log.find):
            with pytest.raises(AlreadyExists, match=r"update '1' of job 'job-1' .* position 1"):
                call(UID, other)
        assert log.head(UID) == 1
        assert_same(log.read(UID, 0, 2)[0][1], update_of(1))

    def test_probes_and_trust_are_content_too(self, log: UpdateLog) -> None:
        update = dataclasses.replace(update_of(1), probes=np.array([True, False, True, False]))
        log.append(UID, update)
        assert log.append(UID, update).duplicate
        for other in (
            dataclasses.replace(update, probes=None),
            dataclasses.replace(update, probes=~update.drawn_evenly),
            dataclasses.replace(update, trust_only=True),
        ):
            with pytest.raises(AlreadyExists, match="position 1"):
                log.append(UID, other)
        assert_same(log.read(UID, 0, 1)[0][1], update)

    def test_find_knows_what_was_not_taken(self, log: UpdateLog) -> None:
        assert log.find(UID, update_of(1)) is None
        with pytest.raises(NotFound, match="job-9"):
            log.find(UID, update_of(1, "job-9"))

    def test_unknown_job_may_not_teach(self, log: UpdateLog) -> None:
        with pytest.raises(NotFound, match="job-9"):
            log.append(UID, update_of(1, "job-9"))
        assert log.head(UID) == 0

    def test_jobs_interleave_in_one_weighter_and_weighters_do_not_meet(self, log: UpdateLog) -> None:
        log.put_job(JobRecord("job-2", UID, Role.LEARN))
        log.create_weighter(OTHER)
        log.put_job(JobRecord("job-3", OTHER_UID, Role.LEARN))
        order = ["job-1", "job-2", "job-3", "job-2", "job-1", "job-3"]
        positions = []
        for step, job_id in enumerate(order):
            positions.append(log.append(OTHER_UID if job_id == "job-3" else UID, update_of(step, job_id)).position)
        assert positions == [1, 2, 1, 3, 4, 2]
        assert [u.job_id for _, u in log.read(UID, 0, 10)] == ["job-1", "job-2", "job-2", "job-1"]
        assert [u.job_id for _, u in log.read(OTHER_UID, 0, 10)] == ["job-3", "job-3"]
        assert [log.last_taught(f"job-{n}") for n in (1, 2, 3)] == [(4, 4), (3, 3), (5, 2)]

    def test_same_update_id_in_two_jobs_is_two_updates(self, log: UpdateLog) -> None:
        log.put_job(JobRecord("job-2", UID, Role.LEARN))
        assert log.append(UID, update_of(1, "job-1")).position == 1
        assert log.append(UID, update_of(1, "job-2")).position == 2

    def test_last_taught_is_the_highest_step_not_the_last_sent(self, log: UpdateLog) -> None:
        assert log.last_taught("job-1") == (-1, 0)
        for step in (0, 8, 4):
            log.append(UID, update_of(step))
        assert log.last_taught("job-1") == (8, 2)
        log.append(UID, dataclasses.replace(update_of(8), update_id="8, second part"))
        assert log.last_taught("job-1") == (8, 4)
        log.append(UID, update_of(8))  # a retry
        assert log.last_taught("job-1") == (8, 4)

    def test_threads_together_give_gapless_positions(self, log: UpdateLog) -> None:
        jobs = [f"thread-{n}" for n in range(4)]
        for job_id in jobs:
            log.put_job(JobRecord(job_id, UID, Role.LEARN))
        start = threading.Barrier(len(jobs))

        def teach(job_id: str) -> list[int]:
            start.wait(timeout=10)
            positions = [log.append(UID, update_of(step, job_id)).position for step in range(15)]
            retries = [log.append(UID, update_of(step, job_id)) for step in range(15)]
            assert [(r.position, r.duplicate) for r in retries] == [(p, True) for p in positions]
            return positions

        with ThreadPoolExecutor(len(jobs)) as pool:
            positions = list(pool.map(teach, jobs))
        assert sorted(p for one in positions for p in one) == list(range(1, 61))
        assert all(one == sorted(one) for one in positions)
        read = dict(log.read(UID, 0, 100))
        for job_id, one in zip(jobs, positions, strict=True):
            for step, position in enumerate(one):
                assert_same(read[position], update_of(step, job_id))

    def test_threads_racing_with_one_update_record_it_once(self, log: UpdateLog) -> None:
        start = threading.Barrier(4)

        def teach(_: int) -> tuple[int, bool]:
            start.wait(timeout=10)
            appended = log.append(UID, update_of(1))
            return appended.position, appended.duplicate

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(teach, range(4))) == [(1, False), (1, True), (1, True), (1, True)]
        assert log.head(UID) == 1

    # ---- reading and trimming

    def test_read_pages_through_the_log(self, log: UpdateLog) -> None:
        for step in range(1, 8):
            log.append(UID, update_of(step))
        assert [p for p, _ in log.read(UID, 0, 3)] == [1, 2, 3]
        assert [p for p, _ in log.read(UID, 3, 3)] == [4, 5, 6]
        assert [p for p, _ in log.read(UID, 6, 3)] == [7]
        assert log.read(UID, 7, 3) == []

    def test_read_refuses_what_it_cannot_give(self, log: UpdateLog) -> None:
        log.append(UID, update_of(1))
        with pytest.raises(InvalidArgument, match="limit 0"):
            log.read(UID, 0, 0)
        with pytest.raises(InvalidArgument, match="after -1"):
            log.read(UID, -1, 1)
        with pytest.raises(FailedPrecondition, match="ends at position 1"):
            log.read(UID, 2, 1)

    def test_trimmed_updates_are_still_known(self, log: UpdateLog, opener: Opener) -> None:
        for step in range(1, 7):
            log.append(UID, update_of(step))
        log.trim(UID, 4)
        log.trim(UID, 2)  # an earlier one changes nothing
        log.close()
        with opener() as again:
            assert again.head(UID) == 6
            assert [p for p, _ in again.read(UID, 4, 10)] == [5, 6]
            with pytest.raises(FailedPrecondition, match="1 to 4 of weighter 'prose' are trimmed"):
                again.read(UID, 3, 10)
            appended = again.append(UID, update_of(2))
            assert (appended.position, appended.duplicate) == (2, True)
            with pytest.raises(AlreadyExists, match="position 2"):
                again.append(UID, dataclasses.replace(update_of(2), step=77))
            assert again.append(UID, update_of(7)).position == 7

    def test_trimming_everything_keeps_counting(self, log: UpdateLog) -> None:
        for step in range(1, 4):
            log.append(UID, update_of(step))
        log.trim(UID, 100)
        assert (log.head(UID), log.read(UID, 3, 10), log.last_taught("job-1")) == (3, [], (3, 3))
        assert log.append(UID, update_of(4)).position == 4
        assert [p for p, _ in log.read(UID, 3, 10)] == [4]

    def test_appends_and_retries_go_on_while_a_long_trim_runs(self, log: UpdateLog) -> None:
        for step in range(1, 201):
            log.append(UID, update_of(step))
        with ThreadPoolExecutor(1) as pool:
            trimming = pool.submit(log.trim, UID, 190)
            assert [log.append(UID, update_of(step)).position for step in range(191, 221)] == list(range(191, 221))
            trimming.result(timeout=30)
        assert [p for p, _ in log.read(UID, 190, 100)] == list(range(191, 221))
        with pytest.raises(FailedPrecondition, match="1 to 190"):
            log.read(UID, 189, 1)

    def test_size_grows_with_entries(self, log: UpdateLog) -> None:
        before = log.size_bytes()
        for step in range(5):
            log.append(UID, update_of(step, samples=5000))
        assert log.size_bytes() >= before + 5 * 5000 * 3 * 4

    # ---- ends

    def test_closed_log_says_so(self, log: UpdateLog) -> None:
        log.close()
        log.close()
        with pytest.raises(Unavailable, match="closed"):
            log.head(UID)
        with pytest.raises(Unavailable, match="closed"):
            log.append(UID, update_of(1))

    @pytest.mark.parametrize("acknowledged", [1, 40])
    def test_killed_process_loses_nothing_that_it_acknowledged(
        self, acknowledged: int, opener: Opener, tmp_path: Path
    ) -> None:
        command = [sys.executable, __file__, self.storage(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(acknowledged)]
            process.send_signal(signal.SIGKILL)
            told += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
        assert [int(line) for line in told] == list(range(1, len(told) + 1))
        with opener() as log:
            head = log.head(UID)
            assert head in (len(told), len(told) + 1)  # one more may have been recorded, but not told
            entries = log.read(UID, 0, head)
            assert [position for position, _ in entries] == list(range(1, head + 1))
            for position, update in entries:
                assert_same(update, update_of(position))
            for step in range(1, head + 2):  # what the client would do: send again all that it is not sure of
                appended = log.append(UID, update_of(step))
                assert (appended.position, appended.duplicate) == (step, step <= head)


class TestSqliteUpdateLog(UpdateLogContract):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda: SqliteUpdateLog(self.storage(tmp_path))

    def storage(self, tmp_path: Path) -> str:
        return str(tmp_path / "state" / "log.sqlite")  # in a folder that is not there yet


class TestSqliteFile:
    """What is particular to the file: who may use it, and what happens where it is damaged or full."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "log.sqlite"
        with SqliteUpdateLog(path) as log:
            log.create_weighter(WEIGHTER)
            log.put_job(JOB)
            for step in range(1, 21):
                log.append(UID, update_of(step, samples=500))
        return path

    def test_second_opener_is_refused_until_the_first_closes(self, path: Path, tmp_path: Path) -> None:
        link = tmp_path / "link.sqlite"
        link.symlink_to(path)
        with SqliteUpdateLog(path):
            with pytest.raises(FailedPrecondition, match=rf"log.sqlite is in use .*process {os.getpid()}"):
                SqliteUpdateLog(path)
            with pytest.raises(FailedPrecondition, match="is in use"):
                SqliteUpdateLog(link)
            second = subprocess.run(
                [sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=60, check=False
            )
            assert f"is in use by another service (process {os.getpid()})" in second.stderr
        with SqliteUpdateLog(link) as log:
            assert log.head(UID) == 20

    @pytest.mark.parametrize("content", [b"not a database, but someone's notes\n" * 100, b"SQLite format 3\0" * 300])
    def test_other_file_is_refused_and_untouched(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        for _ in range(2):  # the first refusal holds no lock
            with pytest.raises(FailedPrecondition, match=r"notes\.txt is damaged or not an update log"):
                SqliteUpdateLog(path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("version", [0, 3])
    def test_database_of_another_program_is_refused_and_untouched(self, version: int, tmp_path: Path) -> None:
        path = tmp_path / "other.sqlite"
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("CREATE TABLE songs (title TEXT)")
        other.execute(f"PRAGMA user_version = {version}")
        other.close()
        content = path.read_bytes()
        with pytest.raises(FailedPrecondition, match=r"other\.sqlite is a database of another program"):
            SqliteUpdateLog(path)
        assert path.read_bytes() == content

    def test_newer_version_is_refused_and_untouched(self, path: Path) -> None:
        newer = sqlite3.connect(path, isolation_level=None)
        newer.execute("PRAGMA user_version = 99")
        newer.close()
        content = path.read_bytes()
        with pytest.raises(FailedPrecondition, match="newer version of the service: its schema is version 99"):
            SqliteUpdateLog(path)
        assert path.read_bytes() == content

    def test_truncated_file_is_refused_and_untouched(self, path: Path) -> None:
        content = path.read_bytes()[:5000]
        path.write_bytes(content)
        with pytest.raises(FailedPrecondition, match=r"log\.sqlite is damaged"):
            SqliteUpdateLog(path)
        assert path.read_bytes() == content

    def test_empty_file_is_a_new_log(self, tmp_path: Path) -> None:
        path = tmp_path / "log.sqlite"
        path.touch()  # what a crash right after the creation leaves
        with SqliteUpdateLog(path) as log:
            log.create_weighter(WEIGHTER)
            assert log.head(UID) == 0

    def test_folder_in_place_of_the_file_is_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(Unavailable, match=r"update log .* could not be read or written"):
            SqliteUpdateLog(tmp_path)

    def test_flipped_bit_in_an_entry_is_found(self, path: Path) -> None:
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

    def test_lost_and_swapped_entries_are_found(self, path: Path) -> None:
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

    def test_failed_write_records_nothing_and_can_be_tried_again(self, path: Path) -> None:
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
            assert_same(log.read(UID, 20, 1)[0][1], update_of(21, samples=50_000))

    def test_full_disk_says_so_and_records_nothing(self, path: Path) -> None:
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

    def test_damaged_profile_is_found_and_its_job_still_listed(self, path: Path) -> None:
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

    def test_deleted_weighter_frees_the_space_of_its_profiles(self, path: Path) -> None:
        with SqliteUpdateLog(path) as log:
            log.put_job(REFERENCE_JOB, profile_of(1))
            log.delete_weighter(UID)
        assert rows(path, "SELECT count(*) FROM profiles") == [(0,)]

    def test_commits_are_synced(self, path: Path) -> None:
        """No test can cut the power; this one guards the two settings that the durability of an append rests on."""
        with SqliteUpdateLog(path) as log:
            assert log._db is not None
            assert log._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            assert log._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL

    def test_trimmed_space_is_used_again(self, path: Path) -> None:
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


class TestEncoding:
    @pytest.mark.parametrize("probes", [[True] * 4, [False] * 4, [True, False, False, True]])
    def test_probes_round_trip_as_they_are(self, probes: list[bool]) -> None:
        update = dataclasses.replace(update_of(1), probes=np.array(probes), trust_only=True)
        got = decode(encode(update))
        assert_same(got, update)
        assert got.drawn_evenly.tolist() == probes

    @pytest.mark.parametrize("estimator", list(Estimator))
    def test_all_inputs_round_trip_bit_for_bit(self, estimator: Estimator) -> None:
        special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, 1 / 3], np.float32)
        update = MetaUpdate(
            job_id="jöb/1",
            update_id="schritt-七",
            step=2**62,
            inputs=Inputs(
                features=np.stack([special, special[::-1]], axis=1),
                hidden=np.arange(48, dtype=np.float32).reshape(6, 8).T,  # not in C order
                tokens=np.arange(24, dtype=np.int64).reshape(8, 3) - 2**40,
                lengths=np.array([3, 1, 2, 3, 3, 3, 1, 0], np.int64),
            ),
            cotangent=special[::-1],  # negative stride
            scored_position=2**40,
            estimator=estimator,
        )
        assert_same(decode(encode(update)), update)

    def test_absent_inputs_stay_absent_and_empty_ones_empty(self) -> None:
        update = dataclasses.replace(
            update_of(1), inputs=Inputs(hidden=np.zeros((0, 3), np.float32)), cotangent=np.zeros(0, np.float32)
        )
        assert_same(decode(encode(update)), update)

    def test_bytes_that_are_no_update_are_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="not a meta-update"):
            decode(b"\xff" * 20)
        with pytest.raises(InvalidArgument, match="estimator is 0"):
            decode(b"")


def append_until_killed(storage: str) -> None:
    """Appends `update_of` 1, 2, 3, ... and prints each position once the log has answered."""
    with SqliteUpdateLog(storage) as log:
        log.create_weighter(WEIGHTER)
        log.put_job(JOB)
        step = 1
        while True:
            print(log.append(UID, update_of(step)).position, flush=True)
            step += 1


if __name__ == "__main__":
    append_until_killed(sys.argv[1])
