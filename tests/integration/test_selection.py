"""Batches chosen from candidates scored ahead: real servers that fail as told, and a real service with a reference."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_service import ScriptedServer, ScriptedService, abort

from tests.waiting import wait_for
from trainer_client import Client, Job, Limits, Timeouts, connect
from trainer_client.cadence import Cadence
from trainer_client.select import Selection, Selector, choose, select
from weighting_contract.errors import FailedPrecondition, InvalidArgument, Unavailable

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info  # noqa: E402

PATIENT = Timeouts(score_s=20, meta_update_s=20, admin_s=20, close_s=20)
SHORT = Timeouts(score_s=0.3, meta_update_s=0.3, admin_s=20, close_s=0.3)
NO_TRIALS = Limits(breaker_period_s=1000, breaker_max_period_s=1000, heartbeat_s=1000)
QUICK_TRIALS = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1, heartbeat_s=1000)
COTANGENT = np.array([0.1, -0.1], np.float32)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    of_jobs = ("weighbridge-job", "weighbridge-select")
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith(of_jobs)])


def open_job(
    server: ScriptedServer, timeouts: Timeouts = PATIENT, limits: Limits = NO_TRIALS, **arguments: Any
) -> tuple[Client, Job]:
    client = connect(server.url, timeouts=timeouts, limits=limits, on_failure=arguments.pop("on_failure", "uniform"))
    return client, client.open_job(**arguments)


def candidates(step: int, rows: int = 8) -> np.ndarray:
    """[N, 3] tokens; the scripted service weights a row by its first."""
    return np.arange(1, rows + 1)[:, None] * [1, 10, 100] + step


def expected(step: int, keep: int = 3, probes: int = 1, rows: int = 8, seed: int = 0) -> np.ndarray:
    column = candidates(step, rows)[:, 0].astype(np.float32)
    return choose(column / column.mean(), keep, probes, (seed, step))[0]


def unselected(selection: Selection, keep: int = 3) -> bool:
    """Whether it takes the first candidates as they came."""
    plain = (selection.kept.tolist(), selection.probes.any(), selection.weights.tolist(), selection.trust)
    return selection.fallback and selection.statistics is None and plain == (list(range(keep)), False, [1.0] * keep, 0)


def without_seen(state: dict[str, Any]) -> dict[str, Any]:
    """A state of SelectedBatches but for its counts."""
    return {key: value for key, value in state.items() if key != "seen"}


# ---- Selector -------------------------------------------------------------------------------------------------------


def test_keeps_what_the_weights_say_and_teaches_with_it(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=3, probes=1, min_effective_share=0.25, seed=5)
        selector.submit(4, torch.tensor(candidates(4)), lengths=[3] * 8)
        selection = selector.result(4)
        assert selection.kept.tolist() == expected(4, seed=5).tolist()
        assert (selection.kept.dtype, selection.probes.tolist()) == (np.int64, [True, False, False])
        column = candidates(4)[:, 0].astype(np.float32)
        np.testing.assert_array_equal(selection.statistics, np.stack([column, 2 * column], 1)[selection.kept])
        np.testing.assert_allclose(selection.weights, (column / column.mean())[selection.kept])
        assert (selection.step, selection.position, selection.fallback, selection.trust) == (4, 0, False, 0.75)
        assert selector.teach(4, torch.tensor(COTANGENT), selection, update_id="four")
    score, update = server.service.requests["Score"][0], server.service.requests["MetaUpdate"][0]
    assert (score.min_effective_share, score.return_statistics) == (0.25, True)
    assert (update.update_id, update.step, update.scored_position, update.estimator) == ("four", 4, 0, 2)
    assert np.frombuffer(update.probes.data, np.uint8).tolist() == [1, 0]
    np.testing.assert_array_equal(
        np.frombuffer(update.inputs.features.data, "<f4").reshape(2, 2), selection.statistics[:2]
    )
    counters = job.counters
    assert (counters.selected, counters.unselected, counters.fallback_steps, counters.scored) == (1, 0, 0, 0)
    assert counters.updates_acknowledged == 1
    assert counters.ahead_seconds > 0


def test_scores_and_updates_keep_the_order_that_they_were_given_in(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        for step in range(3):
            selector.submit(step, candidates(step))
        positions = []
        for step in range(6):
            selection = selector.result(step)
            positions.append(selection.position)
            selector.teach(step, COTANGENT, selection)
            selector.submit(step + 3, candidates(step + 3))
    assert positions == [0, 0, 0, 1, 2, 3], "step s reads exactly the updates of steps up to s - 3"
    names = {"Score": "s", "MetaUpdate": "u"}
    order = [f"{names[method]}{step}" for method, step in server.service.order]
    assert order[:11] == "s0 s1 s2 u0 s3 u1 s4 u2 s5 u3 s6".split()
    assert job.counters.updates_acknowledged == 6, "closing hands over what is still to be taught"


def test_a_hanging_service_costs_one_deadline(server: ScriptedServer) -> None:
    server.service.before["Score"] = server.service.hang
    client, job = open_job(server, SHORT)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        for step in range(30):
            selector.submit(step, candidates(step))
        assert all(unselected(selector.result(step)) for step in range(30))
        assert not selector.teach(0, COTANGENT, selector.result(99))
    assert server.service.calls["Score"] == 1
    assert job.counters.unselected_for == {"DEADLINE_EXCEEDED": 30, "INVALID_ARGUMENT": 1}
    assert (job.counters.unselected, job.counters.failed_steps, job.counters.updates_sent) == (31, 31, 0)


def test_a_late_answer_is_dropped_and_what_nobody_waits_for_is_not_scored(server: ScriptedServer) -> None:
    release, entered = threading.Event(), threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> None:
        entered.set()
        assert release.wait(20)

    server.service.before["Score"] = slow
    client, job = open_job(server, Timeouts(score_s=20, close_s=20))
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        for step in range(4):
            selector.submit(step, candidates(step))
        assert entered.wait(20)
        selector.forget(0)
        selector.forget(1)
        selector.submit(0, candidates(7))  # anew: the first answer must not be taken for this
        release.set()
        assert selector.result(2).kept.tolist() == expected(2).tolist()
        again = selector.result(0)
        column = candidates(7)[:, 0].astype(np.float32)
        assert again.kept.tolist() == choose(column / column.mean(), 3, 1, (0, 0))[0].tolist()
        assert not selector.result(3).fallback
    assert [request.step for request in server.service.requests["Score"]] == [0, 2, 3, 0]


def test_killed_and_back_again(server: ScriptedServer) -> None:
    client, job = open_job(server, limits=QUICK_TRIALS)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        selector.submit(0, candidates(0))
        assert not selector.result(0).fallback
        server.stop()
        for step in (1, 2):
            selector.submit(step, candidates(step))
            assert unselected(selector.result(step))
        again = ScriptedServer(ScriptedService(), server.port)
        steps = itertools.count(3)

        def selects() -> bool:
            step = next(steps)
            selector.submit(step, candidates(step))
            return not selector.result(step).fallback

        wait_for(selects)
    again.stop()
    assert job.counters.unselected_for.keys() == {"UNAVAILABLE"}
    assert job.counters.selected == 2


def test_heartbeats_tell_of_steps_that_could_not_be_selected(server: ScriptedServer) -> None:
    client, job = open_job(server, limits=Limits(heartbeat_s=0.02))
    with client, job:
        server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        selector = Selector(job, keep=3, probes=1)
        selector.submit(0, candidates(0))
        selector.submit(1, candidates(1, rows=3))
        assert unselected(selector.result(0))
        assert unselected(selector.result(1)), "no more candidates than places: nothing to choose"
        wait_for(lambda: [r for r in server.service.requests.get("Heartbeat", []) if r.fallback_steps == 1])
    assert server.service.calls["Score"] == 1
    assert job.counters.unselected_for == {"INVALID_ARGUMENT": 1, "FEW_CANDIDATES": 1}


@pytest.mark.parametrize("tokens", [None, 7, [[1, 2], [3]] * 4, np.ones((8, 2)), ["a", 3] * 4], ids=str)
def test_what_can_not_be_scored_never_stops_training(server: ScriptedServer, tokens: Any) -> None:
    server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "these are no token ids")
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        selector.submit(0, tokens)
        assert unselected(selector.result(0))
        for cotangent in ([[1.0], [2.0]], "no numbers", np.ones(4), None):
            statistics = np.ones((3, 2), np.float32)
            selection = Selection(0, np.arange(3), np.zeros(3, bool), statistics, 0, False, 1.0, np.ones(3, np.float32))
            assert not selector.teach(0, cotangent, selection)
    assert (job.counters.unselected, job.counters.updates_sent, job.counters.updates_refused) == (1, 4, 4)
    assert server.service.calls["MetaUpdate"] == 0


def test_wrong_answers_reach_neither_the_batch_nor_the_weighter(server: ScriptedServer) -> None:
    server.service.answer_statistics = lambda s: s[:-1]
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        selector.submit(0, candidates(0))
        assert unselected(selector.result(0))
    assert job.counters.unselected_for == {"INTERNAL": 1}


def test_raise_mode(server: ScriptedServer) -> None:
    client, job = open_job(server, on_failure="raise")
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        server.service.before["Score"] = abort(grpc.StatusCode.INVALID_ARGUMENT, "no rows")
        selector.submit(0, candidates(0))
        with pytest.raises(InvalidArgument, match="no rows"):
            selector.result(0)
        del server.service.before["Score"]
        selector.submit(1, candidates(1))
        selection = selector.result(1)
        with pytest.raises(InvalidArgument, match="first n of the 3 samples"):
            selector.teach(1, np.ones(5), selection)
        server.service.before["MetaUpdate"] = abort(grpc.StatusCode.FAILED_PRECONDITION, "too stale")
        assert selector.teach(1, COTANGENT, selection)
        selector.submit(2, candidates(2))
        selector.submit(3, candidates(3))
        assert not selector.result(2).fallback
        with pytest.raises(FailedPrecondition, match="too stale"):
            selector.result(3)


def test_closing_twice_and_use_after_it(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=3, probes=1)
        selector.submit(0, candidates(0))
        selection = selector.result(0)
        selector.close()
        selector.close()
        selector.submit(1, candidates(1))
        assert unselected(selector.result(1))
        assert not selector.teach(0, COTANGENT, selection)
    assert job.counters.unselected_for == {"FAILED_PRECONDITION": 1}


def test_a_frozen_job_sends_probes_for_its_trust(server: ScriptedServer) -> None:
    client, job = open_job(server, role="frozen")
    with client, job:
        selector = Selector(job, keep=3, probes=2)
        selector.submit(0, candidates(0))
        assert selector.teach(0, COTANGENT, selector.result(0))
    update = server.service.requests["MetaUpdate"][0]
    assert (update.trust_only, np.frombuffer(update.probes.data, np.uint8).tolist()) == (True, [1, 1])
    assert job.counters.updates_acknowledged == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 0}, "keep is 0"),
        ({"keep": 3, "probes": 4}, "probes is 4, but a batch has 3 samples"),
        ({"keep": 3, "probes": -1}, "probes is -1"),
        ({"keep": 3, "seed": 1.5}, "seed is 1.5"),
        ({"keep": 3, "min_effective_share": 2}, "min_effective_share is 2"),
    ],
)
def test_settings_of_a_selector(server: ScriptedServer, arguments: dict[str, Any], words: str) -> None:
    client, job = open_job(server)
    with client, job, pytest.raises(InvalidArgument, match=words):
        Selector(job, **({"probes": 1} | arguments))


# ---- select ---------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> Any:
    """[count, 2] tokens; the first tells the row."""
    return torch.stack([torch.arange(1, count + 1), torch.arange(count)], 1)


def loader_of(count: int, batch: int = 4) -> list[Any]:
    return list(rows_of(count).split(batch)) if count else []


def noting(read: list[int], count: int) -> Iterator[Any]:
    """The batches of `loader_of`; the index of each goes into `read` when it is read."""
    for index, batch in enumerate(loader_of(count)):
        read.append(index)
        yield batch


def test_batches_are_chosen_from_successive_ones(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job, select(loader_of(24), job, candidates=2, probes=1, ahead=1, seed=3, warm_up=0) as batches:
        assert batches.current is None
        steps = []
        for batch in batches:
            step = batches.current.step
            group = rows_of(24)[8 * step : 8 * step + 8]
            weights = group[:, 0].float().numpy() / group[:, 0].float().numpy().mean()
            assert batch.tolist() == group[choose(weights, 4, 1, (3, step))[0]].tolist()
            assert batches.teach(COTANGENT)
            steps.append(step)
        assert steps == [0, 1, 2]
        assert [batches.current.step for _ in batches] == [3, 4, 5], "the next epoch goes on counting"
    assert job.counters.selected == 6


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_reads_ahead_as_far_as_asked(server: ScriptedServer, ahead: int) -> None:
    read: list[int] = []
    client, job = open_job(server)
    with client, job:
        batches = select(noting(read, 64), job, candidates=2, ahead=ahead)
        positions = []
        for step, _ in enumerate(batches):
            assert len(read) == min(16, 2 * (step + 1 + ahead))
            assert batches.current is not None
            positions.append(batches.current.position)
            batches.teach(COTANGENT)
    assert positions == [max(0, step - ahead) for step in range(8)]


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_looking_ahead_changes_when_candidates_are_sent_for_but_not_what_is_chosen(
    server: ScriptedServer, ahead: int
) -> None:
    log = server.service.log
    server.service.answer_score = lambda weights: np.roll(weights, len(log))  # it has learned something else

    def run(looks: Callable[[int], bool], late: bool = False) -> list[Any]:
        """What came, and by which position; `late`: it looks ahead after the step's meta-update."""
        log.clear()
        read: list[int] = []
        client, job = open_job(server)
        given, looked = [], False
        with client, job:
            batches = select(noting(read, 64), job, candidates=2, ahead=ahead, warm_up=3)
            for step, batch in enumerate(batches):
                assert batches.current is not None
                given.append((batch.tolist(), batches.current.position))
                whole = 2 * (step + 1 + ahead)
                assert len(read) == min(16, whole - 2 * (looked and ahead > 1))
                looked = looks(step)
                if looked and not late:
                    batches.look_ahead()
                    batches.look_ahead()
                    assert len(read) == min(16, whole)
                batches.teach(COTANGENT)
                assert len(read) == min(16, whole)
                if looked and late:
                    batches.look_ahead()
            batches.look_ahead()
            assert batches.state_dict()["step"] == len(given) == 8
        return given

    plain = run(lambda step: False)
    assert [position for _, position in plain] == [max(0, step - ahead) for step in range(8)]
    assert run(lambda step: True) == plain
    assert run(lambda step: True, late=True) == plain
    assert run(lambda step: step == 0) == plain
    assert run(lambda step: step != 4) == plain


