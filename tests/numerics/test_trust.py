"""Trust against plain sums in float64; and that a weighter's word is taken by the jobs for which it proves right."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service.domain import Estimator, Inputs, JobStatistics, MetaUpdate, ScoreOptions, Scores
from weighting_service.weighter import Weighter
from weighting_service.weighter.trust import LARGEST_T, TrustSignal

SPEC = WeighterSpec(
    features=FeatureSpec(names=("a", "b", "c")),
    head=HeadSpec(width=8, attention_heads=2, min_effective_share=0.2),
    learning=LearningSpec(learning_rate=1e-2),
)
HARMFUL, RANDOM, REVERSED = 1.0, 0.0, -1.0  # how the first feature goes with the cotangent


def signal_of(values: list[float], variances: list[float] | None = None) -> TrustSignal:
    signal = TrustSignal()
    for x, variance in zip(values, variances or [1.0] * len(values), strict=True):
        signal = signal.add(x, variance)
    return signal


def naive_t(values: list[float], variances: list[float] | None = None) -> float:
    """Weighted t with reliability weights, sum by sum."""
    ages = reversed(range(len(values)))
    w = [variance * 0.995**age for age, variance in zip(ages, variances or [1.0] * len(values), strict=True)]
    mean = math.fsum(a * x for a, x in zip(w, values, strict=True)) / math.fsum(w)
    squares = math.fsum(a * (x - mean) ** 2 for a, x in zip(w, values, strict=True))
    variance = squares / (math.fsum(w) - math.fsum(a * a for a in w) / math.fsum(w))  # unbiased
    return mean / math.sqrt(variance * math.fsum(a * a for a in w)) * math.fsum(w)


def update_of(
    position: int, kind: float = HARMFUL, job: str = "job", samples: int = 16, **values: object
) -> MetaUpdate:
    rng = np.random.default_rng([position, samples])
    features = rng.normal(size=(samples, 3)).astype(np.float32)
    cotangent = (1e-3 * (kind * features[:, 0] + rng.normal(size=samples))).astype(np.float32)
    return MetaUpdate(job, str(position), position, Inputs(features), cotangent, position - 1, **values)  # type: ignore[arg-type]


def taught(updates: int, spec: WeighterSpec = SPEC) -> Weighter:
    """By "teacher", who has earned trust."""
    weighter = Weighter(spec, device=torch.device("cpu"))
    for position in range(1, updates + 1):
        weighter.apply(position, update_of(position, job="teacher"))
    return weighter


def follow(weighter: Weighter, updates: int, kind: float, job: str) -> JobStatistics:
    for position in range(weighter.position + 1, weighter.position + updates + 1):
        weighter.apply(position, update_of(position, kind, job, trust_only=True))
    return weighter.statistics.jobs[job]


# ---- The statistic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8, 100, 1000])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.3, 1.0), (1e6, 1e-3), (-1e-9, 1e-8)])
def test_t_is_the_mean_over_its_standard_error(count: int, mean: float, spread: float) -> None:
    rng = np.random.default_rng(count)
    values = (mean + spread * rng.normal(size=count)).tolist()
    for variances in ([1.0] * count, rng.uniform(0.01, 5, size=count).tolist()):
        expected = min(max(naive_t(values, variances), -LARGEST_T), LARGEST_T)
        assert signal_of(values, variances).t == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert signal_of(values, variances).updates == count


@pytest.mark.parametrize("variances", [[1e-19, 1.0], [1.0, 1e-19], [1e-19, 1e-19, 1e3], [1e3, 1e-300], [1e-300] * 3])
def test_logits_that_differ_by_rounding_alone_do_no_harm(variances: list[float]) -> None:
    t = signal_of([0.3, -0.2, 0.5][: len(variances)], variances).t
    assert math.isfinite(t)
    assert abs(t) < 10


def test_updates_whose_logits_hardly_differ_hardly_count() -> None:
    agree = np.random.default_rng(1).normal(0.5, 1, size=100)
    deny = np.random.default_rng(2).normal(-0.5, 1, size=100)
    values, variances = np.stack([agree, deny], 1).ravel().tolist(), [2.0, 0.01] * 100
    assert signal_of(values, variances).t == pytest.approx(signal_of(agree.tolist()).t, rel=0.5)
    assert abs(signal_of(values).t) < 1.5 < 3 < signal_of(values, variances).t


def test_without_decay_it_would_be_the_textbook_t() -> None:
    """Of few updates: the weights are nearly equal then."""
    values = np.random.default_rng(3).normal(0.5, 1, size=10)
    textbook = values.mean() / (values.std(ddof=1) / math.sqrt(10))
    assert signal_of(values.tolist()).t == pytest.approx(textbook, rel=0.05)


def test_old_updates_are_forgotten() -> None:
    noise = np.random.default_rng(0).normal(size=1500)
    assert signal_of([*(noise[:500] + 1), *(noise[500:] - 1)]).t < -5


@pytest.mark.parametrize(("t", "factor"), [(-4, 0), (0, 0), (3, 0), (3.2, 0.2), (3.5, 0.5), (4, 1), (9, 1)])
def test_factor_rises_from_t_3_to_4(t: float, factor: float) -> None:
    signal = TrustSignal(100, weight=100.0, weight_squares=100.0, weight_products=9900.0, mean=t, squares=9900.0)
    assert signal.t == pytest.approx(t)
    assert signal.factor == pytest.approx(factor)


def test_nothing_is_held_against_a_weighter_before_eight_updates() -> None:
    assert [signal_of([-1.0] * count).factor for count in range(10)] == [1.0] * 8 + [0.0] * 2


@pytest.mark.parametrize(("value", "t", "factor"), [(0.1, LARGEST_T, 1), (0.0, 0, 0), (-0.1, -LARGEST_T, 0)])
def test_equal_agreements_have_no_spread_to_divide_by(value: float, t: float, factor: float) -> None:
    signal = signal_of([value] * 20)
    assert (signal.t, signal.factor) == (t, factor)
    assert signal_of([value]).t == 0


# ---- In a weighter -------------------------------------------------------------------------------------------------


def test_a_jobs_trust_is_that_of_the_logits_given_before_each_update() -> None:
    """All kinds of updates against the formulas, from the scores that the weighter gave."""
    weighter = taught(5)
    values: list[float] = []
    variances: list[float] = []
    applied, new = 5, False
    for position in range(6, 70):
        probes = np.arange(16) < {0: 4, 1: 1, 2: 16}[position % 3]
        trust_only = position % 4 == 0
        estimator = Estimator.VJP if position % 5 == 0 else Estimator.SCORE_FUNCTION
        update = update_of(position, probes=probes, trust_only=trust_only, estimator=estimator)
        update = replace(update, step=61 + position)  # the trainer is new, then it is not any more
        (scores,) = weighter.score([update.inputs])
        weighter.apply(position, update)
        fresh = estimator is Estimator.SCORE_FUNCTION and applied < 24 and not trust_only
        applied += not trust_only
        if probes.sum() > 1 and not fresh:
            agreement = np.corrcoef(-update.cotangent.astype(np.float64), scores.logits)[0, 1]
            chosen, begins = estimator is Estimator.SCORE_FUNCTION, trust_only and update.step < 100
            if chosen and new and not begins:
                whole = len(values) < 8 or naive_t(values, variances) >= 4
                values = [value + 0.08 * whole for value in values]
                new = False
            new |= chosen and begins and not values
            values.append(agreement - ((0.15 if new else 0.07) if chosen else 0.0))
            variances.append(1.0 if estimator is Estimator.VJP else float(scores.logits.var()))
        statistics = weighter.statistics.jobs["job"]
        assert statistics.probed_updates == len(values)
        assert statistics.trust_t == pytest.approx(
            naive_t(values, variances) if len(values) > 1 else 0.0, rel=1e-3, abs=1e-3
        )
    assert len(values) == 32


def test_first_lessons_of_a_fresh_weighter_do_not_count_where_samples_are_chosen(tmp_path: Path) -> None:
    fresh = Weighter(SPEC, device=torch.device("cpu"))
    taught_before = Weighter.from_pretrained(taught(30).save_pretrained(tmp_path))
    for weighter, counted in ((fresh, 6), (taught_before, 30)):
        for position in range(1, 31):
            weighter.apply(position, update_of(position, probes=np.ones(16, bool), estimator=Estimator.SCORE_FUNCTION))
        assert weighter.statistics.jobs["job"].probed_updates == counted


def test_of_a_weighter_that_was_taught_elsewhere_more_is_asked_while_the_trainer_is_new(tmp_path: Path) -> None:
    """What is taken from each agreement shows in the mean; trust that is whole when it is over gets it back."""
    folder = taught(30).save_pretrained(tmp_path)

    def mean(kind: float, steps: range) -> float:
        weighter = Weighter.from_pretrained(folder)
        for position, step in enumerate(steps, 1):
            probes, estimator = np.ones(16, bool), Estimator.SCORE_FUNCTION
            update = update_of(position, kind, probes=probes, estimator=estimator, trust_only=True)
            weighter.apply(position, replace(update, step=step))
        return float(weighter.state_metadata()["jobs"]["job"]["trust"]["mean"])

    for kind in (HARMFUL, RANDOM):
        assert mean(kind, range(80, 100)) == pytest.approx(mean(kind, range(100, 120)) - 0.08)
    assert mean(HARMFUL, range(80, 101)) == pytest.approx(mean(HARMFUL, range(100, 121)))
    after = mean(RANDOM, range(80, 101))
    assert after < mean(RANDOM, range(100, 121)) - 0.07


def test_a_frozen_job_earns_its_trust_at_a_weighter_that_is_still_fresh() -> None:
    weighter = taught(20)
    for position in range(21, 51):
        probes, estimator = np.ones(16, bool), Estimator.SCORE_FUNCTION
        weighter.apply(position, update_of(position, REVERSED, probes=probes, estimator=estimator, trust_only=True))
    job = weighter.statistics.jobs["job"]
    assert (job.probed_updates, job.trust) == (30, 0.0)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_without_a_mask_only_samples_as_they_were_drawn_are_probes(estimator: Estimator) -> None:
    weighter = taught(30)
    weighter.apply(31, update_of(31, estimator=estimator))
    assert weighter.statistics.jobs["job"].probed_updates == (1 if estimator is Estimator.VJP else 0)


def test_logits_that_are_all_alike_are_no_observation() -> None:
    """A fresh weighter's: they agree with nothing, and contradict nothing."""
    weighter = Weighter(SPEC, device=torch.device("cpu"))
    weighter.apply(1, update_of(1))
    assert weighter.statistics.jobs["job"].probed_updates == 0


