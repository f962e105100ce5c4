"""What a training loop sees when the service is away, slow, wrong or forgetful. Real gRPC servers, real sockets."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_service import (
    COTANGENT,
    FEATURES,
    NO_TRIALS,
    PATIENT,
    SHORT,
    WEIGHTS,
    ScriptedServer,
    ScriptedService,
    abort,
)

from tests.waiting import wait_for
from trainer_client import Client, Job, Limits, Timeouts, connect
from weighting_contract.errors import JOB_CLOSED, DeadlineExceeded, InvalidArgument, NotFound, Unavailable

QUICK_TRIALS = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1, heartbeat_s=1000)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    wait_for(lambda: not job_threads())


def job_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("weighbridge-job")]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def open_job(
    url: str, timeouts: Timeouts = PATIENT, limits: Limits = NO_TRIALS, **arguments: Any
) -> tuple[Client, Job]:
    client = connect(url, timeouts=timeouts, limits=limits)
    return client, client.open_job(**arguments)


# ---- All is well ----------------------------------------------------------------------------------------------------


def test_scores_and_teaches_in_order(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        for step in range(5):
            scores = job.score(FEATURES, step)
            assert (scores.weights.tolist(), scores.fallback) == (WEIGHTS, False)
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.flush()
        counters = job.counters
    assert server.service.steps_taught() == [0, 1, 2, 3, 4]
    assert (counters.scored, counters.fallback_steps, counters.fallbacks) == (5, 0, {})
    assert (counters.updates_sent, counters.updates_acknowledged, counters.updates_duplicate) == (5, 5, 0)
    assert counters.score_seconds > 0
    assert counters.meta_seconds > 0
    assert server.service.calls["CloseJob"] == 1


@pytest.mark.parametrize(("read_your_writes", "expected"), [(True, [0, 1, 2]), (False, [0, 0, 0])])
def test_reads_its_own_writes(server: ScriptedServer, read_your_writes: bool, expected: list[int]) -> None:
    client, job = open_job(server.url, read_your_writes=read_your_writes)
    with client, job:
        for step in range(3):
            job.score(FEATURES, step)
            job.meta_update(COTANGENT, FEATURES, step)
    assert [request.min_position for request in server.service.requests["Score"]] == expected


def test_an_update_names_the_position_of_the_last_score(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        for step in range(3):
            job.score(FEATURES, step)
            job.meta_update(COTANGENT, FEATURES, step)
        job.meta_update(COTANGENT, FEATURES, 3, scored_position=1, estimator="score_function", update_id="again")
        assert job.flush()
    updates = server.service.requests["MetaUpdate"]
    assert [(u.update_id, u.scored_position) for u in updates] == [("0", 0), ("1", 1), ("2", 2), ("again", 1)]


def test_torch_in_torch_out(server: ScriptedServer) -> None:
    torch = pytest.importorskip("torch")
    client, job = open_job(server.url)
    with client, job:
        scores = job.score(torch.tensor(FEATURES, dtype=torch.float64, requires_grad=True), 0)
        assert scores.weights.dtype is torch.float32
        assert scores.weights.tolist() == WEIGHTS
        assert not scores.weights.requires_grad
        assert job.score(torch.tensor(FEATURES, dtype=torch.bfloat16), 1).weights.tolist() == WEIGHTS
        assert isinstance(job.score(FEATURES, 2).weights, np.ndarray)
        refused = job.score(torch.zeros(3, 2, device="meta"), 3)
        assert (refused.fallback, refused.weights.device.type) == (True, "meta")


def test_statistics_and_trust_come_back_when_asked(server: ScriptedServer) -> None:
    torch = pytest.importorskip("torch")
    tokens = torch.tensor([[1, 5], [3, 6]])
    client, job = open_job(server.url)
    with client, job:
        scores = job.score(tokens=tokens, step=0, return_statistics=True, min_effective_share=0.5)
        assert (scores.weights.tolist(), scores.trust) == (WEIGHTS, 0.75)
        assert scores.statistics.dtype is torch.float32
        assert scores.statistics.tolist() == [[1, 2], [3, 6]]
        assert job.score(FEATURES, 1).statistics is None
        server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        failed = job.score(tokens=tokens, step=2, return_statistics=True)
        assert (failed.fallback, failed.statistics, failed.trust) == (True, None, 0)
    asked = server.service.requests["Score"]
    assert [(r.return_statistics, r.min_effective_share, r.HasField("min_effective_share")) for r in asked] == [
        (True, 0.5, True),
        (False, 0.0, False),
        (True, 0.0, False),
    ]


def test_the_last_step_is_what_the_service_knows(server: ScriptedServer) -> None:
    server.service.log = {("run", str(step)): step + 1 for step in range(8)}
    server.service.taught["run"] = (7, 8)
    client, job = open_job(server.url, job_id="run")
    with client, job:
        assert (job.last_step, job.last_position) == (7, 8)
        job.load_state_dict({"job_id": "run", "last_step": 4, "last_position": 5})
        assert (job.last_step, job.last_position) == (7, 8), "updates that were taken before a crash are not lost"
        server.service.log, server.service.taught = {("run", "0"): 1}, {"run": (0, 1)}
        job.load_state_dict(job.state_dict())
        assert (job.last_step, job.last_position) == (0, 1), "the weighter is one that was taught less"
    client, fresh = open_job(server.url)
    with client, fresh:
        assert (fresh.last_step, fresh.last_position) == (-1, 0)


def test_watching_ends_with_the_client(server: ScriptedServer) -> None:
    client = connect(server.url)
    watching = client.watch_weighter("default")
    assert next(watching).name == "default"
    client.close()
    with pytest.raises(Unavailable):
        next(watching)


# ---- Away -----------------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    client, job = open_job(f"grpc://127.0.0.1:{unused_port()}", SHORT)
    with client, job:
        assert not job.attached
        assert isinstance(job.failure, Unavailable)
        for step in range(20):
            scores = job.score(FEATURES, step)
            assert (scores.weights.tolist(), scores.fallback, scores.effective_sample_size) == ([1, 1], True, 2)
            job.meta_update(COTANGENT, FEATURES, step)
        assert not job.flush(0.05)
    counters = job.counters
    assert (counters.fallback_steps, counters.fallbacks) == (20, {"UNAVAILABLE": 20})
    assert (counters.updates_sent, counters.updates_dropped) == (20, 20)


def test_a_black_hole_is_contacted_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        client, job = open_job(
            f"grpc://127.0.0.1:{hole.getsockname()[1]}", Timeouts(admin_s=0.3, close_s=0.1), NO_TRIALS
        )
        with client, job:
            assert isinstance(job.failure, DeadlineExceeded)
            assert all(job.score(FEATURES, step).fallback for step in range(50))
            with pytest.raises(DeadlineExceeded):
                client.list_weighters()
        assert job.counters.fallbacks == {"DEADLINE_EXCEEDED": 50}


def test_a_job_attaches_once_the_service_is_there() -> None:
    port = unused_port()
    spec = {"features": {"names": ["loss", "length"]}}
    client, job = open_job(f"grpc://127.0.0.1:{port}", limits=QUICK_TRIALS, weighter="mine", spec=spec)
    job.meta_update(COTANGENT, FEATURES, 0)
    server = ScriptedServer(ScriptedService(), port)
    with client, job:
        wait_for(lambda: not job.score(FEATURES, 1).fallback)
        assert job.flush()
    server.stop()
    assert server.service.steps_taught() == [0]
    assert [request.name for request in server.service.requests["CreateWeighter"]] == ["mine"]
    assert server.service.requests["CreateWeighter"][0].spec.head.width > 0, "defaults are spelled out"


def test_a_job_can_be_opened_by_a_client_that_failed_to(server: ScriptedServer) -> None:
    """There is no other job whose thread would find out that the service is back."""
    server.service.before["OpenJob"] = abort(grpc.StatusCode.UNAVAILABLE, "still loading")
    with connect(server.url, timeouts=PATIENT, limits=QUICK_TRIALS, on_failure="raise") as client:
        with pytest.raises(Unavailable):
            client.open_job()
        del server.service.before["OpenJob"]

        def opened() -> Job | None:
            try:
                return client.open_job()
            except Unavailable:
                return None

        with wait_for(opened) as job:
            assert not job.score(FEATURES, 0).fallback


def test_a_hanging_service_is_asked_once(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url, SHORT)
    with client, job:
        assert [job.score(FEATURES, step).weights.tolist() for step in range(30)] == [[1, 1]] * 30
    assert server.service.calls["Score"] == 1
    assert job.counters.fallbacks == {"DEADLINE_EXCEEDED": 30}


def test_the_training_loop_makes_no_trial_calls(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.before["Heartbeat"] = server.service.hang
    client, job = open_job(server.url, SHORT, QUICK_TRIALS)
    with client, job:
        steps = 0
        while server.service.calls["Heartbeat"] < 3:
            assert job.score(FEATURES, steps).fallback
            steps += 1
    assert server.service.calls["Score"] == 1
    assert job.counters.fallback_steps == steps


def test_weights_again_after_a_hang(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url, SHORT, QUICK_TRIALS)
    with client, job:
        assert job.score(FEATURES, 0).fallback
        del server.service.before["Score"]
        assert wait_for(lambda: not (s := job.score(FEATURES, 1)).fallback and s).weights.tolist() == WEIGHTS


def test_killed_and_restarted_without_its_memory(server: ScriptedServer) -> None:
    client, job = open_job(server.url, limits=QUICK_TRIALS, job_id="run-7")
    with client, job:
        assert not job.score(FEATURES, 0).fallback
        server.stop()
        assert job.score(FEATURES, 1).weights.tolist() == [1, 1]
        for step in (1, 2, 3):
            job.meta_update(COTANGENT, FEATURES, step)
        again = ScriptedServer(ScriptedService(), server.port)
        wait_for(lambda: not job.score(FEATURES, 4).fallback)
        assert job.flush()
    again.stop()
    assert again.service.steps_taught()[-3:] == [1, 2, 3]
    assert sorted(again.service.log.values()) == [1, 2, 3]
    assert {request.job_id for request in again.service.requests["OpenJob"]} == {"run-7"}


def test_a_forgotten_job_is_opened_again_within_the_call(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        server.service.jobs.clear()
        assert job.score(FEATURES, 0).weights.tolist() == WEIGHTS
        server.service.jobs.clear()
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.flush()
    assert server.service.calls["OpenJob"] == 3
    assert (job.counters.fallback_steps, job.counters.updates_acknowledged) == (0, 1)


def test_a_weighter_that_is_gone_costs_one_call(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        server.service.jobs.clear()
        server.service.weighters.clear()
        assert all(job.score(FEATURES, step).fallback for step in range(20))
        assert isinstance(job.failure, NotFound)
        job.meta_update(COTANGENT, FEATURES, 20)
        assert not job.flush(0.05), "updates wait for the job to be attached again"
        server.service.weighters.add("default")
        job.load_state_dict(job.state_dict())
        assert job.flush()
    assert server.service.calls["Score"] == 1
    assert job.counters.fallbacks == {"NOT_FOUND": 20}


def test_the_next_address_is_taken(server: ScriptedServer) -> None:
    client, job = open_job(f"grpc://127.0.0.1:{unused_port()},127.0.0.1:{server.port}")
    with client, job:
        assert job.score(FEATURES, 0).weights.tolist() == WEIGHTS


# ---- Overloaded, wrong ----------------------------------------------------------------------------------------------


def test_overload_is_left_alone_for_as_long_as_it_asks(server: ScriptedServer) -> None:
    server.service.before["Score"] = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s="900")
    client, job = open_job(
        server.url, limits=Limits(breaker_period_s=0.01, breaker_max_period_s=1000, heartbeat_s=0.01)
    )
    with client, job:
        assert all(job.score(FEATURES, step).fallback for step in range(30))
    assert server.service.calls["Score"] == 1
    assert job.counters.fallbacks == {"RESOURCE_EXHAUSTED": 30}


def test_where_updates_have_no_room_weights_go_on(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "disk full", retry_after_s="30")
    client, job = open_job(server.url)
    with client, job:
        for step in range(3):
            assert job.score(FEATURES, step).weights.tolist() == WEIGHTS
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.flush()
        assert (job.counters.updates_refused, job.counters.updates_dropped) == (3, 0)
        del server.service.before["MetaUpdate"]
        job.meta_update(COTANGENT, FEATURES, 3)
        assert job.flush()
    assert (job.counters.updates_acknowledged, job.counters.fallback_steps) == (1, 0)


def test_a_job_that_was_closed_is_opened_again_within_the_call(server: ScriptedServer) -> None:
    def closed(request: Any, context: grpc.ServicerContext) -> None:
        if server.service.calls["OpenJob"] == 1:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"job 'x' {JOB_CLOSED}")

    client, job = open_job(server.url)
    with client, job:
        server.service.before["MetaUpdate"] = closed
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.flush()
        assert job.score(FEATURES, 1).weights.tolist() == WEIGHTS
    assert server.service.calls["OpenJob"] == 2
    assert (job.counters.updates_acknowledged, job.counters.updates_refused, job.counters.fallback_steps) == (1, 0, 0)


def test_weights_again_after_overload(server: ScriptedServer) -> None:
    server.service.before["Score"] = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s="0.02")
    client, job = open_job(server.url)
    with client, job:
        assert job.score(FEATURES, 0).fallback
        del server.service.before["Score"]
        wait_for(lambda: not job.score(FEATURES, 1).fallback)


def test_a_mistake_is_counted_each_time_and_logged_once(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.service.before["Score"] = abort(
        grpc.StatusCode.INVALID_ARGUMENT, "features has shape [2, 2], expected [B, 3]"
    )
    client, job = open_job(server.url)
    with client, job, caplog.at_level(logging.WARNING):
        assert all(job.score(FEATURES, step).fallback for step in range(5))
    assert server.service.calls["Score"] == 5, "the service answers, so the breaker stays closed"
    assert job.counters.fallbacks == {"INVALID_ARGUMENT": 5}
    assert [r.getMessage().count("expected [B, 3]") for r in caplog.records] == [1]


@pytest.mark.parametrize(
    ("arguments", "code", "rows"),
    [
        ({"features": [[1.0], [2.0, 3.0]]}, "INVALID_ARGUMENT", 2),
        ({"features": [["a"], ["b"], ["c"]]}, "INVALID_ARGUMENT", 3),
        ({"features": object()}, "INVALID_ARGUMENT", 1),
        ({"texts": "one string"}, "INVALID_ARGUMENT", 10),
        ({}, "INVALID_ARGUMENT", 1),
        ({"features": FEATURES, "step": "three"}, "INTERNAL", 2),
    ],
)
def test_arguments_that_nothing_can_be_made_of(
    server: ScriptedServer, arguments: dict[str, Any], code: str, rows: int
) -> None:
    client, job = open_job(server.url)
    with client, job:
        scores = job.score(**arguments)
        job.meta_update(COTANGENT, **arguments)
    assert (scores.weights.tolist(), scores.fallback) == ([1] * rows, True)
    assert job.counters.fallbacks == {code: 1}
    assert (job.counters.updates_sent, job.counters.updates_refused) == (1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        np.array([np.nan, 1], np.float32),
        np.array([-1, 3], np.float32),
        np.array([5, 5], np.float32),
        np.array([1, 1, 1], np.float32),
        np.array([[1, 1]], np.float32),
    ],
)
def test_wrong_answers_do_not_reach_the_loss(server: ScriptedServer, wrong: np.ndarray) -> None:
    server.service.answer_score = lambda weights: wrong
    client, job = open_job(server.url)
    with client, job:
        assert job.score(FEATURES, 0).weights.tolist() == [1, 1]
    assert job.counters.fallbacks == {"INTERNAL": 1}


# ---- Meta-updates ---------------------------------------------------------------------------------------------------


def test_a_repeated_update_is_a_duplicate(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        for step in (0, 1, 0, 1):
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.flush()
        assert job.last_position == 2
    assert (job.counters.updates_acknowledged, job.counters.updates_duplicate) == (4, 2)


def test_a_lost_acknowledgement_teaches_once(server: ScriptedServer) -> None:
    lose = abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
    server.service.after["MetaUpdate"] = lambda request, context: (
        lose(request, context) if server.service.calls["MetaUpdate"] == 1 else None
    )
    client, job = open_job(server.url, limits=QUICK_TRIALS)
    with client, job:
        for step in range(3):
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.flush()
    assert server.service.steps_taught() == [0, 0, 1, 2]
    assert list(server.service.log.values()) == [1, 2, 3]
    assert (job.counters.updates_acknowledged, job.counters.updates_duplicate) == (3, 1)


def test_a_refused_update_is_not_sent_again(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = abort(grpc.StatusCode.FAILED_PRECONDITION, "too stale")
    client, job = open_job(server.url)
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.flush()
        assert not job.score(FEATURES, 1).fallback
    assert server.service.calls["MetaUpdate"] == 1
    assert (job.counters.updates_refused, job.counters.updates_acknowledged) == (1, 0)


def test_a_full_queue_keeps_the_newest() -> None:
    port = unused_port()
    limits = Limits(pending_updates=4, breaker_period_s=0.05, breaker_max_period_s=0.1)
    client, job = open_job(f"grpc://127.0.0.1:{port}", limits=limits)
    for step in range(40):
        job.meta_update(COTANGENT, FEATURES, step)
    server = ScriptedServer(ScriptedService(), port)
    with client, job:
        assert job.flush()
    server.stop()
    assert server.service.steps_taught() == [36, 37, 38, 39]
    assert (job.counters.updates_sent, job.counters.updates_dropped, job.counters.updates_acknowledged) == (40, 36, 4)


def test_an_update_that_can_not_be_delivered_grows_too_old(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = abort(grpc.StatusCode.UNAVAILABLE, "not now")
    client, job = open_job(server.url, limits=Limits(update_age_s=0.01, breaker_period_s=0.02))
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.flush()
    assert (job.counters.updates_dropped, job.counters.updates_acknowledged) == (1, 0)


def test_a_late_acknowledgement_costs_one_deadline(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = server.service.hang
    timeouts = Timeouts(score_s=0.2, meta_update_s=20, close_s=0.1)
    client, job = open_job(server.url, timeouts)
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0)
        assert all(job.score(FEATURES, step).fallback for step in range(20))
    assert server.service.calls["Score"] == 0
    assert job.counters.fallbacks == {"DEADLINE_EXCEEDED": 20}


def test_a_backlog_is_delivered_while_steps_go_without_weights(server: ScriptedServer) -> None:
    """Were the breaker opened for it, nothing would be delivered for a period, and there would be a backlog again."""
    server.service.before["MetaUpdate"] = server.service.hang
    client, job = open_job(server.url, Timeouts(score_s=0.2, meta_update_s=20, admin_s=20, close_s=20))
    with client, job:
        for step in range(8):
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.score(FEATURES, 8).fallback
        server.service.released.set()
        wait_for(lambda: not job.score(FEATURES, 9).fallback)
        assert job.flush()
    assert server.service.steps_taught() == list(range(8))
    assert (job.counters.updates_acknowledged, job.counters.updates_duplicate) == (8, 0)


def test_a_frozen_job_sends_no_updates(server: ScriptedServer) -> None:
    client, job = open_job(server.url, role="frozen")
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.score(FEATURES, 0).weights.tolist() == WEIGHTS
    assert server.service.calls["MetaUpdate"] == 0
    assert job.counters.updates_refused == 1


def test_a_frozen_job_sends_probes_for_its_trust(server: ScriptedServer) -> None:
    client, job = open_job(server.url, role="frozen")
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0, probes=[True, False])
        job.meta_update(COTANGENT, FEATURES, 1, probes=[True])
        assert job.flush()
    (update,) = server.service.requests["MetaUpdate"]
    assert (update.trust_only, update.probes.dtype, update.probes.data) == (True, "uint8", b"\x01\x00")
    assert (job.counters.updates_acknowledged, job.counters.updates_refused) == (1, 1)


def test_probes_of_a_learning_job_teach_too(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        job.meta_update(COTANGENT, FEATURES, 0, probes=np.array([False, True]))
        job.meta_update(COTANGENT, FEATURES, 1)
        assert job.flush()
    first, second = server.service.requests["MetaUpdate"]
    assert (first.trust_only, first.probes.data, second.HasField("probes")) == (False, b"\x00\x01", False)


def test_heartbeats_tell_of_fallback_steps(server: ScriptedServer) -> None:
    client, job = open_job(server.url, limits=Limits(heartbeat_s=0.02))
    with client, job:
        server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        job.score(FEATURES, 0)
        wait_for(lambda: [r for r in server.service.requests.get("Heartbeat", []) if r.fallback_steps == 1])
    assert job.counters.fallback_steps == 1


# ---- State, closing, raising ----------------------------------------------------------------------------------------


def test_state_goes_through_json_to_another_run(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        for step in range(3):
            job.meta_update(COTANGENT, FEATURES, step)
        assert job.flush()
        state = json.loads(json.dumps(job.state_dict()))
    assert {k: v for k, v in state.items() if k != "kept"} == {"job_id": job.job_id, "last_step": 2, "last_position": 3}
    assert len(state["kept"]) == 3
    client, resumed = open_job(server.url)
    with client, resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.score(FEATURES, 3)
        resumed.meta_update(COTANGENT, FEATURES, 2)
        assert resumed.flush()
    assert server.service.requests["Score"][-1].min_position == 3
    assert server.service.requests["Score"][-1].job_id == job.job_id
    assert resumed.counters.updates_duplicate == 1


def test_state_ahead_of_the_log_does_not_wait_for_it(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        job.load_state_dict({"job_id": "from-a-lost-service", "last_step": 90, "last_position": 90})
        assert job.score(FEATURES, 91).weights.tolist() == WEIGHTS
    assert server.service.requests["Score"][-1].min_position == 0


@pytest.mark.parametrize("state", [{}, None, {"job_id": 3, "last_step": 1, "last_position": 1}])
def test_other_states_are_refused(server: ScriptedServer, state: Any) -> None:
    client, job = open_job(server.url)
    with client, job, pytest.raises(InvalidArgument, match="state_dict"):
        job.load_state_dict(state)


def test_close_twice_and_use_after_close(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    job.close()
    job.close()
    assert job_threads() == []
    assert job.score(FEATURES, 0).fallback
    job.meta_update(COTANGENT, FEATURES, 0)
    assert job.counters.updates_refused == 1
    client.close()
    client.close()
    assert server.service.calls["CloseJob"] == 1
    with pytest.raises(Unavailable, match="closed"):
        client.list_weighters()


def test_closing_the_client_ends_a_call_under_way(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = server.service.hang
    client, job = open_job(server.url, Timeouts(meta_update_s=600, close_s=0.05))
    job.meta_update(COTANGENT, FEATURES, 0)
    wait_for(lambda: server.service.calls["MetaUpdate"])
    client.close()
    wait_for(lambda: not job_threads())
    assert job.counters.updates_dropped == 1


def test_closing_does_not_wait_for_a_service_that_is_away(server: ScriptedServer) -> None:
    """Each close would take 600 s if it did: never attached, and gone in the middle."""
    endless = Timeouts(score_s=1, meta_update_s=20, admin_s=20, close_s=600)
    client, job = open_job(f"grpc://127.0.0.1:{unused_port()}", endless)
    other_client, other = open_job(server.url, endless)
    with client, other_client:
        job.meta_update(COTANGENT, FEATURES, 0)
        job.close()
        server.service.before["MetaUpdate"] = abort(grpc.StatusCode.UNAVAILABLE, "gone")
        other.meta_update(COTANGENT, FEATURES, 0)
        other.close()
    assert job.counters.updates_dropped == other.counters.updates_dropped == 1


def test_closing_waits_for_a_service_that_is_overloaded(server: ScriptedServer) -> None:
    full = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s="0.1")

    def overloaded_once(request: Any, context: grpc.ServicerContext) -> None:
        if server.service.calls["MetaUpdate"] == 1:
            full(request, context)

    server.service.before["MetaUpdate"] = overloaded_once
    client, job = open_job(server.url, limits=QUICK_TRIALS)
    with client:
        job.meta_update(COTANGENT, FEATURES, 0)
        job.close()
    assert (job.counters.updates_acknowledged, job.counters.updates_dropped) == (1, 0)


def test_an_update_under_way_at_the_close_counts_as_dropped_once(server: ScriptedServer) -> None:
    server.service.before["MetaUpdate"] = server.service.hang
    client, job = open_job(server.url, Timeouts(meta_update_s=600, close_s=0.05))
    job.meta_update(COTANGENT, FEATURES, 0)
    wait_for(lambda: server.service.calls["MetaUpdate"])
    job.close()
    assert job.counters.updates_dropped == 1
    client.close()
    wait_for(lambda: not job_threads())
    assert job.counters.updates_dropped == 1


def test_raise_mode(server: ScriptedServer) -> None:
    with connect(f"grpc://127.0.0.1:{unused_port()}", on_failure="raise") as away, pytest.raises(Unavailable):
        away.open_job()
    client = connect(server.url, timeouts=PATIENT, limits=NO_TRIALS, on_failure="raise")
    with client, client.open_job() as job:
        server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "features has no rows")
        with pytest.raises(InvalidArgument, match="no rows"):
            job.score(FEATURES, 0)
        server.service.before["MetaUpdate"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "cotangent is constant")
        job.meta_update(COTANGENT, FEATURES, 0)
        with pytest.raises(InvalidArgument, match="constant"):
            job.flush()
        with pytest.raises(InvalidArgument, match="estimator"):
            job.meta_update(COTANGENT, FEATURES, 1, estimator="other")  # type: ignore[arg-type]
    with connect(server.url, on_failure="raise") as client, pytest.raises(NotFound):
        client.open_job(weighter="nobody")
