"""Figures of what a step preferred, against naive sums over samples that were made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from trainer_client.run.data import Samples
from trainer_client.run.preferences import MOST_GROUPS, OTHERS, QUARTERS, UNKNOWN, Preferences, loss_quarters

N, B, D = 60, 8, 24
DOCUMENT_TOKENS = [9, 9, 17, 40, 65, 33, 130, 9]


@pytest.fixture
def samples() -> Samples:
    rng = np.random.default_rng(0)
    documents = np.sort(rng.integers(0, len(DOCUMENT_TOKENS), N))
    return Samples(
        np.zeros((N, 9), np.uint16),
        rng.integers(0, 3, N),
        ("a", "b", "c"),
        documents,
        np.array(DOCUMENT_TOKENS, np.int64),
    )


class Step:
    """A step's choice, made up."""

    def __init__(self, seed: int, *, as_drawn: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.drawn = rng.permutation(N)[: B if as_drawn else D]
        self.kept = np.arange(B) if as_drawn else rng.permutation(D)[:B]
        self.weights = rng.dirichlet(np.ones(B)).astype(np.float32) * B
        self.losses = rng.random(B).astype(np.float32)
        self.candidate_losses = rng.random(D)
        self.quarters = None if as_drawn else loss_quarters(self.candidate_losses)[self.kept]
        self.cotangent = rng.normal(size=5).astype(np.float32)

    @property
    def indices(self) -> np.ndarray:
        return self.drawn[self.kept]

    def figures(self, of: Preferences, cotangent: bool = True) -> dict:
        given = self.cotangent if cotangent else None
        return of.of_step(self.indices, self.drawn, self.weights, self.losses, self.quarters, given)


def naive(drawn: list[str], kept: list[str], weights: np.ndarray) -> dict[str, list[float]]:
    total = sum(float(w) for w in weights)
    return {
        name: [
            sum(1 for d in drawn if d == name) / len(drawn),
            sum(float(w) for k, w in zip(kept, weights, strict=True) if k == name) / total,
        ]
        for name in set(drawn)
    }


def assert_shares(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, shares in expected.items():
        assert found[name] == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("as_drawn", [False, True])
def test_shares_are_those_of_a_naive_count(samples: Samples, as_drawn: bool) -> None:
    preferences, seen = Preferences(samples), dict.fromkeys(range(N), 0)
    for number in range(12):
        step = Step(number, as_drawn=as_drawn)
        figures = step.figures(preferences)
        source = [samples.sources[samples.source_index[i]] for i in range(N)]
        length = ["8-15" if t < 16 else "16-31" if t < 32 else "32-63" if t < 64 else "64-127" if t < 128 else "128-255"
                  for t in (DOCUMENT_TOKENS[d] for d in samples.document_index)]  # fmt: skip
        times = ["3+" if seen[i] > 2 else str(seen[i]) for i in range(N)]
        for by, names in (("source", source), ("length", length), ("seen", times)):
            drawn, kept = [names[i] for i in step.drawn], [names[i] for i in step.indices]
            assert_shares(figures["preference"][by], naive(drawn, kept, step.weights))
        losses = step.losses if as_drawn else step.candidate_losses
        ranks = [int((losses < loss).sum()) for loss in losses]
        quarter = [QUARTERS[4 * rank // len(losses)] for rank in ranks]
        assert_shares(figures["preference"]["loss"], naive(quarter, [quarter[k] for k in step.kept], step.weights))
        preferences.trained(step.indices)
        for i in step.indices:
            seen[i] += 1
    assert max(seen.values()) > 2  # the last group was there to be told apart


def test_means_are_by_source_and_cotangents_of_the_first_samples(samples: Samples) -> None:
    step = Step(1)
    figures = step.figures(Preferences(samples))
    names = np.array(samples.sources)[samples.source_index[step.indices]]
    assert figures["mean_weight"].keys() == set(names)
    for name in set(names):
        assert figures["mean_weight"][name] == pytest.approx(step.weights[names == name].mean(), abs=1e-5)
        assert figures["trained_share"][name] == pytest.approx(step.weights[names == name].sum() / B, abs=1e-5)
    assert figures["cotangent"].keys() == set(names[:5])
    for name in set(names[:5]):
        assert figures["cotangent"][name] == pytest.approx(step.cotangent[names[:5] == name].mean(), rel=1e-4)
    assert "cotangent" not in step.figures(Preferences(samples), cotangent=False)


def test_a_batch_that_is_weighed_as_drawn_has_its_mean_weights_for_relative_ones(samples: Samples) -> None:
    figures = Step(2, as_drawn=True).figures(Preferences(samples))
    for name, (drawn, trained) in figures["preference"]["source"].items():
        assert trained / drawn == pytest.approx(figures["mean_weight"][name], abs=1e-3)


def test_without_the_candidates_losses_nothing_is_said_by_loss(samples: Samples) -> None:
    step = Step(3)
    for unknown in (None, np.full(B, UNKNOWN, np.int8)):
        step.quarters = unknown
        assert step.figures(Preferences(samples))["preference"].keys() == {"source", "length", "seen"}


def test_a_sample_that_a_batch_holds_twice_was_seen_twice(samples: Samples) -> None:
    preferences = Preferences(samples)
    preferences.trained(np.array([4, 4, 7]))
    batch = np.array([4, 7, 8, 9])
    seen = preferences.of_step(batch, batch, np.ones(4, np.float32), np.arange(4.0), None, None)["preference"]["seen"]
    assert seen == {"0": [0.5, 0.5], "1": [0.25, 0.25], "2": [0.25, 0.25]}


def test_quarters_are_equally_large_and_ordered_by_loss() -> None:
    losses = np.random.default_rng(0).normal(size=40)
    quarters = loss_quarters(losses)
    assert np.bincount(quarters).tolist() == [10] * 4
    assert all(losses[quarters == q].max() < losses[quarters == q + 1].min() for q in range(3))
    assert loss_quarters(np.zeros(6)).tolist() == [0, 0, 1, 2, 2, 3]  # equal ones in the order they come


def test_of_many_sources_the_largest_have_figures_of_their_own() -> None:
    counts = [3 if name % 2 else 1 for name in range(30)]
    index = np.repeat(np.arange(30), counts)
    samples = Samples(np.zeros((len(index), 9), np.uint16), index, tuple(f"s{n:02}" for n in range(30)))
    everything = np.arange(len(index))
    figures = Preferences(samples).of_step(everything, everything, np.ones(len(index), np.float32), index, None, None)
    by_source = figures["preference"]["source"]
    assert list(by_source) == [*(f"s{n:02}" for n in range(1, 2 * MOST_GROUPS - 2, 2)), OTHERS]
    assert by_source["s01"] == pytest.approx([0.05, 0.05])
    assert sum(drawn for drawn, _ in by_source.values()) == pytest.approx(1, abs=1e-4)


def _length_names(tokens: list[int]) -> Iterator[tuple[str, float]]:
    samples = Samples(
        np.zeros((len(tokens), 5), np.uint16),
        np.zeros(len(tokens), np.int64),
        ("a",),
        np.arange(len(tokens)),
        np.array(tokens),
    )
    everything = np.arange(len(tokens))
    figures = Preferences(samples).of_step(everything, everything, np.ones(len(tokens)), tokens, None, None)
    yield from ((name, drawn) for name, (drawn, _) in figures["preference"]["length"].items())


def test_lengths_are_powers_of_two_with_the_emptier_ends_joined() -> None:
    assert dict(_length_names([5, 7, 8, 16])) == {"4-7": 0.5, "8-15": 0.25, "16-31": 0.25}
    tokens = [5, *[9] * 2, *[20] * 4, *[40] * 6, *[70] * 4, *[200] * 4, *[300] * 3, 600]
    assert dict(_length_names(tokens)) == {
        "under 16": 0.12,
        "16-31": 0.16,
        "32-63": 0.24,
        "64-127": 0.16,
        "128-255": 0.16,
        "256 or more": 0.16,
    }


def test_a_line_stays_compact(samples: Samples) -> None:
    assert len(json.dumps(Step(4).figures(Preferences(samples)))) < 900