def test_samples_that_are_all_the_same_do_no_harm() -> None:
    weighter = taught(10)
    for samples in range(5, 34):
        position = weighter.position + 1
        same = update_of(position, job=f"same {samples}", samples=samples)
        same.inputs.features[:] = same.inputs.features[0]
        weighter.apply(position, same)
        follow(weighter, 2, HARMFUL, f"same {samples}")
        statistics = weighter.statistics.jobs[f"same {samples}"]
        assert math.isfinite(statistics.trust_t)
        assert statistics.probed_updates >= 2


def test_choosing_has_to_be_worth_more_than_weighting() -> None:
    """Logits that agree a little with what helps: enough to weigh by, too little to see samples again and again for."""
    weighter = taught(60)
    for position in range(weighter.position + 1, weighter.position + 401):
        estimator = list(Estimator)[position % 2]
        update = update_of(position, RANDOM, estimator.name, samples=64, probes=np.ones(64, bool), trust_only=True)
        (scores,) = weighter.score([update.inputs])
        update.cotangent[:] -= 7e-5 * scores.logits / scores.logits.std()
        weighter.apply(position, replace(update, estimator=estimator))
    jobs = weighter.statistics.jobs
    assert jobs[Estimator.VJP.name].trust_t > 3
    assert jobs[Estimator.SCORE_FUNCTION.name].trust == 0


