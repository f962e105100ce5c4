"""Weights from logits against a naive loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weighting_service.weighter.normalise import guarded, to_weights


def naive_weights(logits: list[float], temperature: float, floor: float, factor: float) -> list[float]:
    z = [factor * x / temperature for x in logits]
    exps = [math.exp(x - max(z)) for x in z]
    return [floor + (1 - floor) * len(z) * e / sum(exps) for e in exps]


def naive_size(weights: list[float]) -> float:
    return sum(weights) ** 2 / sum(w * w for w in weights)


def naive(logits: list[float], temperature: float, floor: float, share: float) -> list[float]:
    """Plain bisection of the factor itself, to the last bit of float64."""

    def good(factor: float) -> bool:
        return naive_size(naive_weights(logits, temperature, floor, factor)) >= share * len(logits)

    low, high = 0.0, 1.0
    if good(1.0):
        return naive_weights(logits, temperature, floor, 1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return naive_weights(logits, temperature, floor, low)


def random_logits(batches: int, samples: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(int(scale * 7) + samples)
    return scale * torch.randn(batches, samples, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 100.0, 1e6])
@pytest.mark.parametrize(("temperature", "floor", "share"), [(1, 0, 0.4), (0.5, 0.2, 0.9), (3, 0.05, 0.0), (1, 0.3, 1)])
def test_the_naive_reference_is_met(scale: float, temperature: float, floor: float, share: float) -> None:
    logits = random_logits(3, 17, scale)
    weights, sizes = to_weights(logits, temperature=temperature, floor=floor, min_effective_share=share)
    assert weights.dtype == torch.float64
    for row, size, z in zip(weights, sizes, logits, strict=True):
        expected = naive(z.tolist(), temperature, floor, share)
        if share == 1:  # only equal weights are admitted, up to the last bits of the comparison
            expected = [1.0] * len(expected)
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        assert float(size) == pytest.approx(naive_size(row.tolist()), rel=1e-9)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 50.0, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_guard_holds_for_the_final_weights_whatever_the_logits(magnitude: float, floor: float) -> None:
    logits = magnitude * random_logits(4, 64, 1.0).float()
    logits[1] = 0
    logits[1, 5] = magnitude  # one sample above all others
    logits[2] = -magnitude * torch.arange(64).float()
    weights, sizes = to_weights(logits, temperature=0.7, floor=floor, min_effective_share=0.4)
    assert weights.dtype == torch.float32
    assert bool((sizes >= 0.4 * 64 * (1 - 1e-5)).all())
    assert weights.mean(-1).tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert bool((weights >= floor * (1 - 1e-6)).all())


def test_the_guard_scales_no_more_than_it_must() -> None:
    logits = random_logits(5, 100, 30.0).float()
    _, sizes = to_weights(logits, temperature=1, floor=0, min_effective_share=0.4)
    assert sizes.tolist() == pytest.approx([40.0] * 5, rel=1e-4)


def test_the_guard_is_inactive_where_it_is_not_needed() -> None:
    logits = torch.stack([random_logits(1, 50, 0.1)[0], random_logits(1, 50, 30.0)[0]]).float()
    weights, _ = to_weights(logits, temperature=2, floor=0, min_effective_share=0.4)
    torch.testing.assert_close(weights[0], 50 * torch.softmax(logits[0] / 2, -1), rtol=1e-6, atol=0)
    assert not torch.allclose(weights[1], 50 * torch.softmax(logits[1] / 2, -1), rtol=0.1)


def test_equal_logits_give_exactly_one() -> None:
    weights, sizes = to_weights(torch.full((3, 49), 7.3), temperature=0.3, floor=0.0, min_effective_share=1.0)
    assert bool((weights == 1).all())
    assert sizes.tolist() == [49.0] * 3


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_masked_samples_weigh_nothing_and_change_nothing(floor: float, scale: float) -> None:
    logits = random_logits(3, 12, scale)
    sizes = [12, 7, 1]
    mask = torch.arange(12)[None] < torch.tensor(sizes)[:, None]
    weights, effective = to_weights(
        logits.masked_fill(~mask, 1e6), mask, temperature=1, floor=floor, min_effective_share=0.5
    )
    for i, size in enumerate(sizes):
        alone, alone_effective = to_weights(logits[i, :size], temperature=1, floor=floor, min_effective_share=0.5)
        torch.testing.assert_close(weights[i, :size], alone, rtol=1e-9, atol=1e-12)
        assert float(effective[i]) == pytest.approx(float(alone_effective))
        assert bool((weights[i, size:] == 0).all())


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_the_derivative_takes_the_factor_as_a_constant(scale: float) -> None:
    logits = random_logits(1, 9, scale)[0].requires_grad_()
    cotangent = random_logits(1, 9, 1.0)[0]
    settings = {"temperature": 0.8, "floor": 0.1, "min_effective_share": 0.6}
    weights, _ = to_weights(logits, **settings)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(cotangent @ weights, logits)

    with torch.no_grad():
        scaled = guarded(logits, **settings)  # type: ignore[arg-type]
        factor = float(scaled[1] - scaled[0]) / float(logits[1] - logits[0])  # includes the temperature
        shares = torch.softmax(logits * factor, -1)
        expected = factor * 0.9 * 9 * shares * (cotangent - cotangent @ shares)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
