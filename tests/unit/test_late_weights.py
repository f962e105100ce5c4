"""Weights that a backward pass asks for halfway through the output layer, against those that were there before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer_client.late_weights import late_weights
from trainer_client.loss import causal_token_losses, per_sample_loss, weighted_loss
from weighting_contract.errors import InvalidArgument

B, T, V, D = 3, 5, 11, 6


class Model(nn.Module):
    """A table, something in between, and an output layer, tied to the table or not."""

    def __init__(self, bias: bool = False, tied: bool = False, cap: float | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=bias)
        self.cap = cap
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(ids).tanh())
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def sample_losses(self) -> Tensor:
        ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
        return per_sample_loss(*causal_token_losses(self(ids[:, :-1]), ids, torch.tensor([T + 1, 3, 4])))

    def gradients(self) -> dict[str, Tensor]:
        assert all(p.grad is not None for p in self.parameters())
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


def late(model: Model, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
    with late_weights(model.head, weights):
        losses = model.sample_losses()
    losses.mean().backward()  # type: ignore[no-untyped-call]
    return model.gradients()


def at_once(model: Model, weights: Tensor) -> dict[str, Tensor]:
    weighted_loss(model.sample_losses(), weights).backward()  # type: ignore[no-untyped-call]
    return model.gradients()


@pytest.mark.parametrize("weights", [[0.3, 1.7, 1.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"tied": True, "cap": 2.0}], ids=["plain", "bias", "tied, cap"])
def test_the_gradient_is_that_of_the_weighted_loss(weights: list[float], shape: dict[str, bool]) -> None:
    given = torch.tensor(weights)
    found, expected = late(Model(**shape), lambda: given), at_once(Model(**shape), given)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0.01
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_one_weight_counts_for_all_samples() -> None:
    found, expected = (
        late(Model(bias=True), lambda: torch.tensor([0.5])),
        at_once(Model(bias=True), torch.full((B,), 0.5)),
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])
def test_half_precision(autocast: bool) -> None:
    weights = torch.tensor([0.3, 1.7, 1.0])

    def model() -> Model:
        return Model(bias=True) if autocast else Model(bias=True).bfloat16()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = late(model(), lambda: weights), at_once(model(), weights)
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == (torch.float32 if autocast else torch.bfloat16)
        torch.testing.assert_close(found[name], gradient, rtol=3e-2, atol=1e-3)


def test_frozen_parameters_get_no_gradient() -> None:
    weights = torch.tensor([0.3, 1.7, 1.0])
    for name in ("head.weight", "table.weight"):
        model, whole = Model(), Model()
        model.get_parameter(name).requires_grad_(False)
        with late_weights(model.head, lambda: weights):
            losses = model.sample_losses()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        expected = at_once(whole, weights)
        assert model.get_parameter(name).grad is None
        (other,) = [p.grad for p in model.parameters() if p.requires_grad]
        (its_name,) = expected.keys() - {name}
        torch.testing.assert_close(other, expected[its_name])


def test_weights_are_asked_for_once_the_loss_is_left_behind() -> None:
    order = []

    def weights() -> Tensor:
        order.append("weights")
        return torch.ones(B)

    model = Model()
    with late_weights(model.head, weights):
        losses = model.sample_losses()
    assert order == []
    losses.register_hook(lambda gradient: order.append("losses"))  # type: ignore[no-untyped-call]
    model.table.weight.register_hook(lambda gradient: order.append("behind"))
    losses.mean().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert order == ["losses", "weights", "behind"]
    losses.mean().backward()  # type: ignore[no-untyped-call]
    assert order[3:] == ["losses", "weights", "behind"]


def test_the_layer_is_itself_again() -> None:
    model = Model()
    with late_weights(model.head, lambda: torch.tensor([0.0, 0.0, 3.0])):
        model.sample_losses()
    assert "forward" not in vars(model.head)
    for name, gradient in at_once(model, torch.ones(B)).items():
        assert torch.equal(gradient, at_once(Model(), torch.ones(B))[name])
    with pytest.raises(ZeroDivisionError), late_weights(model.head, lambda: torch.ones(B)):
        raise ZeroDivisionError
    assert "forward" not in vars(model.head)


def test_what_weights_raise_comes_out_of_the_backward_pass() -> None:
    class Away(Exception):
        pass

    def weights() -> Tensor:
        raise Away("no answer")

    model = Model()
    with pytest.raises(Away, match="no answer"):
        late(model, weights)
    assert model.table.weight.grad is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(B + 1), r"weights have shape \[4\], expected \[3\]"),
        (torch.tensor([1.0, -1.0, 3.0]), r"weights\[1\] is -1.0"),
        (torch.tensor([1.0, 1.0, math.nan]), r"weights\[2\] is nan"),
    ],
)
def test_weights_that_are_none(weights: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        late(Model(), lambda: weights)


def passes(model: Model, count: int) -> None:
    for _ in range(count):
        model.sample_losses()


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_forward_passes_is_refused(count: int) -> None:
    model = Model()
    with pytest.raises(InvalidArgument, match=f"called {count} times"), late_weights(model.head, lambda: torch.ones(B)):
        passes(model, count)


def test_a_forward_pass_without_a_graph_is_refused() -> None:
    model = Model()
    weighed = late_weights(model.head, lambda: torch.ones(B))
    with pytest.raises(InvalidArgument, match="gradients off"), weighed, torch.no_grad():
        model.sample_losses()


def test_another_layer_is_refused() -> None:
    model = Model()
    with pytest.raises(InvalidArgument, match="head is a Embedding"), late_weights(model.table, lambda: torch.ones(B)):
        model.sample_losses()


def test_a_layer_that_somebody_else_has_changed_is_refused() -> None:
    model = Model()
    vars(model.head)["forward"] = model.head.forward
    with (
        pytest.raises(InvalidArgument, match="whose forward is replaced"),
        late_weights(model.head, lambda: torch.ones(B)),
    ):
        model.sample_losses()


def test_second_derivatives_are_refused() -> None:
    model = Model()
    with late_weights(model.head, lambda: torch.ones(B)):
        losses = model.sample_losses()
    (gradient,) = torch.autograd.grad(losses.mean(), [model.table.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]