def test_jobs_are_trusted_as_far_as_the_weighter_is_right_for_them() -> None:
    weighter = taught(60)
    right, random, wrong = (
        follow(weighter, 40, kind, job) for kind, job in ((HARMFUL, "right"), (RANDOM, "random"), (REVERSED, "wrong"))
    )
    assert (right.trust, right.probed_updates) == (1.0, 40)
    assert right.trust_t > 4
    assert random.trust < 0.5
    assert abs(random.trust_t) < 2.5
    assert (wrong.trust, wrong.trust_t < -4) == (0.0, True)

    inputs = update_of(999).inputs
    jobs = ["right", "wrong", "", "nobody"]
    trusted, distrusted, *others = weighter.score([inputs] * 4, [ScoreOptions(job) for job in jobs])
    assert trusted.weights.std() > 0.3
    np.testing.assert_array_equal(distrusted.weights, np.ones(16, np.float32))
    np.testing.assert_allclose(distrusted.logits, trusted.logits, rtol=0, atol=1e-6)
    assert [s.trust for s in (trusted, distrusted, *others)] == [1.0, 0.0, 1.0, 1.0]
    for scores in others:
        np.testing.assert_array_equal(scores.weights, trusted.weights)


def test_trust_scales_the_logits_before_guard_and_softmax() -> None:
    weighter = taught(60)
    follow(weighter, 1, RANDOM, "doubted")
    metadata = weighter.state_metadata()
    half = TrustSignal(100, weight=100.0, weight_squares=100.0, weight_products=9900.0, mean=3.5, squares=9900.0)
    metadata["jobs"]["doubted"]["trust"] = asdict(half)
    weighter.load_state(weighter.state_tensors(), metadata)
    inputs = update_of(999).inputs
    options = [ScoreOptions("doubted", min_effective_share=0.0), ScoreOptions("teacher", min_effective_share=0.0)]
    doubted, trusted = weighter.score([inputs] * 2, options)
    for scores, factor in ((doubted, 0.5), (trusted, 1.0)):
        assert scores.trust == pytest.approx(factor)
        shares = np.exp(factor * scores.logits.astype(np.float64))
        np.testing.assert_allclose(scores.weights, 16 * shares / shares.sum(), rtol=1e-5)


