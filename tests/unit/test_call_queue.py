"""The queue before the device: who is next, who makes room, who waited too long, how much a pass takes."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest

from weighting_contract.errors import ResourceExhausted, Unavailable
from weighting_service.call_queue import CallQueue, EngineLimits, QueuedCall


class Key:
    """Stands for a weighter."""


KEY = Key()
UNTIMED = EngineLimits(pass_s=math.inf)


def call(queue: str, samples: int = 1, tokens: int = 0, key: Key = KEY, **more: Any) -> QueuedCall:
    return QueuedCall(queue, key, samples, tokens, Future(), **more)


def filled(limits: EngineLimits, *calls: QueuedCall) -> CallQueue[QueuedCall]:
    waiting: CallQueue[QueuedCall] = CallQueue(limits)
    for each in calls:
        waiting.add(each)
    return waiting


def queues(calls: list[QueuedCall]) -> str:
    return "".join(each.queue for each in calls)


def test_who_was_served_longest_ago_is_first() -> None:
    waiting = filled(EngineLimits(samples_per_pass=1), *(call("a") for _ in range(5)))
    assert queues(waiting.take()) == "a"
    waiting.add(call("b"))
    waiting.add(call("c"))
    assert [queues(waiting.take()) for _ in range(3)] == ["b", "c", "a"]
    waiting.add(call("b"))
    waiting.add(call("b"))
    assert [queues(waiting.take()) for _ in range(5)] == ["b", "a", "b", "a", "a"], "being new is no licence"
    assert (waiting.calls, waiting.samples, waiting.take()) == (0, 0, [])


def test_a_pass_takes_from_the_queues_in_turn() -> None:
    waiting = filled(EngineLimits(samples_per_pass=4, pass_s=math.inf), *map(call, "aaaabbc"))
    assert queues(waiting.take()) == "abca"
    assert queues(waiting.take()) == "baa"


def test_a_flood_makes_room_for_others_and_for_them_alone() -> None:
    flood = [call("flood") for _ in range(4)]
    waiting = filled(EngineLimits(queued_calls=4), *flood)
    with pytest.raises(ResourceExhausted, match=r"4 calls \(--max-queued-calls\)") as refused:
        waiting.add(call("flood"))
    assert refused.value.retry_after_s > 0
    waiting.add(call("a"))
    waiting.add(call("b"))
    assert [each.future.done() for each in flood] == [False, False, True, True], "the newest go"
    with pytest.raises(ResourceExhausted):
        flood[3].future.result()
    waiting.add(call("c"))
    with pytest.raises(ResourceExhausted, match="add a service"):
        waiting.add(call("d"))
    assert queues(waiting.take()) == "flood" + "abc"


@pytest.mark.parametrize(
    ("limits", "size", "words"),
    [
        (EngineLimits(queued_samples=100), {"samples": 40}, "80 samples"),
        (EngineLimits(queued_tokens=100), {"samples": 1, "tokens": 40}, "80 tokens"),
    ],
)
def test_samples_and_tokens_are_bounded_too(limits: EngineLimits, size: dict[str, int], words: str) -> None:
    flood = [call("flood", **size) for _ in range(2)]
    waiting = filled(limits, *flood)
    with pytest.raises(ResourceExhausted, match=words):
        waiting.add(call("flood", **size))
    waiting.add(call("other", **size))
    assert [each.future.done() for each in flood] == [False, True]
    alone = filled(limits, call("large", samples=1000, tokens=1000))
    assert queues(alone.take()) == "large", "what is larger than the queue runs where nothing else waits"


def test_cancelled_calls_take_nobodys_place() -> None:
    gone, kept = call("a"), call("a")
    waiting = filled(EngineLimits(queued_calls=2), gone, kept)
    gone.future.cancel()
    waiting.add(call("a"))
    assert waiting.calls == 2
    kept.future.cancel()
    assert len(waiting.take()) == 1


def test_who_waited_too_long_is_told_and_never_reaches_the_device() -> None:
    late, cancelled, fresh = call("a", queued_at=-1e9), call("a", queued_at=-1e9), call("a")
    waiting = filled(EngineLimits(queue_wait_s=5), late, cancelled, fresh)
    cancelled.future.cancel()
    assert waiting.take() == [fresh]
    with pytest.raises(ResourceExhausted, match=r"for 5 s \(--max-queue-wait-s\)"):
        late.future.result()


def test_the_time_to_come_back_after_is_measured() -> None:
    waiting = filled(UNTIMED, *(call("a", samples=100) for _ in range(30)))
    pass_ = [call("b", samples=100)]
    for _ in range(5):
        waiting.finished(pass_, 0.1)
    assert waiting.retry_after_s() == pytest.approx(3.0)
    for _ in range(200):
        waiting.finished(pass_, 10.0)
    assert waiting.retry_after_s() == 10.0, "a client should look again before long, whatever was measured"
    waiting.refuse_all("stopping")
    assert 0 < waiting.retry_after_s() < 0.1


def test_a_pass_is_as_large_as_gets_done_in_the_time_that_it_aims_at() -> None:
    """Device A takes a time for each call, device B one for each pass: A gets small passes, B large ones."""
    slow, parallel = Key(), Key()
    waiting: CallQueue[QueuedCall] = CallQueue(EngineLimits(queued_calls=10_000, pass_s=0.01))
    sizes: dict[Key, list[int]] = {slow: [], parallel: []}
    for key, seen in sizes.items():
        for _ in range(12):
            while waiting.calls < 64:
                waiting.add(call(f"job-{waiting.calls}", samples=10, key=key))
            taken = waiting.take()
            seen.append(len(taken))
            waiting.finished(taken, 0.004 * len(taken) if key is slow else 0.002 if len(seen) > 1 else 1.0)
        waiting.refuse_all("next")
    assert sizes[slow][0] == 64, "nothing was measured yet"
    assert set(sizes[slow][1:]) <= {2, 3}
    assert sizes[parallel][:2] == [64, 1]
    assert sizes[parallel][-1] == 64, "found again, as larger passes took no longer"


def test_other_weighters_have_their_own_passes() -> None:
    other = Key()
    waiting = filled(UNTIMED, call("a"), call("b", key=other), call("c"), call("a", key=other))
    assert [queues(waiting.take()) for _ in range(2)] == ["ac", "ba"]


def test_a_reference_takes_a_pack_whatever_the_budget() -> None:
    waiting = filled(EngineLimits(tokens_per_pass=1), *(call("a", tokens=10, least_budget=30) for _ in range(5)))
    assert [len(waiting.take()) for _ in range(2)] == [3, 2]


def test_small_calls_of_all_queues_are_packed_for_a_reference_however_long_it_takes() -> None:
    slow = Key()
    waiting: CallQueue[QueuedCall] = CallQueue(EngineLimits(pass_s=0.01))
    taken = []
    for _ in range(2):  # before and after the pass was timed
        for queue in "aaabbcde":
            waiting.add(call(queue, samples=1, tokens=10, least_budget=40, key=slow))
        taken.append(waiting.take())
        waiting.finished(taken[-1], 0.02 * len(taken[-1]))
        waiting.refuse_all("next")
    assert [len(each) for each in taken] == [8, 4], "nothing was measured yet; then four, as many as fit into a pack"
    assert queues(taken[1]) == "cdeb", "one of each, beginning with who was served longest ago"
    for queue in "aaa":
        waiting.add(call(queue, samples=1, tokens=10, least_budget=40, key=slow))
    assert len(waiting.take()) == 1, "several of one queue are not"


def test_at_the_end_everybody_is_told() -> None:
    calls = [call(queue) for queue in "aab"]
    waiting = filled(UNTIMED, *calls)
    waiting.refuse_all("the service stopped")
    assert Counter(type(each.future.exception()) for each in calls) == {Unavailable: 3}
    assert (waiting.calls, waiting.samples, waiting.tokens, waiting.take()) == (0, 0, 0, [])
