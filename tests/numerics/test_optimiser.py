"""AdamW on one vector against torch's on separate parameters; and where parameters lie in the vector."""

from __future__ import annotations

import pytest
import torch

from weighting_contract.spec import LearningSpec
from weighting_service.weighter.optimiser import ALIGNMENT, AdamW, Layout, clipped

LEARNING = LearningSpec(learning_rate=0.02, weight_decay=0.3)
SHAPES = {"scale": (5,), "matrix": (3, 4), "scalar": (), "cube": (2, 3, 2), "bias": (17,)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def vector_of(layout: Layout, named: dict[str, torch.Tensor]) -> torch.Tensor:
    return layout.joined(named, like=torch.zeros(layout.size, dtype=torch.float64))


def test_steps_equal_those_of_torch() -> None:
    begin = tensors(0)
    theirs = {name: t.clone().requires_grad_() for name, t in begin.items()}
    matrices = [t for t in theirs.values() if t.ndim >= 2]
    others = [t for t in theirs.values() if t.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}], lr=0.02
    )
    layout = Layout(begin)
    parameters = vector_of(layout, begin)
    ours = AdamW(parameters, LEARNING, layout.matrices)
    for step in range(1, 7):
        gradients = tensors(step)
        for name, tensor in theirs.items():
            tensor.grad = gradients[name].clone()
        reference.step()
        assert ours.step(vector_of(layout, gradients))
        for name, view in layout.views(parameters).items():
            torch.testing.assert_close(view, theirs[name].detach())
    assert ours.steps == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_a_step_that_leads_nowhere_changes_nothing(value: float) -> None:
    layout = Layout(tensors(0))
    parameters = vector_of(layout, tensors(0))
    ours = AdamW(parameters, LearningSpec(learning_rate=10.0, weight_decay=10.0), layout.matrices)
    assert ours.step(vector_of(layout, tensors(1)))
    parameters[0] = 3e307  # decays by 99 times itself
    before = [t.clone() for t in (parameters, ours.mean, ours.square)]
    gradient = vector_of(layout, tensors(2))
    gradient[1] = value
    assert not ours.step(gradient)
    for tensor, kept in zip((parameters, ours.mean, ours.square), before, strict=True):
        assert torch.equal(tensor, kept)
    assert ours.steps == 1


def test_views_are_the_tensors_and_begin_on_cache_lines() -> None:
    named = tensors(3)
    layout = Layout(named)
    vector = vector_of(layout, named)
    views = layout.views(vector)
    assert views.keys() == named.keys()
    for name, view in views.items():
        assert torch.equal(view, named[name])
        assert view.storage_offset() % ALIGNMENT == 0
        view.zero_()
    assert not bool(vector.any()), "nothing but the tensors and zeros"
    assert {name for name, view in views.items() if view.storage_offset() < layout.matrices} == {"matrix", "cube"}


@pytest.mark.parametrize(("largest", "expected"), [(100.0, 13.0), (1.0, 1.0)])
def test_gradients_are_clipped_to_their_norm(largest: float, expected: float) -> None:
    gradient = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    assert clipped(gradient, largest) == pytest.approx(13.0)
    assert float(gradient.norm()) == pytest.approx(expected)


def test_settled_the_rate_falls_as_one_over_the_steps_down_to_a_tenth() -> None:
    layout = Layout(tensors(0))
    parameters = vector_of(layout, tensors(0))
    learning = LearningSpec(learning_rate=0.02, weight_decay=0.0, settle_after=4)
    ours = AdamW(parameters, learning, layout.matrices)
    gradient = torch.ones(layout.size, dtype=torch.float64)  # the same at every step: each moves by the rate itself
    moved = []
    for _ in range(60):
        before = float(parameters[0])
        assert ours.step(gradient)
        moved.append(before - float(parameters[0]))
    expected = [0.02] * 4 + [0.02 * 4 / step for step in range(5, 41)] + [0.002] * 20
    assert moved == pytest.approx(expected, rel=1e-6)
