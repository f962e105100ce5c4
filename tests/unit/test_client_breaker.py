from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import pytest

from trainer_client.breaker import Backoff, CircuitBreaker, jittered
from weighting_contract.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def failing(error: BaseException) -> Callable[[], NoReturn]:
    def attempt() -> NoReturn:
        raise error

    return attempt


def fail(breaker: CircuitBreaker, error: WeighbridgeError, *, trial: bool = False) -> None:
    with pytest.raises(type(error)):
        breaker.call(failing(error), trial=trial)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(5.0, 60.0, clock)


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded("late")])
def test_opens_and_answers_with_the_kind_of_error_that_opened_it(
    breaker: CircuitBreaker, error: WeighbridgeError
) -> None:
    fail(breaker, error)
    with pytest.raises(type(error), match=error.message):
        breaker.call(lambda: pytest.fail("called while open"))
    with pytest.raises(type(error)):
        breaker.check()


def test_answers_about_the_request_leave_it_closed(breaker: CircuitBreaker) -> None:
    fail(breaker, InvalidArgument("wrong"))
    assert breaker.call(lambda: "answer") == "answer"
    assert breaker.trial_in_s() is None


def test_only_a_trial_gets_through_and_only_after_the_period(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, Unavailable("away"))
    assert 4.0 <= (breaker.trial_in_s() or 0) <= 6.0
    with pytest.raises(Unavailable):
        breaker.call(lambda: pytest.fail("too early"), trial=True)
    clock.now += 6.1
    assert breaker.trial_in_s() == 0
    with pytest.raises(Unavailable):
        breaker.call(lambda: pytest.fail("not a trial"))
    assert breaker.call(lambda: "back", trial=True) == "back"
    assert breaker.call(lambda: "closed") == "closed"


def test_one_trial_at_a_time(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, Unavailable("away"))
    clock.now += 6.1

    def trial() -> str:
        assert (breaker.trial_in_s() or 0) > 0
        with pytest.raises(Unavailable):
            breaker.call(lambda: pytest.fail("second trial"), trial=True)
        return "answer"

    assert breaker.call(trial, trial=True) == "answer"


def test_the_period_doubles_up_to_its_cap(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, Unavailable("away"))
    for expected in (10, 20, 40, 60, 60):
        clock.now += 1000
        fail(breaker, Unavailable("away"), trial=True)
        assert 0.8 * expected <= (breaker.trial_in_s() or 0) <= 1.2 * expected


def test_a_failure_soon_after_closing_goes_on_with_the_doubled_period(breaker: CircuitBreaker, clock: Clock) -> None:
    for expected in (5, 10, 20):
        fail(breaker, DeadlineExceeded("scores hang"))
        assert 0.8 * expected <= (breaker.trial_in_s() or 0) <= 1.2 * expected
        clock.now += 30
        breaker.call(lambda: "heartbeats don't", trial=True)
    clock.now += 30
    fail(breaker, DeadlineExceeded("after a good while"))
    assert 4 <= (breaker.trial_in_s() or 0) <= 6


def test_late_news_of_earlier_calls_changes_nothing(breaker: CircuitBreaker) -> None:
    def slow_success() -> str:
        fail(breaker, DeadlineExceeded("another call"))
        return "late answer"

    assert breaker.call(slow_success) == "late answer"
    assert breaker.is_open


def test_late_failures_of_earlier_calls_change_nothing(breaker: CircuitBreaker) -> None:
    def slow_failure() -> str:
        fail(breaker, DeadlineExceeded("another call"))
        opened.append(breaker.trial_in_s())
        raise Unavailable("also late")

    opened: list[float | None] = []
    with pytest.raises(Unavailable):
        breaker.call(slow_failure)
    assert breaker.trial_in_s() == opened[0]


@pytest.mark.parametrize(("asked_s", "expected_s"), [(0.5, 0.5), (1e9, 60.0), (-1.0, 0.0)])
def test_overload_is_left_alone_as_long_as_it_asks(breaker: CircuitBreaker, asked_s: float, expected_s: float) -> None:
    fail(breaker, ResourceExhausted("full", asked_s))
    trial_in_s = breaker.trial_in_s()
    assert trial_in_s is not None
    assert expected_s <= trial_in_s <= 1.2 * expected_s
    with pytest.raises(ResourceExhausted):
        breaker.check()


def test_an_interrupted_trial_leaves_room_for_the_next(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, Unavailable("away"))
    clock.now += 6.1
    with pytest.raises(KeyboardInterrupt):
        breaker.call(failing(KeyboardInterrupt()), trial=True)
    assert breaker.call(lambda: "back", trial=True) == "back"


def test_backoff_doubles_and_starts_again() -> None:
    backoff = Backoff(1.0, 3.0, jitter=0.0)
    assert [backoff.next_s() for _ in range(4)] == [1, 2, 3, 3]
    backoff.reset()
    assert backoff.next_s() == 1


def test_hundreds_of_clients_do_not_come_back_in_one_instant() -> None:
    for waits in ([jittered(15.0) for _ in range(300)], [Backoff(15.0, 60.0).next_s() for _ in range(300)]):
        assert 12.0 <= min(waits) < 13.0
        assert 17.0 < max(waits) <= 18.0
        at_once = max(Counter(int(wait / 0.25) for wait in waits).values())
        assert at_once < 60, "of 300 that lost the service together, most are due in other quarters of a second"
