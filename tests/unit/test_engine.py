"""The scoring thread: what shares a pass, what a pass may cost, and that no call changes or fails another's result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit import reference_models as models
from weighting_contract.columns import COLUMNS, batch_columns
from weighting_contract.errors import FailedPrecondition, ResourceExhausted, Unavailable
from weighting_contract.ngrams import profile_table
from weighting_contract.profile import make_profile
from weighting_contract.reference import write_reference
from weighting_contract.rows import padded
from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service.domain import Inputs, MetaUpdate, ScoreOptions, Scores
from weighting_service.engine import Engine, EngineLimits, PassReport, TokenRows
from weighting_service.reference import Reference, load_reference
from weighting_service.weighter import Weighter


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_reference(tmp_path_factory.mktemp("references") / "ref", models.reference()))


@pytest.fixture(scope="module")
def weighters() -> list[Weighter]:
    return [taught(seed) for seed in range(2)]


def taught(seed: int) -> Weighter:
    """Two updates' worth of opinions: a fresh weighter gives every sample the weight 1."""
    spec = WeighterSpec(
        features=FeatureSpec(COLUMNS), learning=LearningSpec(learning_rate=0.1), head=HeadSpec(min_effective_share=0.1)
    )
    weighter, rng = Weighter(spec, device=torch.device("cpu")), np.random.default_rng(seed)
    for position in (1, 2):
        features = rng.normal(size=(8, len(COLUMNS))).astype(np.float32)
        weighter.apply(position, MetaUpdate("job", str(position), 0, Inputs(features), features[:, 0], 0))
    return weighter


def batch(reference: Reference, weighter: Weighter, seed: int, samples: int = 6) -> TokenRows:
    rows = reference.check_rows(models.random_rows(seed, samples))
    table = profile_table(make_profile(models.random_rows(100 + seed, 5), reference.ngram_counts).log_ratios)
    assert weighter.spec.features
    return TokenRows(reference, rows, weighter.spec.features.names, table, padded(rows)[0])


def run(
    calls: Sequence[tuple[str, Weighter, Inputs | TokenRows]], limits: EngineLimits | None = None
) -> tuple[list[Scores], list[PassReport]]:
    """All calls are queued before the thread starts, so what shares a pass is certain."""
    reports: list[PassReport] = []
    limits = replace(limits or EngineLimits(), pass_s=math.inf)  # what shares a pass must not depend on the machine
    engine = Engine(limits, reports.append)
    futures = [engine.score(queue, weighter, given, ScoreOptions()) for queue, weighter, given in calls]
    engine.start()
    results = [future.result(60) for future in futures]
    engine.stop()
    return results, reports


def test_one_pass_over_jobs_and_weighters_gives_what_each_call_gets_alone(
    reference: Reference, weighters: list[Weighter]
) -> None:
    calls = [(f"job-{i}", weighters[i % 2], batch(reference, weighters[i % 2], i, 4 + i)) for i in range(5)]
    together, reports = run(calls)
    assert [(r.calls, r.samples, r.reference) for r in reports] == [(5, 30, reference.name)]
    packing = reports[0].packing
    assert packing
    assert packing.samples == 30
    assert packing.real_tokens == sum(len(row) - 1 for _, _, given in calls for row in given.rows)
    assert 0 < reports[0].reference_s <= reports[0].device_s
    assert all(scores.weights.std() > 0.05 for scores in together)
    for call, scores in zip(calls, together, strict=True):
        alone = run([call])[0][0]
        np.testing.assert_allclose(scores.weights, alone.weights, atol=1e-5)
        np.testing.assert_allclose(scores.logits, alone.logits, atol=1e-5)
        assert scores.statistics is not None
        np.testing.assert_allclose(scores.statistics, alone.statistics, atol=1e-4)  # rounding, over deviations


