"""What is particular to the log in Redis: several clients, cut connections, restarts, settings, damage."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shutil
import signal
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from log_samples import (
    JOB,
    OTHER,
    REFERENCE_JOB,
    UID,
    WEIGHTER,
    assert_same,
    profile_of,
    update_in,
    update_of,
)

from tests.redis_server import RedisServer
from tests.tcp_proxy import TcpProxy
from weighting_contract.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)
from weighting_service.domain import JobRecord, Role, Rollback
from weighting_service.update_log import LogEntry, RedisUpdateLog

ENTRIES = "{" + UID + "}:entries"


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    """Of a log with one weighter and one job."""
    url = redis_server.new_log_url()
    with RedisUpdateLog(url) as log:
        log.create_weighter(WEIGHTER)
        log.put_job(JOB)
    return url


@pytest.fixture
def log(url: str) -> Iterator[RedisUpdateLog]:
    with RedisUpdateLog(url) as log:
        yield log


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as server:
        with RedisUpdateLog(server.url) as log:
            log.create_weighter(WEIGHTER)
            log.put_job(JOB, profile_of(1))
        yield server


def prefix_of(url: str) -> str:
    return url.partition("?prefix=")[2]


def assert_taught(log: RedisUpdateLog, steps: list[int]) -> None:
    """The log has exactly the updates of these steps, in this order."""
    entries = log.read(UID, 0, 10_000)
    assert [entry.position for entry in entries] == list(range(1, len(steps) + 1))
    for entry, step in zip(entries, steps, strict=True):
        assert_same(update_in(entry), update_of(step))


# ---- several clients


@pytest.mark.parametrize("stray", "/?#")
def test_a_password_that_ends_the_address_is_not_shown(stray: str) -> None:
    with pytest.raises(InvalidArgument, match="write those of user and password as %2F") as refused:
        RedisUpdateLog(f"redis://user:open{stray}sesame@localhost:1/0")  # pragma: allowlist secret
    assert "open" not in str(refused.value)
    assert "sesame" not in str(refused.value)


def test_two_services_append_to_one_log_without_gaps_and_without_twice(url: str) -> None:
    start = threading.Barrier(2)

    def teach(own_job: str) -> tuple[list[tuple[int, bool]], list[int]]:
        with RedisUpdateLog(url) as log:
            log.put_job(JobRecord(own_job, UID, Role.LEARN))
            start.wait(timeout=30)
            both, own = [], []
            for step in range(40):  # of each pair of updates one is sent by both
                appended = log.append(UID, update_of(step))
                both.append((appended.position, appended.duplicate))
                own.append(log.append(UID, update_of(step, own_job)).position)
            return both, own

    with ThreadPoolExecutor(2) as pool:
        (both, own), (other_both, other_own) = pool.map(teach, ["mine", "yours"])
    assert [position for position, _ in both] == [position for position, _ in other_both]
    assert [first + second for (_, first), (_, second) in zip(both, other_both, strict=True)] == [1] * 40
    assert sorted([position for position, _ in both] + own + other_own) == list(range(1, 121))
    with RedisUpdateLog(url) as log:
        assert log.heads().positions == {UID: 120}
        entries = log.read(UID, 0, 1000)
        assert_same(update_in(entries[other_own[7] - 1]), update_of(7, "yours"))


def test_what_one_service_records_the_others_see(log: RedisUpdateLog, url: str) -> None:
    with RedisUpdateLog(url) as other:
        version = other.heads().version
        log.create_weighter(OTHER)
        log.put_job(dataclasses.replace(JOB, quarantined="nonsense"))
        log.append(UID, update_of(1))
        assert other.weighters() == [WEIGHTER, OTHER]
        assert other.heads().version == version + 2
        assert other.vouch(UID, 1, "cpu", "mine") == log.vouch(UID, 1, "cpu", "yours") == "mine"
        job = other.job("job-1")
        assert job is not None
        assert job.quarantined == "nonsense"
        log.delete_weighter(UID)
        with pytest.raises(NotFound, match=UID):
            other.append(UID, update_of(2))


def test_two_logs_in_one_redis_do_not_meet(log: RedisUpdateLog, redis_server: RedisServer) -> None:
    with RedisUpdateLog(redis_server.new_log_url()) as other:
        assert other.weighters() == []
        other.create_weighter(WEIGHTER)
        other.put_job(JOB)
        log.append(UID, update_of(1))
        assert (log.head(UID), other.head(UID)) == (1, 0)
        other.delete_weighter(UID)
        assert log.append(UID, update_of(1)).duplicate


def test_deleted_weighter_leaves_no_keys(log: RedisUpdateLog, url: str, redis_server: RedisServer) -> None:
    log.put_job(REFERENCE_JOB, profile_of(1))
    for step in range(3):
        log.append(UID, update_of(step))
    log.append_rollback(UID, Rollback(1, b"state"), 3)
    log.vouch(UID, 1, "cpu", "checksum")
    log.touch_jobs({"job-1": 5})
    log.trim(UID, 2)
    log.delete_weighter(UID)
    with redis_server.client() as client:
        assert client.keys(prefix_of(url) + "*") == [(prefix_of(url) + "records").encode()]


# ---- cut connections


@pytest.fixture
def proxied(url: str, redis_server: RedisServer) -> Iterator[tuple[TcpProxy, RedisUpdateLog]]:
    with (
        TcpProxy(redis_server.port) as proxy,
        RedisUpdateLog(f"redis://127.0.0.1:{proxy.port}/0?prefix={prefix_of(url)}") as log,
    ):
        yield proxy, log


def test_append_whose_answer_was_lost_finds_its_position(proxied: tuple[TcpProxy, RedisUpdateLog]) -> None:
    proxy, log = proxied
    proxy.cut("answer")
    with pytest.raises(Unavailable, match=r"whether something was recorded is not known.*nothing is recorded twice"):
        log.append(UID, update_of(1))
    retried = log.append(UID, update_of(1))
    assert (retried.position, retried.duplicate) == (1, True)

    proxy.cut("request")
    with pytest.raises(Unavailable):
        log.append(UID, update_of(2))
    retried = log.append(UID, update_of(2))
    assert (retried.position, retried.duplicate) == (2, False)


def test_retries_through_a_bad_line_record_every_update_once(proxied: tuple[TcpProxy, RedisUpdateLog]) -> None:
    proxy, log = proxied
    lost = 0
    for step in range(30):
        if step % 3:
            proxy.cut("answer" if step % 2 else "request")
        while True:
            try:
                assert log.append(UID, update_of(step)).position == step + 1
                break
            except Unavailable:
                lost += 1
    assert lost == 20
    assert_taught(log, list(range(30)))


def test_redis_that_does_not_answer_in_time_is_unavailable(url: str, redis_server: RedisServer) -> None:
    with RedisUpdateLog(f"{redis_server.url}?prefix={prefix_of(url)}&socket_timeout=0.2") as log:
        redis_server.process.send_signal(signal.SIGSTOP)
        try:
            for call in (lambda: log.append(UID, update_of(1)), lambda: log.heads(), lambda: log.read(UID, 0, 1)):
                with pytest.raises(Unavailable, match="did not answer"):
                    call()
        finally:
            redis_server.process.send_signal(signal.SIGCONT)
        with RedisUpdateLog(url) as patient:
            assert patient.append(UID, update_of(1)).position == 1  # taken, perhaps, after nobody waited any more
            assert_taught(patient, [1])


# ---- restarts


def test_restart_keeps_everything_and_clients_go_on(own_server: RedisServer) -> None:
    with RedisUpdateLog(own_server.url) as log:
        for step in range(1, 6):
            log.append(UID, update_of(step))
        log.append_rollback(UID, Rollback(2, b"state"), 5)
        log.trim(UID, 3)
        log.vouch(UID, 4, "cpu", "checksum")
        log.touch_jobs({"job-1": 5})
        before, entries = log.export(UID), log.read(UID, 3, 10)
        own_server.stop()
        for call in (lambda: log.append(UID, update_of(6)), lambda: log.heads(), lambda: log.weighters()):
            with pytest.raises(Unavailable, match=rf"Redis at redis://127.0.0.1:{own_server.port}/0 did not answer"):
                call()
        with pytest.raises(Unavailable, match="did not answer"):
            RedisUpdateLog(own_server.url)
        own_server.start()
        assert log.export(UID) == before
        assert [entry.chain for entry in log.read(UID, 3, 10)] == [entry.chain for entry in entries]
        assert log.append(UID, update_of(2)).position == 2
        assert log.append(UID, update_of(6)).position == 7


def test_killed_redis_has_every_acknowledged_append(own_server: RedisServer) -> None:
    acknowledged: queue.SimpleQueue[int] = queue.SimpleQueue()

    def teach_until_gone(log: RedisUpdateLog) -> int:
        step = 0
        with contextlib.suppress(Unavailable):
            while True:
                step += 1
                acknowledged.put(log.append(UID, update_of(step)).position)
        return step - 1

    with RedisUpdateLog(own_server.url) as log, ThreadPoolExecutor(1) as pool:
        teaching = pool.submit(teach_until_gone, log)
        for expected in range(1, 61):
            assert acknowledged.get(timeout=30) == expected
        own_server.kill()
        told = teaching.result(timeout=30)
        own_server.start()
        head = log.head(UID)
        assert head in (told, told + 1)  # one more may have been recorded, but not told
        assert_taught(log, list(range(1, head + 1)))
        retried = log.append(UID, update_of(told + 1))
        assert (retried.position, retried.duplicate) == (told + 1, head > told)


def test_older_copy_of_the_data_is_recognised_also_when_it_has_grown(own_server: RedisServer, tmp_path: Path) -> None:
    with RedisUpdateLog(own_server.url) as log:
        for step in range(1, 4):
            log.append(UID, update_of(step))
        own_server.stop()
        shutil.copytree(own_server.folder, tmp_path / "older")
        own_server.start()
        for step in range(4, 6):
            log.append(UID, update_of(step))
        (last,) = log.read(UID, 4, 1)
        own_server.stop()
        shutil.rmtree(own_server.folder)
        shutil.copytree(tmp_path / "older", own_server.folder)
        own_server.start()

        assert log.heads().positions == {UID: 3}
        with pytest.raises(FailedPrecondition, match="'prose' ends at position 3, but entries after 5"):
            log.read(UID, 5, 10, last.chain)
        for step in range(14, 18):
            log.append(UID, update_of(step))
        with pytest.raises(FailedPrecondition, match="another history up to position 5"):
            log.read(UID, 5, 10, last.chain)


def test_redis_that_lost_everything_knows_no_weighter(log: RedisUpdateLog, url: str, redis_server: RedisServer) -> None:
    log.append(UID, update_of(1))
    with redis_server.client() as client:
        client.delete(*client.keys(prefix_of(url) + "*"))
    assert (log.heads().version, log.heads().positions) == (0, {})
    with pytest.raises(NotFound, match=UID):
        log.read(UID, 1, 10)


# ---- settings


@pytest.fixture
def setting(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client by which to set the server otherwise; it is as before afterwards."""
    names = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory", "maxmemory-policy")
    with redis_server.client() as client:
        before = {name: client.config_get(name)[name] for name in names}
        yield client
        for name, value in before.items():
            client.config_set(name, value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("appendonly", "no", "yes"),
        ("appendfsync", "everysec", "always"),
        ("no-appendfsync-on-rewrite", "yes", "no"),
        ("maxmemory-policy", "allkeys-lru", "noeviction"),
    ],
)
def test_settings_that_lose_updates_are_refused_or_warned_of(
    name: str, value: str, wanted: str, url: str, setting: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    setting.config_set(name, value)
    with pytest.raises(FailedPrecondition, match=f"has `{name} {value}`.*the line `{name} {wanted}`.*relaxed"):
        RedisUpdateLog(url)
    assert caplog.records == []
    with RedisUpdateLog(url, durability="relaxed") as log:
        assert len(log.warnings) == 1
        assert f"`{name} {value}`" in log.warnings[0]
        assert [record.getMessage() for record in caplog.records] == list(log.warnings)
        assert log.append(UID, update_of(1)).position == 1


def test_each_setting_is_named(url: str, setting: redis.Redis) -> None:
    setting.config_set("appendfsync", "no")
    setting.config_set("maxmemory-policy", "volatile-lru")
    with pytest.raises(FailedPrecondition, match=r"`appendfsync no`.*`maxmemory-policy volatile-lru`"):
        RedisUpdateLog(url)


def test_redis_that_does_not_tell_its_settings(url: str, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "modest", "on", ">secret-7", "~*", "+@all", "-config")
        modest = f"redis://modest:secret-7@127.0.0.1:{redis_server.port}/0?prefix={prefix_of(url)}"
        with pytest.raises(FailedPrecondition, match=r"does not tell its settings.*`appendfsync always`") as caught:
            RedisUpdateLog(modest)
        assert "secret-7" not in str(caught.value)
        with RedisUpdateLog(modest, durability="relaxed") as log:
            assert len(log.warnings) == 1
            assert log.append(UID, update_of(1)).position == 1

        with pytest.raises(FailedPrecondition, match=r"refuses the service.*check user and password") as caught:
            RedisUpdateLog(modest.replace("secret-7", "secret-8"))
        assert "secret" not in str(caught.value)


def test_full_memory_says_so_and_records_nothing(log: RedisUpdateLog, setting: redis.Redis) -> None:
    log.append(UID, update_of(1))
    before = log.export(UID)
    setting.config_set("maxmemory", "1")
    for call in (
        lambda: log.append(UID, update_of(2)),
        lambda: log.append_rollback(UID, Rollback(1, b"state"), None),
        lambda: log.put_job(REFERENCE_JOB, profile_of(1)),
        lambda: log.create_weighter(OTHER),
        lambda: log.vouch(UID, 1, "cpu", "checksum"),
    ):
        with pytest.raises(ResourceExhausted, match=r"no room left.*nothing was recorded") as caught:
            call()
        assert caught.value.retry_after_s > 0
    assert log.export(UID) == before
    assert log.append(UID, update_of(1)).duplicate
    assert log.find(UID, update_of(2)) is None
    log.trim(UID, 1)  # what makes room is allowed
    setting.config_set("maxmemory", "0")
    assert log.append(UID, update_of(2)).position == 2
    assert log.weighters() == [WEIGHTER]


class ScriptedRedis(socketserver.ThreadingTCPServer):
    """Answers every command with the same bytes: a server that can't be had here."""

    daemon_threads = True

    def __init__(self, answer: bytes) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while data := self.request.recv(4096):
                    self.request.sendall(answer * data.count(b"*"))

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"redis://127.0.0.1:{self.server_address[1]}/0"


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (b"$20\r\nredis_version:6.0.16\r\n", FailedPrecondition, "is version 6.0.16, expected 6.2 or newer"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", Unavailable, "still loading"),
        (b"-MASTERDOWN Link with MASTER is down\r\n", Unavailable, "MASTER is down"),
        (b"-MISCONF Errors writing to the AOF file: No space left on device\r\n", ResourceExhausted, "No space left"),
    ],
)
def test_servers_that_will_not_do(answer: bytes, error: type[WeighbridgeError], match: str) -> None:
    with ScriptedRedis(answer) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            with pytest.raises(error, match=match):
                RedisUpdateLog(server.url)
        finally:
            server.shutdown()
            serving.join()


