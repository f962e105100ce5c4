"""A service that comes back from an older copy of its state, or with the weighter made anew: noticed, and by policy."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ServiceThread
from tests.faults.proxy import FaultyProxy
from tests.faults.training import SPEC
from tests.waiting import wait_for
from trainer_client import Client, Job, Limits, Timeouts, connect
from trainer_client.sender import QUIET_S
from weighting_contract.errors import FailedPrecondition, InvalidArgument

PATIENT = Timeouts(score_s=30, meta_update_s=30, admin_s=30, close_s=30)
QUICK_TRIALS = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1, heartbeat_s=1000)
COPIED, LOST = 3, 3  # updates before the copy was made, and after it


def features(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


def teach(job: Job, steps: range) -> None:
    for step in steps:
        job.meta_update(features(step)[:, 0], features(step), step)
    assert job.flush()


class Restorable:
    """A service behind one address, whose state can be put back to a copy."""

    def __init__(self, folder: Path) -> None:
        self._state, self._copy = folder / "state", folder / "copy"
        self._service = ServiceThread(self._state)
        self._proxy = FaultyProxy(self._service.address.grpc_port)
        self.url = f"grpc://127.0.0.1:{self._proxy.port}"

    def back_up(self) -> None:
        self._service.stop()
        shutil.copytree(self._state, self._copy)
        self._start()

    def restore(self) -> None:
        """Takes as long as it does in life at the least: in less, the job takes the service for the one it was."""
        begun = time.monotonic()
        self._service.stop()
        shutil.rmtree(self._state)
        shutil.copytree(self._copy, self._state)
        self._start()
        wait_for(lambda: time.monotonic() - begun > QUIET_S)

    def close(self) -> None:
        self._proxy.close()
        self._service.stop()

    def _start(self) -> None:
        self._service = ServiceThread(self._state)
        self._proxy.target_port = self._service.address.grpc_port

    def client(self, policy: Any = "resend", **limits: Any) -> Client:
        return connect(
            self.url,
            timeouts=PATIENT,
            limits=Limits(**{**vars(QUICK_TRIALS), **limits}),
            on_older_service=policy,
        )

    def position(self) -> int:
        with connect(self._service.address.grpc_url) as client:
            return client.get_weighter("w").position


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Restorable]:
    restorable = Restorable(tmp_path)
    yield restorable
    restorable.close()


@pytest.fixture
def untroubled(tmp_path: Path) -> Callable[[list[int]], list[float]]:
    """What a weighter says that was taught by these steps and had no troubles."""

    def weights(steps: list[int]) -> list[float]:
        with (
            connect("embedded", timeouts=PATIENT, on_failure="raise") as client,
            client.open_job("run", weighter="w", spec=SPEC) as job,
        ):
            for step in steps:
                teach(job, range(step, step + 1))
            return weights_of(job)

    return weights


def weights_of(job: Job) -> list[float]:
    scores = job.score(features(1000), 1000)
    assert not scores.fallback
    return [float(w) for w in scores.weights]


def opened(client: Client) -> Job:
    return client.open_job("run", weighter="w", spec=SPEC)


def taught_and_restored(service: Restorable, job: Job) -> None:
    teach(job, range(COPIED))
    service.back_up()
    wait_for(lambda: not job.score(features(0), 0).fallback)
    teach(job, range(COPIED, COPIED + LOST))
    assert job.last_position == COPIED + LOST
    service.restore()


def test_a_running_job_sends_again_what_was_lost(service: Restorable, untroubled: Any) -> None:
    with service.client() as client, opened(client) as job:
        taught_and_restored(service, job)
        teach(job, range(COPIED + LOST, COPIED + LOST + 1))
        wait_for(lambda: not job.score(features(0), 0).fallback)
        assert job.flush()
        counters, after = job.counters, weights_of(job)
    assert (counters.updates_resent, counters.updates_sent) == (LOST, COPIED + LOST + 1)
    assert counters.updates_acknowledged == counters.updates_sent
    assert service.position() == COPIED + LOST + 1
    assert after == untroubled(list(range(COPIED + LOST + 1))), "in their order, each once"


def test_a_run_that_goes_on_from_its_checkpoint_sends_again_what_was_lost(service: Restorable, untroubled: Any) -> None:
    with service.client() as client, opened(client) as job:
        taught_and_restored(service, job)
        state = json.loads(json.dumps(job.state_dict()))
    with service.client() as client, client.open_job(weighter="w", spec=SPEC) as resumed:
        resumed.load_state_dict(state)
        teach(resumed, range(COPIED + LOST, COPIED + LOST + 1))
        assert (resumed.last_step, resumed.last_position) == (COPIED + LOST, COPIED + LOST + 1)
        assert resumed.counters.updates_resent == LOST
        assert weights_of(resumed) == untroubled(list(range(COPIED + LOST + 1)))


def test_what_was_not_kept_is_lost(service: Restorable, untroubled: Any) -> None:
    with service.client(kept_updates=2) as client, opened(client) as job:
        taught_and_restored(service, job)
        wait_for(lambda: not job.score(features(0), 0).fallback)
        assert job.flush()
        assert job.counters.updates_resent == 2
        assert weights_of(job) == untroubled([0, 1, 2, 4, 5])


def test_a_weighter_made_anew_is_taught_again(service: Restorable, untroubled: Any) -> None:
    with service.client() as client, opened(client) as job:
        teach(job, range(COPIED))
        client.delete_weighter("w")
        teach(job, range(COPIED, COPIED + 1))
        assert job.counters.updates_resent == COPIED
        assert weights_of(job) == untroubled(list(range(COPIED + 1)))


def test_going_on_from_there(service: Restorable, untroubled: Any, caplog: pytest.LogCaptureFixture) -> None:
    with service.client("continue") as client, opened(client) as job:
        taught_and_restored(service, job)
        teach(job, range(COPIED + LOST, COPIED + LOST + 2))
        wait_for(lambda: not job.score(features(0), 0).fallback)
        assert job.counters.updates_resent == 0
        assert job.counters.updates_acknowledged == job.counters.updates_sent
        assert job.state_dict()["kept"] == []
        assert weights_of(job) == untroubled([0, 1, 2, 6, 7])
    told = [r.getMessage() for r in caplog.records if "going on from there" in r.getMessage()]
    assert len(told) == 1
    assert "step 5, position 6" in told[0]


def test_stopping_where_a_checkpoint_is_loaded(service: Restorable) -> None:
    with service.client("stop") as client, opened(client) as job:
        taught_and_restored(service, job)
        state = job.state_dict()
        job.close()
        with client.open_job(weighter="w") as resumed, pytest.raises(FailedPrecondition, match="older state"):
            resumed.load_state_dict(state)
    assert service.position() == COPIED


def test_stopping_while_training_goes_on(service: Restorable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with service.client("stop") as client, opened(client) as job:
        taught_and_restored(service, job)
        wait_for(lambda: job.score(features(0), 0).fallback and "has stopped" in str(job.failure))
        refused = job.counters.updates_refused
        for step in range(COPIED + LOST, 20):
            assert job.score(features(step), step).weights.tolist() == [1, 1, 1, 1]
            job.meta_update(features(step)[:, 0], features(step), step)
        assert job.counters.updates_refused - refused == 20 - COPIED - LOST
        assert job.failure is not None
        assert "on_older_service is 'stop'" in job.failure.message
    assert service.position() == COPIED
    assert len([r for r in caplog.records if r.getMessage().startswith("weighter 'w' is at position")]) == 1


@pytest.mark.parametrize("kept", [3, [3], ["not base64!"]])
def test_a_damaged_state_is_refused(service: Restorable, kept: Any) -> None:
    with service.client() as client, opened(client) as job, pytest.raises(InvalidArgument, match="kept"):
        job.load_state_dict({**job.state_dict(), "kept": kept})


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="on_older_service is 'perhaps'"):
        connect("grpc://localhost:1", on_older_service="perhaps")  # type: ignore[arg-type]