def test_an_epoch_that_is_left_early_is_not_looked_ahead_in(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        loader = Positioned(64)
        batches = select(loader, job, candidates=2, ahead=2)
        batches.look_ahead()
        assert loader.state["next"] == 0, "there is no batch yet to look ahead from"
        first = iter(batches)
        next(first)
        batches.look_ahead()
        second = iter(batches)  # while the first one is still there
        next(second)
        first.close()  # type: ignore[attr-defined]
        batches.look_ahead()
        assert [batches.current.step for _ in second if batches.current is not None][:2] == [2, 3]
        read = loader.state["next"]
        batches.look_ahead()
        assert loader.state["next"] == read
    assert job.counters.unselected == 0


def test_probes_come_in_the_steps_that_are_taught(server: ScriptedServer) -> None:
    client, job = open_job(server)
    settings: dict[str, Any] = {"candidates": 2, "probes": 2, "cadence": Cadence(every=3, first=2)}
    with client, job, select(loader_of(60), job, **settings, warm_up=0) as batches:
        seen = [(batches.due, int(batches.current.probes.sum())) for _ in batches if batches.current is not None]
    assert seen[:7] == [(True, 2), (True, 2), (False, 0), (True, 2), (False, 0), (False, 0), (True, 2)]


@pytest.mark.parametrize(
    ("role", "first", "later"), [("learn", 100, [100, 110]), ("frozen", 32, [50, 100])], ids=["learn", "frozen"]
)
def test_a_frozen_job_is_asked_for_less(server: ScriptedServer, role: Any, first: int, later: list[int]) -> None:
    client, job = open_job(server, role=role)
    with client, job, select(loader_of(960), job, candidates=2) as batches:
        taught = [batches.current.step for _ in batches if batches.due and batches.current is not None]
    assert taught == [*range(first), *later]


def test_without_probes_a_warm_up_does_not_count_for_the_trust(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        for probes in (0, 2):
            selector = Selector(job, keep=4, probes=probes)
            selector.submit(probes, candidates(0), probes=3)
            selection = selector.result(probes)
            assert selection.probes.tolist() == [True, True, True, False]
            assert selector.teach(probes, COTANGENT, selection)
            selector.close()
    sent = [np.frombuffer(update.probes.data, np.uint8).sum() for update in server.service.requests["MetaUpdate"]]
    assert sent == [0, 2]


@pytest.mark.parametrize("probes", [-1, 5, 2.5])
def test_a_number_of_probes_that_can_not_be_is_refused(server: ScriptedServer, probes: Any) -> None:
    client, job = open_job(server)
    with client, job:
        selector = Selector(job, keep=4)
        with pytest.raises(InvalidArgument, match=f"probes is {probes}"):
            selector.submit(0, candidates(0), probes=probes)


def test_as_long_as_a_model_is_new_a_falling_share_is_drawn_evenly(server: ScriptedServer) -> None:
    client, job = open_job(server)
    settings: dict[str, Any] = {"candidates": 2, "probes": 2, "cadence": Cadence(every=3, first=2)}
    with client, job, select(loader_of(60), job, **settings, warm_up=4) as batches:
        seen = [int(batches.current.probes.sum()) for _ in batches if batches.current is not None]
    assert seen[:7] == [3, 2, 2, 2, 0, 0, 2]


@pytest.mark.parametrize(
    ("count", "sizes", "few"),
    [(22, [4, 4, 4], 0), (20, [4, 4, 4], 1), (18, [4, 4, 2], 1), (3, [3], 1), (0, [], 0)],
    ids=["fewer candidates", "as many as places", "fewer than places", "a short epoch", "nothing"],
)
def test_the_end_of_an_epoch(
    server: ScriptedServer, count: int, sizes: list[int], few: int, caplog: pytest.LogCaptureFixture
) -> None:
    client, job = open_job(server)
    with client, job:
        batches = select(loader_of(count), job, candidates=2, probes=1)
        given = list(batches)
    assert [len(batch) for batch in given] == sizes
    assert job.counters.unselected_for == ({"FEW_CANDIDATES": few} if few else {})
    assert (job.counters.selected, job.counters.failed_steps) == (len(sizes) - few, 0)
    assert caplog.text.count("candidates are no more than the") == few
    if few:
        assert given[-1].tolist() == rows_of(count)[-sizes[-1] :].tolist()


def test_an_epoch_that_is_left_early_loses_no_step(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        batches = select(loader_of(64), job, candidates=2, ahead=2)
        for _ in batches:
            break
        steps = []
        for batch in batches:
            steps.append(batches.current.step)
            assert set(batch[:, 1].tolist()) <= set(range(8 * (steps[-1] - 1), 8 * steps[-1]))
        assert steps == list(range(1, 9))
    assert job.counters.selected == 9


class Positioned:
    """A loader with a state, as a StatefulDataLoader: one that moves on while it is read."""

    def __init__(self, count: int) -> None:
        self.state = {"next": 0}
        self.batches = loader_of(count)

    def __iter__(self) -> Iterator[Any]:
        while self.state["next"] < len(self.batches):
            self.state["next"] += 1
            yield self.batches[self.state["next"] - 1]

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_state_is_that_of_the_last_batch_given(server: ScriptedServer, ahead: int) -> None:
    client, job = open_job(server)
    with client, job:
        whole = select(Positioned(48), job, candidates=2, ahead=ahead, warm_up=3)
        assert without_seen(whole.state_dict()) == {"step": 0, "batch_size": None, "loader": {"next": 0}}
        given, states = [], []
        for batch in whole:
            given.append(batch.tolist())
            states.append(json.loads(json.dumps(whole.state_dict())))
        assert list(map(without_seen, states)) == [
            {"step": s, "batch_size": 4, "loader": {"next": 2 * s}} for s in range(1, 7)
        ]
        resumed = select(Positioned(48), job, candidates=2, ahead=ahead, warm_up=3)
        resumed.load_state_dict(states[2])
        assert resumed.state_dict() == states[2]
        assert [batch.tolist() for batch in resumed] == given[3:]


def test_a_run_that_goes_on_with_a_short_batch_keeps_its_batch_size(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        whole = select(Positioned(34), job, candidates=2, probes=1, warm_up=3)
        sizes, states = [], []
        for batch in whole:
            sizes.append(len(batch))
            states.append(whole.state_dict())
        assert sizes == [4, 4, 4, 4, 2]
        resumed = select(Positioned(34), job, candidates=2, probes=1, warm_up=3)
        resumed.load_state_dict(states[3])
        assert [len(batch) for batch in resumed] == [2]
        resumed.load_state_dict(states[0])  # the next epoch
        assert [len(batch) for batch in resumed] == [4, 4, 4, 2]


def test_states_that_can_not_be_taken_are_refused(server: ScriptedServer) -> None:
    client, job = open_job(server)
    with client, job:
        plain = select(loader_of(48), job, start_step=5)
        assert without_seen(plain.state_dict()) == {"step": 5, "batch_size": None, "loader": None}
        with pytest.raises(InvalidArgument, match="a list takes none"):
            plain.load_state_dict({"step": 1, "loader": {"next": 2}})
        for state in (None, {}, {"step": "1", "loader": None}, {"step": 1, "loader": None, "seen": "?"}):
            with pytest.raises(InvalidArgument, match=r"SelectedBatches\.state_dict"):
                plain.load_state_dict(state)  # type: ignore[arg-type]
        plain.load_state_dict({"step": 7, "loader": None})
        next(iter(plain))
        assert plain.current is not None
        assert plain.current.step == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"candidates": 0}, "candidates is 0, expected a whole number from 1"),
        ({"candidates": 1.5}, "candidates is 1.5"),
        ({"ahead": -1}, "ahead is -1"),
        ({"probes": -1}, "probes is -1"),
        ({"start_step": -1}, "start_step is -1"),
        ({"min_effective_share": "all"}, "min_effective_share is 'all'"),
    ],
)
def test_settings_of_select_are_seen_at_once(server: ScriptedServer, arguments: dict[str, Any], words: str) -> None:
    client, job = open_job(server)
    with client, job, pytest.raises(InvalidArgument, match=words):
        select(loader_of(8), job, **arguments)


