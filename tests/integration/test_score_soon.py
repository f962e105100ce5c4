"""`Job.score_soon`: what `score` answers, while the caller goes on. Real gRPC servers, real sockets."""

from __future__ import annotations

import threading
import time
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
    abort,
)

from tests.waiting import wait_for
from trainer_client import Client, Job, Timeouts, connect
from weighting_contract.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    wait_for(lambda: not threads("weighbridge-"))


def threads(prefix: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(prefix)]


def open_job(url: str, timeouts: Timeouts = PATIENT, **settings: Any) -> tuple[Client, Job]:
    client = connect(url, timeouts=timeouts, limits=NO_TRIALS, **settings)
    return client, client.open_job()


def test_answers_as_score_does(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        now = job.score(FEATURES, 0, min_effective_share=0.3, return_statistics=True)
        soon = job.score_soon(FEATURES, 0, min_effective_share=0.3, return_statistics=True).result()
        assert soon.weights.tolist() == now.weights.tolist() == WEIGHTS
        np.testing.assert_array_equal(soon.statistics, now.statistics)
        assert (soon.position, soon.trust, soon.fallback) == (now.position, now.trust, False)
        assert job.counters.scored == 2
    first, second = server.service.requests["Score"]
    assert first == second


def test_torch_in_torch_out(server: ScriptedServer) -> None:
    torch = pytest.importorskip("torch")
    client, job = open_job(server.url)
    with client, job:
        scores = job.score_soon(torch.tensor(FEATURES), 0).result()
    assert scores.weights.tolist() == WEIGHTS
    assert scores.weights.dtype is torch.float32


def test_returns_before_the_answer_and_reads_the_inputs_first(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url)
    with client, job:
        features = FEATURES.copy()
        pending = job.score_soon(features, 0)
        features[:] = 1
        wait_for(lambda: server.service.calls["Score"] == 1)
        assert not pending.done
        server.service.released.set()
        assert pending.result().weights.tolist() == WEIGHTS
        assert pending.done
        assert pending.result() is pending.result()
        assert job.counters.scored == 1


def test_one_thread_is_made_when_it_is_needed(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        job.score(FEATURES, 0)
        assert not threads("weighbridge-score")
        for step in range(20):
            pending = [job.score_soon(FEATURES, step) for _ in range(3)]
            assert [p.result().weights.tolist() for p in pending] == 3 * [WEIGHTS]
        assert len(threads("weighbridge-score")) == 1


def test_only_waiting_is_the_callers_time(server: ScriptedServer) -> None:
    server.service.before["Score"] = lambda request, context: time.sleep(0.5)
    client, job = open_job(server.url)
    with client, job:
        pending = job.score_soon(FEATURES, 0)
        wait_for(lambda: pending.done)
        pending.result()
        counters = job.counters
        assert counters.score_seconds < 0.5 < counters.ahead_seconds
        pending = job.score_soon(FEATURES, 1)
        started = time.perf_counter()
        pending.result()
        waited = time.perf_counter() - started
        assert job.counters.score_seconds - counters.score_seconds > 0.9 * waited


def test_a_meta_update_comes_after_the_scores_before_it(server: ScriptedServer) -> None:
    """Or the weights of a step could come from its own update, on one run and not on the next."""
    server.service.before["Score"] = lambda request, context: time.sleep(0.05)
    client, job = open_job(server.url)
    with client, job:
        for step in range(3):
            pending = job.score_soon(FEATURES, step)
            job.meta_update(COTANGENT, FEATURES, step)
            assert pending.done
        assert job.flush()
    methods = ["Score", "MetaUpdate"]
    assert server.service.order == [(method, step) for step in range(3) for method in methods]
    assert [update.scored_position for update in server.service.requests["MetaUpdate"]] == [0, 1, 2]
    assert [score.min_position for score in server.service.requests["Score"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (abort(grpc.StatusCode.INTERNAL, "a bug"), "INTERNAL"),
        (abort(grpc.StatusCode.INVALID_ARGUMENT, "no"), "INVALID_ARGUMENT"),
        (abort(grpc.StatusCode.UNAVAILABLE, "gone"), "UNAVAILABLE"),
    ],
)
def test_a_failure_is_uniform_weights(server: ScriptedServer, fault: Any, code: str) -> None:
    server.service.before["Score"] = fault
    client, job = open_job(server.url)
    with client, job:
        scores = job.score_soon(FEATURES, 0).result()
        assert (scores.weights.tolist(), scores.fallback) == ([1, 1], True)
        assert job.counters.fallbacks == {code: 1}
        assert job.counters.scored == 0


def test_a_deadline_opens_the_breaker_for_both_forms(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url, SHORT)
    with client, job:
        started = time.monotonic()
        assert job.score_soon(FEATURES, 0).result().fallback
        assert 0.25 < time.monotonic() - started < 5
        later = [job.score_soon(FEATURES, step) for step in range(1, 100)]
        assert all(pending.done for pending in later), "answered at once"
        assert all(pending.result().fallback for pending in later)
        assert job.score(FEATURES, 100).fallback
        assert job.counters.fallbacks == {"DEADLINE_EXCEEDED": 101}
        assert server.service.calls["Score"] == 1
        server.service.released.set()


@pytest.mark.parametrize("features", [None, object(), np.array(["a", "b"])])
def test_inputs_that_are_none(server: ScriptedServer, features: Any) -> None:
    client, job = open_job(server.url)
    with client, job:
        scores = job.score_soon(features, 0).result()
        assert scores.fallback
        assert job.counters.fallback_steps == 1
        assert server.service.calls["Score"] == 0


def test_failures_are_raised_where_that_is_asked_for(server: ScriptedServer) -> None:
    server.service.before["Score"] = abort(grpc.StatusCode.UNAVAILABLE, "gone")
    client, job = open_job(server.url, on_failure="raise")
    with client, job:
        with pytest.raises(InvalidArgument, match="no inputs were given"):
            job.score_soon().result()
        pending = job.score_soon(FEATURES, 0)
        for _ in range(2):
            with pytest.raises(Unavailable, match="gone"):
                pending.result()
    with pytest.raises(FailedPrecondition, match="the job is closed"):
        job.score_soon(FEATURES, 0).result()


def test_a_closed_job_answers_uniformly_and_makes_no_thread(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client:
        job.close()
        assert job.score_soon(FEATURES, 0).result().fallback
        assert not threads("weighbridge-score")
        assert job.counters.fallbacks == {"FAILED_PRECONDITION": 1}


def test_closing_waits_for_the_answer(server: ScriptedServer) -> None:
    """A call that comes after the job was closed would open it again."""
    server.service.before["Score"] = lambda request, context: time.sleep(0.2)
    client, job = open_job(server.url)
    with client:
        pending = job.score_soon(FEATURES, 0)
        wait_for(lambda: server.service.calls["Score"] == 1)
        job.close()
        assert pending.done
        assert pending.result().weights.tolist() == WEIGHTS
    assert server.service.calls["OpenJob"] == 1


def test_closing_waits_no_longer_than_its_own_time(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url, Timeouts(score_s=3, meta_update_s=1, admin_s=20, close_s=0.2))
    with client:
        pending = job.score_soon(FEATURES, 0)
        wait_for(lambda: server.service.calls["Score"] == 1)
        started = time.monotonic()
        job.close()
        assert time.monotonic() - started < 2
        server.service.released.set()
        pending.result()


# ---- Features that a function makes ---------------------------------------------------------------------------------


def test_a_function_makes_the_features_on_the_jobs_thread(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    called_on, may_go = [], threading.Event()

    def features() -> np.ndarray:
        called_on.append(threading.current_thread().name)
        may_go.wait(30)
        return FEATURES

    with client, job:
        pending = job.score_soon(features, 0, min_effective_share=0.3)
        assert not pending.done
        assert server.service.calls["Score"] == 0
        may_go.set()
        now = job.score(FEATURES, 0, min_effective_share=0.3)
        assert pending.result().weights.tolist() == now.weights.tolist() == WEIGHTS
        assert called_on == [f"weighbridge-score-{job.job_id}_0"]
        assert job.counters.scored == 2
    first, second = server.service.requests["Score"]
    assert first == second


def test_a_function_that_fails_is_a_fallback_for_whatever_batch(server: ScriptedServer) -> None:
    client, job = open_job(server.url)
    with client, job:
        scores = job.score_soon(lambda: 1 / 0, 0).result()
        assert (scores.weights.tolist(), scores.fallback) == ([1], True)
        assert job.counters.fallbacks == {"INTERNAL": 1}
        assert server.service.calls["Score"] == 0
    client, job = open_job(server.url, on_failure="raise")
    with client, job, pytest.raises(Internal, match="ZeroDivisionError"):
        job.score_soon(lambda: 1 / 0, 0).result()


def test_without_an_answer_a_function_still_tells_how_many_samples_there_are(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server.url, SHORT)
    with client, job:
        for step in range(3):
            scores = job.score_soon(lambda: FEATURES, step).result()
            assert (scores.weights.tolist(), scores.fallback) == ([1, 1], True)
        assert job.counters.fallbacks == {"DEADLINE_EXCEEDED": 3}
        assert server.service.calls["Score"] == 1
        server.service.released.set()
    assert job.score_soon(lambda: FEATURES, 4).result().weights.tolist() == [1, 1], "closed"
