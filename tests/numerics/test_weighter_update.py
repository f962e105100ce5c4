"""Meta-updates against autograd through W_phi, written here as plain functions in float64; and that learning learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service.domain import Estimator, Inputs, MetaUpdate
from weighting_service.weighter import Weighter

CPU = torch.device("cpu")
SPEC = WeighterSpec(
    features=FeatureSpec(names=("a", "b", "c", "d", "e")),
    head=HeadSpec(width=8, layers=2, attention_heads=2, temperature=0.01, floor=0.05, min_effective_share=0.6),
    learning=LearningSpec(learning_rate=3e-3, max_gradient_norm=0.01, cotangent_clip=1.5),
    seed=5,
)


def update_of(position: int, samples: int = 12, **values: object) -> MetaUpdate:
    rng = np.random.default_rng(position)
    features = rng.normal(size=(samples, 5)).astype(np.float32)
    cotangent = (1e-4 * (features[:, 0] + 0.3 * rng.normal(size=samples))).astype(np.float32)
    return MetaUpdate("job", str(position), position, Inputs(features), cotangent, position - 1, **values)  # type: ignore[arg-type]


# ---- The reference -------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor | float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5) * scale + shift


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def w_logits(phi: dict[str, Tensor], features: Tensor) -> Tensor:
    """[B, 5] -> [B], sample by sample and head by head."""
    head = SPEC.head
    x = features @ phi["features.0.weight"].T + phi["features.0.bias"]
    x = gelu(layer_norm(x, phi["features.1.weight"], phi["features.1.bias"]))
    x = x @ phi["join.weight"].T + phi["join.bias"]
    width = head.width // head.attention_heads
    for i in range(head.layers):
        p = {name.removeprefix(f"blocks.{i}."): t for name, t in phi.items() if name.startswith(f"blocks.{i}.")}
        y = layer_norm(x, p["attention_norm.weight"], p["attention_norm.bias"])
        q, k, v = (y @ w.T for w in torch.split(p["qkv.weight"], head.width))
        mixed = []
        for h in range(head.attention_heads):
            part = slice(h * width, (h + 1) * width)
            attention = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), dim=-1)
            mixed.append(attention @ v[:, part])
        x = x + torch.cat(mixed, dim=-1) @ p["out.weight"].T + p["out.bias"]
        y = layer_norm(x, p["mlp.0.weight"], p["mlp.0.bias"])
        x = x + gelu(y @ p["mlp.1.weight"].T + p["mlp.1.bias"]) @ p["mlp.3.weight"].T + p["mlp.3.bias"]
    return (layer_norm(x, phi["norm.weight"], 0.0) @ phi["logit.weight"].T)[:, 0]


def w_factor(logits: Tensor) -> float:
    low, high = 0.0, 1.0
    for factor in [1.0] + [math.nan] * 100:
        middle = factor if factor == 1.0 else (low + high) / 2
        weights = w_weights(logits, middle)
        good = float(weights.sum() ** 2 / (weights**2).sum()) >= SPEC.head.min_effective_share * len(logits)
        if good and middle == 1.0:
            return 1.0
        low, high = (middle, high) if good else (low, middle)
    return low


def w_weights(logits: Tensor, factor: float) -> Tensor:
    shares = torch.softmax(factor * logits / SPEC.head.temperature, -1)
    return SPEC.head.floor + (1 - SPEC.head.floor) * len(logits) * shares


def vjp_loss(logits: Tensor, cotangent: Tensor) -> Tensor:
    return (cotangent * w_weights(logits, w_factor(logits.detach()))).sum() / len(logits)


def score_function_loss(logits: Tensor, cotangent: Tensor) -> Tensor:
    """Of log w with w = softmax(z): with a centred cotangent, guard and temperature would only be factors of it."""
    penalty = SPEC.learning.logit_penalty * logits.var(correction=0) / 2
    return ((cotangent - cotangent.mean()) * torch.log_softmax(logits, -1)).sum() / len(logits) + penalty


class Reference:
    """phi, its AdamW and one job's running mean square, in float64."""

    def __init__(self, phi: dict[str, Tensor]) -> None:
        self.phi = {name: t.double().requires_grad_() for name, t in phi.items()}
        learning = SPEC.learning
        matrices = [t for t in self.phi.values() if t.ndim == 2]
        vectors = [t for t in self.phi.values() if t.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": learning.weight_decay},
            {"params": vectors, "weight_decay": 0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=learning.learning_rate)
        self.squares: list[float] = []
        self.means = {name: t.detach().clone() for name, t in self.phi.items()}

    def learn(self, update: MetaUpdate, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns the logits before the step, by the running means of the parameters."""
        learning = SPEC.learning
        cotangent = torch.tensor(update.cotangent).double()
        cotangent = cotangent - cotangent.mean()
        self.squares.append(float((cotangent**2).mean()))
        powers = [learning.cotangent_memory**age for age in reversed(range(len(self.squares)))]
        rms = math.sqrt(sum(p * s for p, s in zip(powers, self.squares, strict=True)) / sum(powers))
        cotangent = (cotangent / rms).clamp(-learning.cotangent_clip, learning.cotangent_clip)
        features = torch.tensor(update.inputs.features).double()
        given = w_logits(self.means, features).detach()
        logits = w_logits(self.phi, features)
        gradients = torch.autograd.grad(loss_of(logits, cotangent), list(self.phi.values()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for parameter, gradient in zip(self.phi.values(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, learning.max_gradient_norm / (norm + 1e-6))
        self.optimiser.step()
        updates = len(self.squares)
        decay = min(learning.averaging, updates / (9 + updates))
        self.means = {n: decay * mean + (1 - decay) * self.phi[n].detach() for n, mean in self.means.items()}
        return given


LOSSES = {Estimator.VJP: vjp_loss, Estimator.SCORE_FUNCTION: score_function_loss}


def means(weighter: Weighter) -> dict[str, Tensor]:
    return dict(weighter.published.model.state_dict())


def parameters(weighter: Weighter) -> dict[str, Tensor]:
    tensors = weighter.state_tensors()
    return {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}


# ---- Tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", list(Estimator))
def test_updates_equal_autograd_through_the_model(estimator: Estimator) -> None:
    weighter = Weighter(SPEC, device=CPU)
    reference = Reference(parameters(weighter))
    for position in range(1, 6):
        update = update_of(position, estimator=estimator)
        logits = weighter.score([update.inputs])[0].logits
        expected = reference.learn(update, LOSSES[estimator])
        weighter.apply(position, update)
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)
        for name, tensor in parameters(weighter).items():
            difference = float((tensor.double() - reference.phi[name].detach()).abs().max())
            assert difference < 1e-6, f"{name} differs by {difference} after update {position}"
            averaged = float((means(weighter)[name].double() - reference.means[name]).abs().max())
            assert averaged < 1e-6, f"the mean of {name} differs by {averaged} after update {position}"
    moved = (parameters(weighter)["join.weight"] - parameters(Weighter(SPEC, device=CPU))["join.weight"]).abs()
    assert float(moved.max()) > 1e-3


def test_the_guard_was_active_in_the_comparison_above() -> None:
    weighter = Weighter(SPEC, device=CPU)
    for position in range(1, 6):
        weighter.apply(position, update_of(position))
    assert weighter.statistics.effective_share == pytest.approx(SPEC.head.min_effective_share, rel=1e-4)


def test_weights_equal_the_reference_after_learning() -> None:
    weighter = Weighter(SPEC, device=CPU)
    for position in range(1, 6):
        weighter.apply(position, update_of(position))
    (scores,) = weighter.score([update_of(99).inputs])
    phi = {name: t.double() for name, t in means(weighter).items()}
    logits = w_logits(phi, torch.tensor(update_of(99).inputs.features).double())
    np.testing.assert_allclose(scores.logits, logits.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores.weights, w_weights(logits, w_factor(logits)).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_a_feature_that_predicts_the_cotangent_earns_its_samples_weight(estimator: Estimator) -> None:
    spec = WeighterSpec(features=FeatureSpec(names=("a", "b", "c", "d", "e")))
    weighter = Weighter(spec, device=CPU)
    for position in range(1, 61):
        weighter.apply(position, update_of(position, samples=32, estimator=estimator))
    inputs = update_of(1000, samples=200).inputs
    assert inputs.features is not None
    weights = weighter.score([inputs])[0].weights
    harmful = inputs.features[:, 0] > 0  # their cotangent is positive: more weight, more validation loss
    assert weights[~harmful].mean() > 1.3
    assert weights[harmful].mean() < 0.7
    statistics = weighter.statistics
    assert statistics.updates_applied == 60
    assert statistics.signal_correlation > 0.5
    assert statistics.jobs["job"].signal_correlation == pytest.approx(statistics.signal_correlation)


def test_statistics_are_those_of_the_last_batch_and_of_every_job() -> None:
    weighter = Weighter(SPEC, device=CPU)
    agreements: dict[str, list[float]] = {"one": [], "two": []}
    for position in range(1, 8):
        job = "one" if position % 3 else "two"
        update = update_of(position)
        update = MetaUpdate(job, update.update_id, position, update.inputs, update.cotangent, 0)
        (scores,) = weighter.score([update.inputs])
        agreements[job].append(
            float(np.corrcoef(-update.cotangent, scores.logits)[0, 1]) if scores.logits.any() else 0.0
        )
        weighter.apply(position, update)
    statistics = weighter.statistics
    assert statistics.logit_std == pytest.approx(scores.logits.std(), rel=1e-4)
    assert statistics.effective_share == pytest.approx(scores.effective_sample_size / 12, rel=1e-4)
    assert statistics.gradient_norm > 0
    assert agreements["one"][0] == 0.0
    assert statistics.signal_correlation == pytest.approx(np.mean(agreements["one"] + agreements["two"]), abs=1e-4)
    for job, values in agreements.items():
        assert statistics.jobs[job].updates_applied == len(values)
        assert statistics.jobs[job].signal_correlation == pytest.approx(np.mean(values), abs=1e-4)
    assert statistics.jobs["one"].cotangent_rms == pytest.approx(1e-4, rel=0.5)


def test_jobs_are_brought_to_one_scale() -> None:
    """A cotangent a million times smaller teaches the same, to rounding."""
    plain, small = Weighter(SPEC, device=CPU), Weighter(SPEC, device=CPU)
    for position in range(1, 5):
        update = update_of(position)
        plain.apply(position, update)
        cotangent = update.cotangent * np.float32(2.0**-20) + np.float32(0)
        small.apply(position, MetaUpdate("job", "", position, update.inputs, cotangent, 0))
    for name, tensor in parameters(plain).items():
        torch.testing.assert_close(parameters(small)[name], tensor, rtol=0, atol=1e-6)