def test_mistakes_in_the_batches_are_seen_at_the_first_and_counted_later(server: ScriptedServer) -> None:
    left = {"input_ids": rows_of(4), "attention_mask": torch.tensor([[0, 1]] * 4)}
    right = left | {"attention_mask": torch.ones(4, 2)}
    client, job = open_job(server)
    with client, job:
        with pytest.raises(InvalidArgument, match="not padded on the right"):
            next(iter(select([left, left], job, candidates=2)))
        with pytest.raises(InvalidArgument, match="teach inside of the loop"):
            select([right, right], job).teach(COTANGENT)
        with pytest.raises(InvalidArgument, match="probes is 4, but a batch has 3"):
            next(iter(select(loader_of(9, 3), job)))
        given = list(select([right, right, left, left], job, candidates=2))
        assert given[1]["input_ids"].tolist() == left["input_ids"].tolist()
    assert job.counters.unselected_for == {"INVALID_ARGUMENT": 1}


def test_away_from_the_first_contact_on() -> None:
    with connect("grpc://127.0.0.1:1", timeouts=SHORT, limits=NO_TRIALS) as client, client.open_job() as job:
        batches = select(loader_of(32), job, candidates=2)
        assert [batch[0, 1].item() for batch in batches] == [0, 8, 16, 24]
        assert isinstance(job.failure, Unavailable)
    assert job.counters.unselected_for == {"UNAVAILABLE": 4}