def test_cluster_is_refused(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path, cluster_enabled="yes") as server,
        pytest.raises(FailedPrecondition, match="part of a cluster"),
    ):
        RedisUpdateLog(server.url)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://localhost:6379", "expected redis://HOST:PORT/DB"),
        ("redis://user:secret-7@localhost:6379/main", "ends in '/main', expected the number of a database"),
        ("redis://user:secret-7@localhost/0?prefix={}", r"prefix '\{\}'"),
        ("redis://user:secret-7@localhost:port/0", "not one that Redis clients know"),
        ("redis://user:secret-7@localhost/0?flavour=sweet", "not one that Redis clients know"),
    ],
)
def test_url_that_is_none_is_a_sentence(url: str, match: str) -> None:
    with pytest.raises(InvalidArgument, match=match) as caught:
        RedisUpdateLog(url)
    assert "secret" not in str(caught.value)


def test_log_of_a_newer_version_is_refused(url: str, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.hset(prefix_of(url) + "records", "format", 99)
    with pytest.raises(FailedPrecondition, match=r"newer version of the service: its format is 99"):
        RedisUpdateLog(url)


# ---- damage


def test_damaged_and_missing_entries_are_found(log: RedisUpdateLog, url: str, redis_server: RedisServer) -> None:
    for step in range(1, 8):
        log.append(UID, update_of(step))
    with redis_server.client() as client:
        key = prefix_of(url) + ENTRIES
        kept = client.xrange(key)
        client.delete(key)
        for entry_id, fields in kept:
            if entry_id == b"3-0":
                payload = bytearray(fields[b"payload"])
                payload[-1] ^= 1
                fields[b"payload"] = bytes(payload)
            if entry_id != b"6-0":
                client.xadd(key, fields, id=entry_id)
    assert len(log.read(UID, 0, 2)) == 2
    with pytest.raises(Internal, match=rf"entry 3 of weighter {UID} in Redis at .* is damaged"):
        log.read(UID, 0, 10)
    assert len(log.read(UID, 3, 2)) == 2
    with pytest.raises(Internal, match=r"entry 6 of weighter 'prose' .* is missing from Redis"):
        log.read(UID, 3, 10)


def test_damaged_profile_is_found_and_its_job_still_listed(
    log: RedisUpdateLog, url: str, redis_server: RedisServer
) -> None:
    log.put_job(REFERENCE_JOB, profile_of(1))
    with redis_server.client() as client:
        key = prefix_of(url) + "{" + UID + "}:profiles"
        kept = client.hget(key, "job-2")
        assert isinstance(kept, bytes)
        client.hset(key, "job-2", kept[:-1] + bytes([kept[-1] ^ 1]))
    assert log.jobs(UID) == [JOB, REFERENCE_JOB]
    with pytest.raises(Internal, match=r"profile of job 'job-2' in Redis at .* is damaged"):
        log.profile("job-2")


def test_open_jobs_are_told_without_a_look_at_closed_ones(
    log: RedisUpdateLog, url: str, redis_server: RedisServer
) -> None:
    log.put_job(dataclasses.replace(REFERENCE_JOB, open=False))
    with redis_server.client() as client:
        client.hset(f"{prefix_of(url)}{{{UID}}}:jobs", REFERENCE_JOB.job_id, "2 {damaged")
    assert log.open_jobs(UID) == [JOB]
    with pytest.raises(ValueError, match="property name"):
        log.jobs(UID)


def test_other_things_under_the_keys_are_refused_and_left(
    log: RedisUpdateLog, url: str, redis_server: RedisServer
) -> None:
    log.append(UID, update_of(1))
    with redis_server.client() as client:
        client.set(prefix_of(url) + ENTRIES, "someone's notes")
        for call in (lambda: log.append(UID, update_of(2)), lambda: log.read(UID, 0, 1)):
            with pytest.raises(FailedPrecondition, match="not an update log of this service"):
                call()
        assert client.get(prefix_of(url) + ENTRIES) == b"someone's notes"
    assert log.find(UID, update_of(2)) is None
    assert log.head(UID) == 1


def test_two_imports_of_one_weighter_do_not_harm_each_other(
    url: str, log: RedisUpdateLog, redis_server: RedisServer
) -> None:
    for step in range(1, 4):
        log.append(UID, update_of(step))
    copy, entries, taken = log.export(UID), log.read(UID, 0, 10), list(log.taken(UID))
    target = redis_server.new_log_url()
    with RedisUpdateLog(target) as one, RedisUpdateLog(target) as two:

        def interrupted() -> Iterator[LogEntry]:
            with pytest.raises(FailedPrecondition, match=r"is being imported .* by another process"):
                two.import_(copy, entries, taken)
            yield from entries

        one.import_(copy, interrupted(), taken)
        assert one.export(UID) == copy
        with pytest.raises(AlreadyExists, match=UID):
            two.import_(copy, entries, taken)
        assert_taught(two, [1, 2, 3])