def test_scores_are_the_weighters_own_on_statistics_made_by_hand(
    reference: Reference, weighters: list[Weighter]
) -> None:
    given = batch(reference, weighters[0], 3)
    (scores,), _ = run([("job", weighters[0], given)])
    tokens, lengths = padded(given.rows)
    mask = torch.arange(tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
    raw = reference.raw_statistics(given.rows)
    names = COLUMNS[::-1]  # any order
    by_name = dict(
        zip(
            names,
            batch_columns(raw, names, tokens=torch.from_numpy(tokens), mask=mask, table=given.table).T.numpy(),
            strict=True,
        )
    )
    features = np.stack([by_name[name] for name in given.names], 1)
    expected = weighters[0].score([Inputs(features=features)])[0]
    assert scores.statistics is not None
    np.testing.assert_allclose(scores.statistics, features, atol=1e-5)
    np.testing.assert_allclose(scores.weights, expected.weights, atol=1e-5)


def test_a_pass_has_a_budget_of_tokens_but_never_less_than_a_pack(
    reference: Reference, weighters: list[Weighter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "tokens_per_pack", 64)
    calls = [(f"job-{i}", weighters[0], batch(reference, weighters[0], i)) for i in range(4)]
    _, reports = run(calls, EngineLimits(tokens_per_pass=1))
    assert len(reports) > 1
    assert all(r.calls == 1 or r.tokens <= 64 for r in reports)
    assert any(r.calls > 1 for r in run(calls, EngineLimits(tokens_per_pass=10_000))[1])


def test_calls_with_and_without_a_reference_do_not_mix(reference: Reference, weighters: list[Weighter]) -> None:
    features = Inputs(features=np.zeros((3, len(weighters[0].spec.features.names)), np.float32))  # type: ignore[union-attr]
    calls: list[tuple[str, Weighter, Inputs | TokenRows]] = [
        ("a", weighters[0], features),
        ("b", weighters[0], batch(reference, weighters[0], 0)),
        ("c", weighters[1], features),
        ("d", weighters[0], features),
    ]
    scores, reports = run(calls)
    assert [(r.calls, r.reference) for r in reports] == [(2, ""), (1, reference.name), (1, "")]
    assert [s.statistics is None for s in scores] == [True, False, True, True]


def test_a_job_of_another_weighter_is_next_however_much_the_others_ask(weighters: list[Weighter]) -> None:
    features = Inputs(features=np.zeros((3, len(COLUMNS)), np.float32))
    calls = [("noisy", weighters[0], features), ("quiet", weighters[1], features), ("too", weighters[0], features)]
    calls += [(queue, weighters[0], features) for _ in range(7) for queue in ("noisy", "too")]
    _, reports = run(calls, EngineLimits(samples_per_pass=18))
    assert [r.calls for r in reports] == [6, 1, 6, 4]


def test_a_call_whose_statistics_are_not_finite_fails_alone(reference: Reference, weighters: list[Weighter]) -> None:
    good, other = (batch(reference, weighters[0], seed) for seed in (0, 1))
    assert other.table is not None
    bad = TokenRows(reference, other.rows, other.names, torch.full_like(other.table, torch.nan), other.tokens)
    engine = Engine()
    futures = [engine.score(str(i), weighters[0], given, ScoreOptions()) for i, given in enumerate((good, bad))]
    engine.start()
    assert futures[0].result(60).weights.shape == (6,)
    with pytest.raises(FailedPrecondition, match="not finite for sample 0"):
        futures[1].result(60)
    engine.stop()


def test_overload_is_refused_and_a_stopped_engine_answers_what_waits(
    reference: Reference, weighters: list[Weighter]
) -> None:
    engine = Engine(EngineLimits(queued_calls=1))
    given = batch(reference, weighters[0], 0)
    waiting = engine.score("a", weighters[0], given, ScoreOptions())
    with pytest.raises(ResourceExhausted, match=r"1 calls \(--max-queued-calls\)"):
        engine.score("b", weighters[0], given, ScoreOptions())
    engine.stop()
    engine.start()  # finds that it is to stop
    with pytest.raises(Unavailable, match="stopped before"):
        waiting.result(60)


def test_cancelled_calls_are_dropped(reference: Reference, weighters: list[Weighter], tmp_path: Path) -> None:
    reports: list[PassReport] = []
    engine = Engine(on_pass=reports.append)
    given = batch(reference, weighters[0], 0)
    cancelled, kept = (engine.score(job, weighters[0], given, ScoreOptions()) for job in "ab")
    cancelled.cancel()
    engine.start()
    kept.result(60)
    engine.stop()
    assert [r.calls for r in reports] == [1]