def test_guards_of_one_call_do_not_meet() -> None:
    weighter = taught(100)
    batches = [update_of(n, samples=n % 7 + 2).inputs for n in range(30)]
    least = [(None, 0.0, 0.9, 1.0)[n % 4] for n in range(30)]
    options = [ScoreOptions(min_effective_share=share) for share in least]
    for inputs, option, scores in zip(batches, options, weighter.score(batches, options), strict=True):
        (alone,) = weighter.score([inputs], [option])
        # Where only even weights are admitted, rounding decides how uneven they may just be.
        tolerance = 1e-3 if option.min_effective_share == 1 else 1e-5
        np.testing.assert_allclose(scores.weights, alone.weights, rtol=0, atol=tolerance)
        share = SPEC.head.min_effective_share if option.min_effective_share is None else option.min_effective_share
        assert scores.effective_sample_size >= share * inputs.samples * (1 - 1e-5)
    inputs = update_of(999).inputs
    guarded, free = weighter.score([inputs] * 2, [ScoreOptions(min_effective_share=share) for share in (1.0, 0.0)])
    assert guarded.effective_sample_size == pytest.approx(16, rel=1e-5)
    assert free.effective_sample_size < 14


def assert_same_bits(a: list[Scores], b: list[Scores]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.weights.tobytes() == other.weights.tobytes()
        assert one.logits.tobytes() == other.logits.tobytes()
        assert one.effective_sample_size == other.effective_sample_size


def test_full_trust_and_the_specs_own_guard_are_the_plain_path() -> None:
    weighter = taught(40)
    batches = [update_of(n, samples=n % 9 + 2).inputs for n in range(20)]
    plain = weighter.score(batches)
    share = SPEC.head.min_effective_share
    assert_same_bits(weighter.score(batches, [ScoreOptions()] * 20), plain)
    assert_same_bits(weighter.score(batches, [ScoreOptions("teacher", share)] * 20), plain)


def test_updates_for_trust_alone_teach_nothing() -> None:
    weighter = taught(20)
    tensors, metadata, published = weighter.state_tensors(), weighter.state_metadata(), weighter.published
    follow(weighter, 3, HARMFUL, "frozen")
    weighter.apply(24, update_of(24, job="teacher", trust_only=True))

    assert weighter.position == 24
    assert weighter.published.model is published.model
    assert all(torch.equal(t, tensors[name]) for name, t in weighter.state_tensors().items())
    assert replace(weighter.statistics, jobs={}) == replace(published.statistics, jobs={})
    frozen, teacher = weighter.statistics.jobs["frozen"], weighter.statistics.jobs["teacher"]
    assert (frozen.updates_applied, frozen.cotangent_rms, frozen.probed_updates) == (0, 0.0, 3)
    before = published.statistics.jobs["teacher"]
    assert teacher.probed_updates == before.probed_updates + 1
    assert teacher.trust_t != before.trust_t
    assert replace(teacher, trust_t=0, probed_updates=0) == replace(before, trust_t=0, probed_updates=0)
    jobs = {name: {**job, "trust": None} for name, job in weighter.state_metadata()["jobs"].items() if name != "frozen"}
    assert jobs == {name: {**job, "trust": None} for name, job in metadata["jobs"].items()}


@pytest.mark.parametrize("value", [4.0, math.nan])
def test_updates_for_trust_that_say_nothing_are_skipped(value: float) -> None:
    weighter = taught(5)
    before = weighter.statistics
    weighter.apply(6, replace(update_of(6, trust_only=True), cotangent=np.full(16, value, np.float32)))
    assert weighter.position == 6
    assert weighter.statistics == replace(before, updates_skipped=1)


def test_a_spec_without_trust_keeps_the_statistics_and_the_weights() -> None:
    spec = replace(SPEC, learning=replace(SPEC.learning, trust=False))
    weighter, trusting = taught(60, spec), taught(60)
    wrong, doubted = (follow(w, 20, REVERSED, "wrong") for w in (weighter, trusting))
    assert doubted.trust == 0.0
    assert wrong == replace(doubted, trust=1.0)
    inputs = update_of(999).inputs
    assert_same_bits(weighter.score([inputs], [ScoreOptions("wrong")]), trusting.score([inputs]))


def test_trust_is_part_of_the_state_and_an_older_state_starts_without() -> None:
    weighter = taught(30)
    follow(weighter, 20, REVERSED, "wrong")
    tensors, metadata = weighter.state_tensors(), json.loads(json.dumps(weighter.state_metadata(), allow_nan=False))
    restored = Weighter(SPEC, device=torch.device("cpu"))
    restored.load_state(tensors, metadata)
    assert restored.statistics == weighter.statistics
    assert follow(restored, 3, HARMFUL, "wrong") == follow(weighter, 3, HARMFUL, "wrong")

    restored.load_state(tensors, metadata)
    now = restored.statistics
    for counted_alike in (4, 5):
        restored.load_state(tensors, {**metadata, "format": counted_alike})
        assert restored.statistics == now
    for counted_otherwise in (2, 3):
        restored.load_state(tensors, {**metadata, "format": counted_otherwise})
        assert restored.statistics.jobs["wrong"].probed_updates == 0
        assert restored.statistics.jobs["teacher"].updates_applied == 30

    older = {**metadata, "format": 1, "jobs": {name: dict(job) for name, job in metadata["jobs"].items()}}
    for job in older["jobs"].values():
        del job["trust"]
    restored.load_state(tensors, older)
    wrong = restored.statistics.jobs["wrong"]
    assert (wrong.trust, wrong.trust_t, wrong.probed_updates) == (1.0, 0.0, 0)
    assert restored.statistics.jobs["teacher"].updates_applied == 30
