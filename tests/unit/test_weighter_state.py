"""The weighter as a state machine: replay, snapshots, skipped updates, exports, and scoring while it learns."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from small_weighters import CPU, FEATURES, SPECS, TOKENS, inputs_of
from torch import Tensor

from weighting_contract.errors import InvalidArgument, Unavailable
from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service.domain import Estimator, MetaUpdate, Scores
from weighting_service.states import device_of
from weighting_service.weighter import (
    Published,
    Weighter,
    count_parameters,
)
from weighting_service.weighter.model import Samples


def update_of(spec: WeighterSpec, position: int) -> MetaUpdate:
    rng = np.random.default_rng(1000 + position)
    inputs = inputs_of(spec, position)
    assert inputs.features is not None
    cotangent = (inputs.features[:, 1] + rng.normal(size=inputs.samples)).astype(np.float32) * np.float32(1e-5)
    estimator = Estimator.SCORE_FUNCTION if position % 4 == 0 else Estimator.VJP
    return MetaUpdate(f"job-{position % 2}", str(position), position, inputs, cotangent, position - 1, estimator)


def taught(spec: WeighterSpec, updates: int) -> Weighter:
    weighter = Weighter(spec, device=CPU)
    advance(weighter, updates)
    return weighter


def advance(weighter: Weighter, to: int) -> None:
    for position in range(weighter.position + 1, to + 1):
        weighter.apply(position, update_of(weighter.spec, position))


def assert_same_state(a: Weighter, b: Weighter) -> None:
    assert json.dumps(a.state_metadata(), sort_keys=True) == json.dumps(b.state_metadata(), sort_keys=True)
    assert a.statistics == b.statistics
    assert_same_tensors(a.state_tensors(), b.state_tensors())


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


# ---- Replay and snapshots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_same_updates_give_the_same_bits(spec: WeighterSpec) -> None:
    assert_same_state(taught(spec, 7), taught(spec, 7))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("taken_at", [0, 4])
def test_a_restored_weighter_goes_on_bit_for_bit(spec: WeighterSpec, taken_at: int) -> None:
    uninterrupted = taught(spec, taken_at)
    stored = save(uninterrupted.state_tensors()), json.dumps(uninterrupted.state_metadata(), allow_nan=False)
    restored = taught(spec, 2)  # whatever it knew is replaced
    restored.load_state(load(stored[0]), json.loads(stored[1]))
    assert_same_state(restored, uninterrupted)
    advance(uninterrupted, 9)
    advance(restored, 9)
    assert_same_state(restored, uninterrupted)
    inputs = inputs_of(spec, 77)
    np.testing.assert_array_equal(restored.score([inputs])[0].weights, uninterrupted.score([inputs])[0].weights)


def test_weighters_that_read_columns_alone_live_on_the_cpu() -> None:
    columns = replace(FEATURES, features=FeatureSpec(names=("a", "b")))
    gpu = torch.device("cuda")
    assert [device_of(spec, gpu) for spec in (columns, FEATURES, TOKENS)] == [CPU, gpu, gpu]


def test_state_tensors_are_copies() -> None:
    weighter = taught(FEATURES, 2)
    before = weighter.state_tensors()
    kept = {name: t.clone() for name, t in before.items()}
    advance(weighter, 3)
    assert_same_tensors(before, kept)


@pytest.mark.parametrize("train_encoder", [True, False])
def test_a_published_state_never_changes_and_shares_what_never_learns(train_encoder: bool) -> None:
    assert TOKENS.tokens is not None
    weighter = taught(replace(TOKENS, tokens=replace(TOKENS.tokens, train_encoder=train_encoder)), 2)
    model, inputs = weighter.published.model, inputs_of(TOKENS, 77)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    logits = model(Samples.of([inputs], CPU))
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    advance(weighter, 5)
    assert_same_tensors(dict(model.state_dict()), kept)
    assert torch.equal(model(Samples.of([inputs], CPU)), logits)
    later = dict(weighter.published.model.named_parameters())
    shared = {name for name, p in model.named_parameters() if later[name] is p}
    assert shared == (set() if train_encoder else {name for name in later if name.startswith("encoder.")})
    assert not torch.equal(later["join.weight"], model.join.weight)


@pytest.mark.parametrize("position", [0, 3, 5])
def test_only_the_next_position_is_applied(position: int) -> None:
    weighter = taught(FEATURES, 3)
    with pytest.raises(ValueError, match=rf"position {position} can't be applied at 3, expected 4"):
        weighter.apply(position, update_of(FEATURES, position))
    assert_same_state(weighter, taught(FEATURES, 3))


def test_a_state_of_before_running_means_and_trust_goes_on_from_its_parameters() -> None:
    newest = replace(FEATURES, learning=replace(FEATURES.learning, averaging=0.0))  # scores by its parameters
    weighter = taught(newest, 6)
    tensors = {name: t for name, t in weighter.state_tensors().items() if not name.startswith("average.")}
    metadata = weighter.state_metadata()
    jobs = {
        job_id: {name: value for name, value in job.items() if name != "trust"}
        for job_id, job in metadata["jobs"].items()
    }
    restored = Weighter(FEATURES, device=CPU)
    restored.load_state(tensors, {**metadata, "format": 1, "jobs": jobs})
    batch = [inputs_of(FEATURES, 99)]
    np.testing.assert_array_equal(restored.score(batch)[0].weights, weighter.score(batch)[0].weights)
    assert {j.probed_updates for j in restored.statistics.jobs.values()} == {0}
    assert {j.updates_applied for j in restored.statistics.jobs.values()} == {3}
    advance(restored, 7)
    assert restored.position == 7


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    weighter, other = taught(FEATURES, 3), taught(replace(FEATURES, head=HeadSpec(width=12)), 3)
    tensors, metadata = weighter.state_tensors(), weighter.state_metadata()
    without = {name: t for name, t in tensors.items() if name != "model.join.weight"}
    half = {name: t.half() if name == "model.join.weight" else t for name, t in tensors.items()}
    for wrong, text in [
        (without, r"'model\.join\.weight' is missing"),
        ({**tensors, "model.more": torch.zeros(1)}, r"'model\.more' is not part"),
        (other.state_tensors(), r"of shape \[.*12.*\], but in this weighter's state"),
        (half, r"'model\.join\.weight' is torch\.float16"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            weighter.load_state(wrong, metadata)
    for broken, text in [
        ({**metadata, "format": 99}, "format 99"),
        ({k: v for k, v in metadata.items() if k != "jobs"}, "incomplete: KeyError: 'jobs'"),
        ({**metadata, "statistics": {"speed": 1}}, "incomplete: TypeError"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            weighter.load_state(tensors, broken)
    assert_same_state(weighter, taught(FEATURES, 3))


# ---- Publishing, and states put back ---------------------------------------------------------------------------------


def test_what_is_published_in_between_makes_no_difference() -> None:
    weighter = Weighter(FEATURES, device=CPU)
    for position in range(1, 8):
        weighter.apply(position, update_of(FEATURES, position), publish=False)
    assert (weighter.position, weighter.published.position) == (7, 0)
    weighter.publish()
    assert_same_state(weighter, taught(FEATURES, 7))
    inputs = inputs_of(FEATURES, 77)
    scores, expected = weighter.score([inputs])[0], taught(FEATURES, 7).score([inputs])[0]
    assert scores.position == 7
    np.testing.assert_array_equal(scores.weights, expected.weights)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_state_that_is_put_back_goes_on_as_it_did(spec: WeighterSpec) -> None:
    early = taught(spec, 3)
    stored = early.state_tensors(), json.loads(json.dumps(early.state_metadata()))
    weighter = taught(spec, 6)
    scored_before = weighter.published
    weighter.restore(7, *stored)
    assert weighter.published.position == weighter.position == 7
    assert_same_tensors(weighter.state_tensors(), stored[0])
    assert weighter.state_metadata() == {**stored[1], "position": 7}
    assert weighter.published is not scored_before
    inputs = inputs_of(spec, 77)
    np.testing.assert_array_equal(weighter.score([inputs])[0].weights, early.score([inputs])[0].weights)
    again = taught(spec, 6)
    again.restore(7, *stored)
    for each in (weighter, again):
        advance(each, 9)
    assert_same_state(weighter, again)


def test_states_that_are_not_of_this_weighter_are_not_put_back() -> None:
    assert TOKENS.tokens is not None
    spec = replace(TOKENS, tokens=replace(TOKENS.tokens, train_encoder=False))
    weighter = taught(spec, 2)
    tensors, metadata = weighter.state_tensors(), weighter.state_metadata()
    frozen = "model.encoder.model.embeddings.word_embeddings.weight"
    with pytest.raises(InvalidArgument, match=r"'encoder\.model\.embeddings\.word.*' never learns, but in the state"):
        weighter.restore(3, {**tensors, frozen: tensors[frozen] + 1}, metadata)
    with pytest.raises(ValueError, match="position 5 can't be applied at 2, expected 3"):
        weighter.restore(5, tensors, metadata)
    assert_same_state(weighter, taught(spec, 2))


def test_scores_go_on_while_states_are_put_back() -> None:
    weighter = taught(FEATURES, 2)
    stored = weighter.state_tensors(), weighter.state_metadata()
    inputs = inputs_of(FEATURES, 500)
    expected = weighter.score([inputs])[0].weights
    done, failures = threading.Event(), []

    def keep_scoring() -> None:
        while not done.is_set():
            weights = weighter.score([inputs])[0].weights
            if not np.array_equal(weights, expected):
                failures.append(weights)

    thread = threading.Thread(target=keep_scoring)
    thread.start()
    for position in range(3, 53):
        weighter.restore(position, *stored)
    done.set()
    thread.join(60)
    assert failures == []
    assert weighter.published.position == 52


def test_a_withdrawn_weighter_scores_nothing() -> None:
    weighter = taught(FEATURES, 2)
    weighter.withdraw("its state is not the one that holds")
    with pytest.raises(Unavailable, match="not the one that holds"):
        weighter.score([inputs_of(FEATURES, 1)])
    weighter.withdraw("")
    assert len(weighter.score([inputs_of(FEATURES, 1)])) == 1


# ---- Size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parameters_are_counted_without_making_them(spec: WeighterSpec) -> None:
    assert count_parameters(spec) == Weighter(spec, device=CPU).parameter_count


def test_a_size_that_no_memory_holds_can_be_counted() -> None:
    """A million million parameters: four terabytes."""
    assert count_parameters(replace(FEATURES, head=HeadSpec(width=1 << 19, layers=1))) > 3e12


# ---- Skipped updates -----------------------------------------------------------------------------------------------


def spoiled(position: int, kind: str) -> MetaUpdate:
    update = update_of(FEATURES, position)
    features, cotangent = np.array(update.inputs.features), update.cotangent.copy()
    if kind == "features":
        features[2, 1] = np.nan
    elif kind == "cotangent":
        cotangent[3] = np.inf
    else:
        cotangent[:] = 4.0
    return replace(update, inputs=replace(update.inputs, features=features), cotangent=cotangent)


@pytest.mark.parametrize("kind", ["features", "cotangent", "constant"])
def test_an_update_that_cannot_be_learned_is_skipped_and_leaves_no_trace(kind: str) -> None:
    weighter = taught(FEATURES, 3)
    tensors, statistics, model = weighter.state_tensors(), weighter.statistics, weighter.published.model
    weighter.apply(4, spoiled(4, kind))
    assert weighter.position == 4
    assert weighter.statistics == replace(statistics, updates_skipped=1)
    assert weighter.published.model is model
    assert_same_tensors(weighter.state_tensors(), tensors)
    replayed = taught(FEATURES, 3)
    replayed.apply(4, spoiled(4, kind))
    advance(weighter, 6)
    advance(replayed, 6)
    assert_same_state(weighter, replayed)
    assert weighter.statistics.updates_applied == 5


@pytest.mark.parametrize("updates", [0, 2])
def test_a_step_that_would_overflow_a_parameter_is_taken_back(updates: int) -> None:
    """Weight decay of 99 times the parameter, at a position embedding that no sample reaches."""
    spec = replace(TOKENS, learning=LearningSpec(learning_rate=10.0, weight_decay=10.0))
    weighter = taught(replace(TOKENS, learning=LearningSpec(learning_rate=1e-3)), updates)
    tensors = weighter.state_tensors()
    tensors["model.encoder.model.embeddings.position_embeddings.weight"][31] = 3e38
    overflowing = Weighter(spec, device=CPU)
    overflowing.load_state(tensors, weighter.state_metadata())
    overflowing.apply(updates + 1, update_of(spec, updates + 1))
    assert overflowing.statistics.updates_skipped == 1
    assert_same_tensors(overflowing.state_tensors(), tensors)


def test_one_sample_has_nothing_to_compare_with() -> None:
    weighter = taught(FEATURES, 1)
    weighter.apply(2, MetaUpdate("job", "2", 2, inputs_of(FEATURES, 5, samples=1), np.array([3.0], np.float32), 1))
    assert weighter.statistics.updates_skipped == 1


# ---- Scoring while learning ----------------------------------------------------------------------------------------


def test_every_score_is_one_of_a_whole_published_state() -> None:
    weighter = Weighter(FEATURES, device=CPU)
    batches = [inputs_of(FEATURES, 500), inputs_of(FEATURES, 501, samples=7)]
    states: dict[int, Published] = {0: weighter.published}
    seen: list[list[Scores]] = []
    failures: list[Exception] = []
    scored, done = threading.Event(), threading.Event()

    def keep_scoring() -> None:
        try:
            while not done.is_set():
                seen.append(weighter.score(batches))
                scored.set()
        except Exception as exc:
            failures.append(exc)
            scored.set()

    thread = threading.Thread(target=keep_scoring)
    thread.start()
    for position in range(1, 51):
        if position % 10 == 0:  # the scorer gets a turn now and then, however busy the machine
            scored.clear()
            assert scored.wait(60)
        weighter.apply(position, update_of(FEATURES, position))
        states[position] = weighter.published
    done.set()
    thread.join(60)
    assert not failures
    positions = [scores[0].position for scores in seen]
    assert positions == sorted(positions)
    assert len(set(positions)) >= 4
    for scores in seen:
        assert scores[0].position == scores[1].position
        for result, inputs in zip(scores, batches, strict=True):
            with torch.inference_mode():
                expected = states[result.position].model(Samples.of([inputs], CPU))
            np.testing.assert_allclose(result.logits, expected.numpy(), rtol=0, atol=1e-6)
