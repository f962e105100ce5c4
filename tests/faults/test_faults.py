"""Every fault at every call: training goes on, in time, and what it taught arrives once when the fault is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import Address
from tests.faults.conftest import FaultTable, Outcome
from tests.faults.proxy import FAULTS, Fault, FaultyProxy
from tests.faults.training import DOCUMENTS, SPEC, TAUGHT_EVERY, Loop, SelectingLoop, check_weights
from tests.waiting import wait_for
from trainer_client import Client, Job, Limits, Timeouts, connect
from weighting_contract.errors import DeadlineExceeded

DEADLINE_S, SLACK_S = 0.3, 1.0  # how slow this machine may be beyond the deadline: these are tests of hanging
PERIOD_S = 0.3  # of the breaker
STEPS = 40  # while the fault is there
TIMEOUTS = Timeouts(score_s=DEADLINE_S, meta_update_s=DEADLINE_S, admin_s=DEADLINE_S, close_s=DEADLINE_S)
CALLS = (
    "connect",
    "create_weighter",
    "open_job",
    "score",
    "meta_update",
    "heartbeat",
    "flush",
    "close",
    "look-ahead",
)
AT_ONCE = 8  # loops that run beside each other: most of them wait


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_training_goes_on(scheme: str, call: str, service: Address, table: FaultTable) -> None:
    def outcome(fault: Fault) -> Outcome | BaseException:
        try:
            return Case(scheme, call, fault, service).outcome()
        except BaseException as exc:
            exc.add_note(f"at {call} over {scheme}, with the fault {fault}")
            return exc

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = dict(zip(FAULTS, pool.map(outcome, FAULTS), strict=True))
    table.rows[scheme, call] = {fault: o for fault, o in outcomes.items() if isinstance(o, Outcome)}
    if failures := [o for o in outcomes.values() if isinstance(o, BaseException)]:
        raise failures[0]


def answers(client: Client) -> bool:
    """Whether the service answers in time: without a fault, a busy machine alone may be slower than the deadline."""
    try:
        client.list_weighters()
    except DeadlineExceeded:
        return False
    return True


class Case:
    """One fault at one call of a training loop."""

    def __init__(self, scheme: str, call: str, fault: Fault, service: Address) -> None:
        self.call, self.fault, self.service = call, fault, service
        self.name = f"{scheme}-{call}-{fault}".replace(" ", "-").replace("_", "-")
        target = service.grpc_port if scheme == "grpc" else service.rest_port
        self.proxy = FaultyProxy(target)
        self.url = f"{scheme}://127.0.0.1:{self.proxy.port}"
        self.slowest_s = 0.0
        self.begun = self.attempts = 0.0

    def outcome(self) -> Outcome:
        with self.proxy, self.client() as client, self.no_weighter_left():
            before_job = self.call in ("connect", "create_weighter", "open_job")
            if before_job:
                self.before_job(client)
            job = self.timed(lambda: self.open_job(client))
            if self.call == "look-ahead":
                loop: Loop = SelectingLoop(job)
            else:
                loop = Loop(job)
            if not before_job:
                loop.until_weighed()
            return self.of_loop(loop, job)

    def of_loop(self, loop: Loop, job: Job) -> Outcome:
        before = len(loop.seconds)
        with self.a_bounded_number_of_attempts():
            if self.call in ("score", "meta_update", "look-ahead"):
                loop.run(1, lambda call: self.begin() if call == self.call else None)
            elif self.call in ("heartbeat", "flush", "close"):
                self.begin()
                self.of_background(loop, job)
            loop.run(STEPS)
        uniform = sum(loop.fallbacks[before:])
        if self.call == "close":
            return self.closed(job, uniform)
        self.check_steps(loop.seconds[before:])
        outcome_s = self.slowest_s
        acknowledged = job.counters.updates_acknowledged
        self.proxy.set(Fault.NONE)
        loop.until_weighed()
        loop.run(1)
        loop.hand_over()
        assert job.flush(20)
        later = job.counters.updates_acknowledged - acknowledged
        self.check_steps(loop.seconds[before:])
        self.check_once(job)
        loop.close()
        return Outcome(uniform, later, outcome_s / DEADLINE_S)

    @contextmanager
    def no_weighter_left(self) -> Iterator[None]:
        yield
        with connect(self.service.grpc_url) as direct:
            direct.delete_weighter(self.name)

    def before_job(self, client: Client) -> None:
        if self.call != "create_weighter":
            with connect(self.service.grpc_url) as direct:
                direct.create_weighter(self.name, SPEC)
        if self.call != "connect":
            wait_for(lambda: answers(client))  # there is a connection that the fault meets
        self.begin()

    def of_background(self, loop: Loop, job: Job) -> None:
        if self.call == "heartbeat":
            attempts = self.proxy.attempts
            wait_for(lambda: job.away or self.proxy.attempts > attempts)
            return
        loop.run(3 * TAUGHT_EVERY)
        self.timed(job.flush if self.call == "flush" else job.close)

    def closed(self, job: Job, uniform: int) -> Outcome:
        self.proxy.set(Fault.NONE)
        self.check_once(job, may_drop=True)
        return Outcome(uniform, 0, self.slowest_s / DEADLINE_S, job.counters.updates_dropped)

    # ---- Means ------------------------------------------------------------------------------------------------------

    def client(self) -> Client:
        client: Client = self.timed(self.connected)
        return client

    def connected(self) -> Client:
        beat_s = 0.1 if self.call == "heartbeat" else 1000
        limits = Limits(
            heartbeat_s=beat_s, breaker_period_s=PERIOD_S, breaker_max_period_s=PERIOD_S, pending_updates=200
        )
        return connect(self.url, timeouts=TIMEOUTS, limits=limits)

    def open_job(self, client: Client) -> Job:
        if self.call == "look-ahead":
            return client.open_job(
                self.name, weighter=self.name, initial="pretaught", reference="pretaught", profile=DOCUMENTS
            )
        return client.open_job(self.name, weighter=self.name, spec=None if self.call == "connect" else SPEC)

    def begin(self) -> None:
        self.proxy.set(self.fault)

    def timed(self, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.check_steps([time.perf_counter() - started])

    # ---- What must hold ---------------------------------------------------------------------------------------------

    def check_steps(self, seconds: list[float]) -> None:
        self.slowest_s = max(self.slowest_s, *seconds)
        assert self.slowest_s < DEADLINE_S + SLACK_S, f"{self.slowest_s:.2f} s with a deadline of {DEADLINE_S} s"

    @contextmanager
    def a_bounded_number_of_attempts(self) -> Iterator[None]:
        """One a breaker period, not one a step; each is made twice where the first connection is broken."""
        started, attempts = time.monotonic(), self.proxy.attempts
        yield
        periods = 1 + (time.monotonic() - started) / (0.8 * PERIOD_S)
        under_way = 4  # a score and an update at the same time, before it was known
        made, most = self.proxy.attempts - attempts, 3 * periods + under_way
        if self.fault is not Fault.CORRUPT:  # it answers at once, and sometimes what can be read
            assert made <= most, f"{made} attempts in {periods:.1f} breaker periods and {STEPS} steps"

    def check_once(self, job: Job, may_drop: bool = False) -> None:
        """Every update is in the log, and once."""
        with connect(self.service.grpc_url) as direct:
            position = direct.get_weighter(self.name).position
        counters = job.counters
        ended = counters.updates_acknowledged + counters.updates_refused + counters.updates_dropped
        assert ended == counters.updates_sent, counters
        assert counters.updates_acknowledged <= position <= counters.updates_sent, counters
        if not may_drop and self.fault is not Fault.CORRUPT:  # where an answer said something else than was meant
            assert position == counters.updates_sent, counters


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_flipped_bit_of_an_answer_reaches_the_loss(scheme: str, service: Address) -> None:
    target = service.grpc_port if scheme == "grpc" else service.rest_port
    limits = Limits(breaker_period_s=0.01, breaker_max_period_s=0.01, heartbeat_s=1000)
    timeouts = Timeouts(score_s=2, meta_update_s=2, admin_s=2, close_s=2)
    with (
        FaultyProxy(target) as proxy,
        connect(f"{scheme}://127.0.0.1:{proxy.port}", timeouts=timeouts, limits=limits) as client,
        client.open_job(weighter=f"flipped-{scheme}", spec=SPEC) as job,
    ):
        loop = Loop(job)
        loop.run(20)
        inputs = loop.parameters[None] + DOCUMENTS[0][:, None].astype("f4")
        for at in range(0, 240, 3):
            wait_for(lambda: not job.away, about=lambda at=at: f"before byte {at}: {job.counters}")
            proxy.flip(at)
            check_weights(job.score(inputs, 100 + at).weights)
        wait_for(lambda: not job.away)
        assert not job.score(inputs, 500).fallback
