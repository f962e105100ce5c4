"""What every update log keeps to: the SQLite one and the one in Redis."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from append_until_killed import open_log
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
from weighting_contract.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from weighting_service import failpoints
from weighting_service.domain import JobRecord, Role, Rollback
from weighting_service.update_log import Heads, LogEntry, SqliteUpdateLog, Trimmed, UpdateLog

APPENDER = Path(__file__).with_name("append_until_killed.py")

Opener = Callable[[], UpdateLog]


def open_jobs(log: UpdateLog, uid: str) -> list[JobRecord]:
    found = log.open_jobs(uid)
    assert found == [job for job in log.jobs(uid) if job.open]
    return found


class UpdateLogContract:
    """The tests that every implementation passes; `opener` opens the same storage each time it is called."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> str:
        """Path or URL of an empty log."""
        raise NotImplementedError

    @pytest.fixture
    def opener(self, storage: str) -> Opener:
        return lambda: open_log(storage)

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
            lambda: log.trimmed(OTHER_UID),
            lambda: log.read(OTHER_UID, 0, 1),
            lambda: log.trim(OTHER_UID, 1),
            lambda: log.jobs(OTHER_UID),
            lambda: log.open_jobs(OTHER_UID),
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

    def test_open_jobs_are_those_of_all_that_are_open(self, log: UpdateLog, opener: Opener) -> None:
        log.create_weighter(OTHER)
        ids = [f"job-{n}" for n in (1, 10, 9, 2)]  # neither their order by name nor that of a hash
        first, second, third, fourth = jobs = [JobRecord(job_id, UID, Role.LEARN) for job_id in ids]
        for job in jobs:
            log.put_job(job)
        log.put_job(JobRecord("elsewhere", OTHER_UID, Role.LEARN))
        log.put_job(JobRecord("never open", UID, Role.LEARN, open=False))
        assert open_jobs(log, UID) == jobs

        for job in (first, third):
            log.put_job(dataclasses.replace(job, open=False))
        log.put_job(dataclasses.replace(third, open=False))  # closing twice is closing
        assert open_jobs(log, UID) == [second, fourth]

        opened_again = dataclasses.replace(first, role=Role.FROZEN, quarantined="nonsense")
        log.put_job(opened_again)
        with pytest.raises(AlreadyExists, match="job-10"):
            log.put_job(dataclasses.replace(second, weighter_uid=OTHER_UID))
        log.close()
        with opener() as again:
            assert open_jobs(again, UID) == [opened_again, second, fourth], "a job keeps its place"
            assert open_jobs(again, OTHER_UID) == [JobRecord("elsewhere", OTHER_UID, Role.LEARN)]

            again.delete_weighter(UID)
            with pytest.raises(NotFound, match=UID):
                again.open_jobs(UID)
            again.create_weighter(WEIGHTER)
            assert open_jobs(again, UID) == []
            assert len(open_jobs(again, OTHER_UID)) == 1

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
            assert [entry.position for entry in entries] == [1, 2, 3, 4, 5]
            for entry in entries:
                assert_same(update_in(entry), update_of(entry.position))

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
        assert_same(update_in(log.read(UID, 0, 2)[0]), update_of(1))

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
        assert_same(update_in(log.read(UID, 0, 1)[0]), update)

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
        assert [update_in(entry).job_id for entry in log.read(UID, 0, 10)] == ["job-1", "job-2", "job-2", "job-1"]
        assert [update_in(entry).job_id for entry in log.read(OTHER_UID, 0, 10)] == ["job-3", "job-3"]
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
        read = {entry.position: update_in(entry) for entry in log.read(UID, 0, 100)}
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
        assert [entry.position for entry in log.read(UID, 0, 3)] == [1, 2, 3]
        assert [entry.position for entry in log.read(UID, 3, 3)] == [4, 5, 6]
        assert [entry.position for entry in log.read(UID, 6, 3)] == [7]
        assert log.read(UID, 7, 3) == []

    def test_read_gives_fewer_entries_where_they_are_large(self, log: UpdateLog) -> None:
        for step in range(1, 6):
            log.append(UID, update_of(step, samples=5000))
        log.read_bytes = 100_000
        assert [entry.position for entry in log.read(UID, 0, 5)] == [1, 2]
        assert [entry.position for entry in log.read(UID, 4, 5)] == [5]
        assert log.read(UID, 5, 5) == []
        log.read_bytes = 1
        assert [entry.position for entry in log.read(UID, 2, 5)] == [3], "one at least"

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
            assert [entry.position for entry in again.read(UID, 4, 10)] == [5, 6]
            with pytest.raises(Trimmed, match="1 to 4 of weighter 'prose' are trimmed"):
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
        assert [entry.position for entry in log.read(UID, 3, 10)] == [4]

    def test_appends_and_retries_go_on_while_a_long_trim_runs(self, log: UpdateLog) -> None:
        for step in range(1, 201):
            log.append(UID, update_of(step))
        with ThreadPoolExecutor(1) as pool:
            trimming = pool.submit(log.trim, UID, 190)
            assert [log.append(UID, update_of(step)).position for step in range(191, 221)] == list(range(191, 221))
            trimming.result(timeout=30)
        assert [entry.position for entry in log.read(UID, 190, 100)] == list(range(191, 221))
        with pytest.raises(Trimmed, match="1 to 190"):
            log.read(UID, 189, 1)

    def test_size_grows_with_entries(self, log: UpdateLog) -> None:
        before, updates, samples = log.size_bytes(), 10, 50_000
        for step in range(updates):
            log.append(UID, update_of(step, samples=samples))
        full, content = log.size_bytes(), updates * samples * 3 * 4  # features at least
        assert full >= before + content // 2  # half: what Redis's buffers took before may be free now
        log.trim(UID, updates)
        assert log.size_bytes() < full - content // 2, "or there would be no way back from a log that is full"

    # ---- rollbacks

    def test_rollback_is_an_entry_like_others(self, log: UpdateLog, opener: Opener) -> None:
        for step in range(1, 4):
            log.append(UID, update_of(step))
        rollback = Rollback(to_position=2, state=bytes(range(256)) * 500)
        assert log.append_rollback(UID, rollback, expected_head=3) == 4
        assert log.append_rollback(UID, Rollback(0, b""), expected_head=None) == 5
        assert log.append(UID, update_of(4)).position == 6
        log.close()
        with opener() as again:
            assert [entry.content for entry in again.read(UID, 3, 2)] == [rollback, Rollback(0, b"")]
            assert_same(update_in(again.read(UID, 5, 1)[0]), update_of(4))
            assert again.last_taught("job-1") == (4, 6)
            again.trim(UID, 5)
            assert again.append(UID, update_of(2)).position == 2

    def test_rollback_of_a_log_that_went_on_is_refused(self, log: UpdateLog) -> None:
        log.append(UID, update_of(1))
        with pytest.raises(FailedPrecondition, match="'prose' ends at position 1, not at the expected 0"):
            log.append_rollback(UID, Rollback(0, b"state"), expected_head=0)
        assert log.head(UID) == 1
        with pytest.raises(NotFound, match=OTHER_UID):
            log.append_rollback(OTHER_UID, Rollback(0, b"state"), expected_head=None)

    # ---- chains

    def test_equal_histories_have_equal_chains_and_others_differ_from_there_on(self, log: UpdateLog) -> None:
        log.create_weighter(OTHER)
        log.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN))
        for step in range(1, 6):
            log.append(UID, update_of(step))
            log.append(OTHER_UID, dataclasses.replace(update_of(step if step != 3 else 99), job_id="job-2"))
        ours, others = ([entry.chain for entry in log.read(uid, 0, 10)] for uid in (UID, OTHER_UID))
        digests = [update_of(step).digest().hex() for step in range(1, 6)]
        expected = ""
        for chain, digest in zip(ours, digests, strict=True):
            expected = hashlib.sha1((expected + digest).encode()).hexdigest()
            assert chain == expected
        assert len({*ours, *others}) == 10  # the job's id is part of an update

    def test_read_goes_on_only_from_its_own_history(self, log: UpdateLog, opener: Opener) -> None:
        for step in range(1, 6):
            log.append(UID, update_of(step))
        log.append_rollback(UID, Rollback(1, b"state"), expected_head=5)
        chains = ["", *(entry.chain for entry in log.read(UID, 0, 10))]
        log.trim(UID, 2)
        log.close()
        with opener() as again:
            for after in range(2, 7):  # trimmed point, entries, head
                found = again.read(UID, after, 10, chain=chains[after])
                assert [entry.chain for entry in found] == chains[after + 1 :]
                with pytest.raises(FailedPrecondition, match=f"another history up to position {after}") as caught:
                    again.read(UID, after, 10, chain=chains[after - 1])
                assert not isinstance(caught.value, Trimmed)
            with pytest.raises(Trimmed):
                again.read(UID, 1, 10, chain=chains[1])
            again.trim(UID, 6)
            assert again.read(UID, 6, 10, chain=chains[6]) == []
            appended = again.append(UID, update_of(6))
            assert [entry.position for entry in again.read(UID, 6, 10, chain=chains[6])] == [appended.position]

    # ---- records that change, and heads

    def test_heads_tell_all_positions_and_whether_records_changed(self, log: UpdateLog) -> None:
        first = log.heads()
        assert first.positions == {UID: 0}
        log.append(UID, update_of(1))
        log.append_rollback(UID, Rollback(0, b""), expected_head=1)
        log.trim(UID, 1)
        log.touch_jobs({"job-1": 5})
        log.vouch(UID, 1, "here", "checksum")
        assert log.heads() == Heads(first.version, {UID: 2})
        versions = [first.version]
        for change in (
            lambda: log.create_weighter(OTHER),
            lambda: log.put_weighter(dataclasses.replace(OTHER, shared_with=("a",))),
            lambda: log.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN)),
            lambda: log.put_job(dataclasses.replace(JOB, open=False)),
        ):
            change()
            versions.append(log.heads().version)
        assert log.heads().positions == {UID: 2, OTHER_UID: 0}
        log.delete_weighter(OTHER_UID)
        versions.append(log.heads().version)
        assert versions == sorted(set(versions))
        assert log.heads().positions == {UID: 2}

    def test_whom_a_weighter_is_shared_with_is_kept_and_replaced(self, log: UpdateLog, opener: Opener) -> None:
        shared = dataclasses.replace(WEIGHTER, shared_with=("team-b", "größe"))
        other = dataclasses.replace(OTHER, shared_with=("*",))
        log.create_weighter(other)
        log.put_weighter(dataclasses.replace(shared, shared_with=("gone",)))
        log.put_weighter(shared)
        log.close()
        with opener() as again:
            assert again.weighters() == [shared, other]
            again.put_weighter(dataclasses.replace(other, shared_with=()))
            assert again.weighters() == [shared, OTHER]
            with pytest.raises(NotFound, match="c" * 32):
                again.put_weighter(dataclasses.replace(OTHER, uid="c" * 32))

    def test_quarantine_of_a_job_is_kept_and_lifted(self, log: UpdateLog, opener: Opener) -> None:
        quarantined = dataclasses.replace(JOB, quarantined="größter Unsinn seit Schritt 7")
        log.put_job(quarantined)
        log.close()
        with opener() as again:
            assert again.job("job-1") == quarantined
            again.put_job(JOB)
            assert again.jobs(UID) == [JOB]

    def test_jobs_were_last_heard_of_when_anyone_said_so(self, log: UpdateLog, opener: Opener) -> None:
        log.put_job(REFERENCE_JOB)
        log.touch_jobs({"job-1": 1_700_000_000_456, "job-9": 3})
        log.touch_jobs({"job-1": 1_700_000_000_123})  # never back
        log.put_job(dataclasses.replace(JOB, open=False))  # the record's change leaves it
        log.close()
        with opener() as again:
            assert again.jobs_seen(["job-1", "job-2", "job-9"]) == {"job-1": 1_700_000_000_456}
            again.touch_jobs({"job-1": 1_700_000_000_789, "job-2": 4})
            again.touch_jobs({})
            assert again.jobs_seen(["job-2", "job-1"]) == {"job-1": 1_700_000_000_789, "job-2": 4}
            assert again.jobs_seen([]) == {}
            again.delete_weighter(UID)
            assert again.jobs_seen(["job-1"]) == {}

    def test_first_vouched_checksum_holds(self, log: UpdateLog, opener: Opener) -> None:
        log.create_weighter(OTHER)
        assert log.vouch(UID, 200, "cpu", "1" * 64) == "1" * 64
        log.close()
        with opener() as again:
            assert again.vouch(UID, 200, "cpu", "2" * 64) == "1" * 64
            assert again.vouch(UID, 200, "cpu", "1" * 64) == "1" * 64
            assert again.vouch(UID, 200, "cuda", "2" * 64) == "2" * 64
            assert again.vouch(UID, 400, "cpu", "3" * 64) == "3" * 64
            assert again.vouch(OTHER_UID, 200, "cpu", "4" * 64) == "4" * 64
            with pytest.raises(NotFound, match="c" * 32):
                again.vouch("c" * 32, 200, "cpu", "1" * 64)

    def test_trimmed_position_is_told(self, log: UpdateLog, opener: Opener) -> None:
        assert log.trimmed(UID) == 0
        for step in range(1, 101):
            log.append(UID, update_of(step))
        log.trim(UID, 70)
        assert log.trimmed(UID) == 70
        log.close()
        with opener() as again:
            assert again.trimmed(UID) == 70
            again.trim(UID, 1000)
            assert again.trimmed(UID) == 100

    # ---- copies

    def test_weighter_of_another_log_comes_whole_and_goes_on(self, log: UpdateLog, tmp_path: Path) -> None:
        moved = dataclasses.replace(OTHER, shared_with=("team-b",))
        other_job = dataclasses.replace(REFERENCE_JOB, weighter_uid=OTHER_UID, quarantined="größter Unsinn")
        with SqliteUpdateLog(tmp_path / "source.sqlite") as source, SqliteUpdateLog(tmp_path / "back.sqlite") as back:
            source.create_weighter(moved)
            source.put_job(other_job, profile_of(1))
            source.put_job(JobRecord("job-3", OTHER_UID, Role.LEARN))
            for step in range(1, 8):
                source.append(OTHER_UID, update_of(step, "job-3"))
            source.append_rollback(OTHER_UID, Rollback(3, b"state" * 1000), expected_head=7)
            source.append(OTHER_UID, update_of(5, "job-2"))
            source.trim(OTHER_UID, 4)
            source.touch_jobs({"job-3": 1_700_000_000_123})
            for position, environment in ((200, "a b"), (4, "cpu"), (200, "cuda")):
                source.vouch(OTHER_UID, position, environment, environment * 3)
            exported = source.export(OTHER_UID)
            assert (exported.record, exported.head, exported.trimmed, len(exported.vouched)) == (moved, 9, 4, 3)

            version = log.heads().version
            log.import_(exported, source.read(OTHER_UID, 4, 100), source.taken(OTHER_UID))
            assert log.export(OTHER_UID) == exported
            assert log.heads().version > version
            back.import_(exported, log.read(OTHER_UID, 4, 100), log.taken(OTHER_UID))
            assert back.export(OTHER_UID) == exported

            for each in (log, back):
                assert_same(update_in(each.read(OTHER_UID, 4, 1, exported.trimmed_chain)[0]), update_of(5, "job-3"))
                assert each.jobs(OTHER_UID) == [other_job, JobRecord("job-3", OTHER_UID, Role.LEARN)]
                assert_profile(each, "job-2", profile_of(1))
                assert each.jobs_seen(["job-2", "job-3"]) == {"job-3": 1_700_000_000_123}
                assert each.last_taught("job-3") == (7, 7)
                assert each.append(OTHER_UID, update_of(2, "job-3")).position == 2
                with pytest.raises(AlreadyExists, match="position 9"):
                    each.append(OTHER_UID, dataclasses.replace(update_of(5, "job-2"), step=6))
                assert each.append(OTHER_UID, update_of(9, "job-3")).position == 10
            assert log.weighters() == [WEIGHTER, moved]
            assert log.export(OTHER_UID) == back.export(OTHER_UID) != exported

    def test_open_jobs_of_a_copy_are_open_and_can_be_closed(self, log: UpdateLog, tmp_path: Path) -> None:
        jobs = [JobRecord(f"job-{n}", OTHER_UID, Role.LEARN, open=n != 3) for n in (4, 3, 2)]
        with SqliteUpdateLog(tmp_path / "source.sqlite") as source, SqliteUpdateLog(tmp_path / "back.sqlite") as back:
            source.create_weighter(OTHER)
            for job in jobs:
                source.put_job(job)
            log.import_(source.export(OTHER_UID), [], [])
            back.import_(log.export(OTHER_UID), [], [])
            for each in (log, back):
                assert open_jobs(each, OTHER_UID) == [jobs[0], jobs[2]]
                each.put_job(dataclasses.replace(jobs[0], open=False))
                each.put_job(dataclasses.replace(jobs[1], open=True))
                assert [job.job_id for job in open_jobs(each, OTHER_UID)] == ["job-3", "job-2"]
        assert open_jobs(log, UID) == [JOB]

    def test_copy_of_what_is_there_is_refused_and_changes_nothing(self, log: UpdateLog, tmp_path: Path) -> None:
        log.append(UID, update_of(1))
        before = log.export(UID)
        with SqliteUpdateLog(tmp_path / "source.sqlite") as source:
            source.create_weighter(OTHER)
            source.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN))
            source.append(OTHER_UID, update_of(1, "job-2"))
            copy, entries = source.export(OTHER_UID), source.read(OTHER_UID, 0, 10)
        job = copy.jobs[0]
        for wrong, match in (
            (dataclasses.replace(copy, record=dataclasses.replace(OTHER, name="prose")), "name 'prose'"),
            (dataclasses.replace(copy, record=dataclasses.replace(OTHER, uid=UID)), f"uid '{UID}'"),
            (
                dataclasses.replace(
                    copy, jobs=(dataclasses.replace(job, record=dataclasses.replace(job.record, job_id="job-1")),)
                ),
                "job 'job-1' belongs to another",
            ),
        ):
            with pytest.raises(AlreadyExists, match=match):
                log.import_(wrong, entries, [])
            assert log.weighters() == [WEIGHTER]
            assert log.export(UID) == before
        with pytest.raises(NotFound, match=OTHER_UID):
            log.export(OTHER_UID)

    def test_copy_that_breaks_off_is_not_there_and_can_be_repeated(self, log: UpdateLog, tmp_path: Path) -> None:
        with SqliteUpdateLog(tmp_path / "source.sqlite") as source:
            source.create_weighter(OTHER)
            source.put_job(JobRecord("job-2", OTHER_UID, Role.LEARN))
            for step in range(1, 4):
                source.append(OTHER_UID, update_of(step, "job-2"))
            copy, entries, taken = source.export(OTHER_UID), source.read(OTHER_UID, 0, 10), [*source.taken(OTHER_UID)]

        def broken() -> Iterator[LogEntry]:
            yield from entries[:2]
            raise Unavailable("the source is gone")

        with pytest.raises(Unavailable, match="the source is gone"):
            log.import_(copy, broken(), taken)
        assert log.weighters() == [WEIGHTER]
        assert log.job("job-2") is None
        fewer_open = dataclasses.replace(copy.jobs[0], record=dataclasses.replace(copy.jobs[0].record, open=False))
        copy = dataclasses.replace(copy, jobs=(fewer_open,))
        log.import_(copy, entries, taken)
        assert log.export(OTHER_UID) == copy
        assert open_jobs(log, OTHER_UID) == [], "nothing is left of the copy that broke off"
        assert sorted(each.position for each in log.taken(OTHER_UID)) == [1, 2, 3]

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
        self, acknowledged: int, opener: Opener, storage: str
    ) -> None:
        command = [sys.executable, str(APPENDER), storage]
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
            assert [entry.position for entry in entries] == list(range(1, head + 1))
            for entry in entries:
                assert_same(update_in(entry), update_of(entry.position))
            for step in range(1, head + 2):  # what the client would do: send again all that it is not sure of
                appended = log.append(UID, update_of(step))
                assert (appended.position, appended.duplicate) == (step, step <= head)

    @pytest.mark.parametrize(
        ("failpoint", "told", "recorded"), [("before_append=kill@3", 2, 2), ("after_append=kill@3", 2, 3)]
    )
    def test_failpoints_are_where_they_say(
        self, failpoint: str, told: int, recorded: int, opener: Opener, storage: str
    ) -> None:
        process = subprocess.run(
            [sys.executable, str(APPENDER), storage],
            env={**os.environ, failpoints.VARIABLE: failpoint},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == -signal.SIGKILL
        assert process.stdout.split() == [str(position) for position in range(1, told + 1)]
        with opener() as log:
            assert log.head(UID) == recorded

    def test_full_disk_at_a_failpoint_is_a_full_log(self, opener: Opener, storage: str) -> None:
        process = subprocess.run(
            [sys.executable, str(APPENDER), storage],
            env={**os.environ, failpoints.VARIABLE: "before_append=full@2"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "ResourceExhausted" in process.stderr
        with opener() as log:
            assert log.head(UID) == 1


class TestSqliteUpdateLog(UpdateLogContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> str:
        return str(tmp_path / "state" / "log.sqlite")  # in a folder that is not there yet


class TestRedisUpdateLog(UpdateLogContract):
    @pytest.fixture
    def storage(self, redis_server: RedisServer) -> str:
        return redis_server.new_log_url()