# ---- With a real service --------------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 1024, 24


class Stream(IterableDataset[Any]):
    """Samples without end, a share of them like the target; each worker has its own."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        rng = np.random.default_rng([worker.id if worker else 0, 1])
        while True:
            wanted = rng.random() < 0.3
            ids = rng.integers(0, 40, LENGTH) if wanted else rng.integers(0, VOCABULARY, LENGTH)
            yield {"input_ids": torch.from_numpy(ids), "source": "target" if wanted else "other"}


def run(job: Job, steps: int, batch: int = 8, workers: int = 0) -> list[tuple[list[Any], list[str]]]:
    """(ids, sources) of the batches of a loop that teaches every other step what to like."""
    loader = DataLoader(Stream(), batch_size=batch, num_workers=workers)
    taken = []
    with select(loader, job, candidates=3, probes=2, warm_up=0) as batches:
        for step, given in enumerate(itertools.islice(batches, steps)):
            taken.append((given["input_ids"].tolist(), given["source"]))
            if step % 2 == 0:
                harm = torch.tensor([-1.0 if source == "target" else 1.0 for source in given["source"]])
                batches.teach(harm + torch.linspace(0, 0.1, batch))  # never the same for all
    return taken


@pytest.fixture(scope="module")
def embedded() -> Iterator[Client]:
    with connect("embedded") as client:
        yield client


def open_real_job(client: Client, **arguments: Any) -> Job:
    reference = client.get_reference("pretaught")
    documents = np.random.default_rng(0).integers(0, 40, (8, 60))
    given: dict[str, Any] = {"reference": "pretaught", "initial": "pretaught", "profile": documents}
    return client.open_job(tokenizer_checksum=reference.tokenizer_checksum, **(given | arguments))


def test_a_real_loader_with_workers_learns_what_to_keep(embedded: Client) -> None:
    with open_real_job(embedded, weighter="workers") as job:
        taken = run(job, steps=40, workers=2)
    assert job.counters.unselected == 0, job.counters
    assert (job.counters.selected, job.counters.updates_acknowledged) == (40, 20)
    assert all(len(ids) == len(sources) == 8 for ids, sources in taken)
    late = [source for _, sources in taken[-10:] for source in sources]
    assert late.count("target") / len(late) > 0.45, "of the candidates 0.3 are"


def test_runs_are_bit_identical_although_scored_ahead(embedded: Client) -> None:
    runs = []
    for name in ("first", "second"):
        with open_real_job(embedded, weighter=name) as job:
            runs.append(run(job, steps=12))
            assert job.counters.unselected == 0, job.counters
    assert runs[0] == runs[1]


def test_a_frozen_job_that_goes_on_keeps_the_same_samples(embedded: Client) -> None:
    data = [{"input_ids": torch.from_numpy(ids)} for ids in np.random.default_rng(3).integers(0, 99, (24, 8, LENGTH))]
    taken = []
    for part in (range(24), range(12, 24)):
        with open_real_job(embedded, weighter="frozen", role="frozen") as job:
            batches = select([data[i] for i in part], job, candidates=3, start_step=part.start // 3, warm_up=0)
            taken.append([batch["input_ids"].tolist() for batch in batches])
            assert job.counters.unselected == 0, job.counters
    assert taken[0][4:] == taken[1]


def test_text_batches_are_tokenised_by_the_service(embedded: Client) -> None:
    texts = [[f"text number {i} of batch {b}" for i in range(6)] for b in range(4)]
    with open_real_job(embedded, weighter="texts") as job:
        given = list(select(copy.deepcopy(texts), job, candidates=2, tokens=lambda batch: batch))
        assert job.counters.selected == 2, job.counters
    assert all(set(batch) <= set(texts[2 * i] + texts[2 * i + 1]) for i, batch in enumerate(given))


def test_a_map_style_loader_of_tuples(embedded: Client) -> None:
    ids = torch.randint(0, 500, (48, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(torch.rand(48, 2), ids, torch.arange(48)), batch_size=8)
    with open_real_job(embedded, weighter="tuples") as job:
        for noise, tokens, index in select(loader, job, candidates=3, warm_up=0):
            assert noise.shape == (8, 2)
            assert torch.equal(tokens, ids[index])
        assert job.counters.selected == 2, job.counters
