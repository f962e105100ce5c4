"""All methods against autograd through the step, that against brute force, and what a call must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer_client.hypergradient import METHODS, DegenerateCotangent, cotangent
from trainer_client.loss import causal_token_losses, per_sample_loss, weighted_loss
from weighting_contract.errors import InvalidArgument

VOCABULARY, WIDTH, HEADS, B, T = 23, 16, 2, 6, 12
LEARNING_RATE = 0.05


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, WIDTH]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        residual: Tensor = self.mlp(x)
        return x + residual


class SmallTransformer(nn.Module):
    """Tied embeddings, dropout, batch normalisation and a buffer that every forward pass writes to."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, VOCABULARY]
        self.calls += 1
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return logits


def sample_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[:, :-1])
    return per_sample_loss(*causal_token_losses(logits, ids))


def llama_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return per_sample_loss(*causal_token_losses(model(input_ids=ids[:, :-1]).logits, ids))


@pytest.fixture
def model() -> SmallTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallTransformer().double()


def draw_ids(seed: int, samples: int = B, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (samples, T + 1), generator=torch.Generator().manual_seed(seed))


BATCH, VALIDATION = draw_ids(1), draw_ids(2, samples=4)
WEIGHTS = torch.tensor([0.1, 2.0, 0.5, 1.4, 0.0, 2.0], dtype=torch.float64)


def diagonal(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: 0.1 + torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def compute(model: nn.Module, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"learning_rate": LEARNING_RATE, **changes}
    losses = arguments.pop("sample_losses", sample_losses)
    batch, validation = arguments.pop("batch", BATCH), arguments.pop("validation_batch", VALIDATION)
    return cotangent(model, losses, batch, validation, **arguments)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioned", [False, True])
def test_exact_is_the_derivative_of_the_validation_loss_after_the_step(
    model: SmallTransformer, preconditioned: bool
) -> None:
    scale = diagonal(model) if preconditioned else None

    def validation_loss_after_step(weights: Tensor) -> float:
        stepped = SmallTransformer().double().eval()
        stepped.load_state_dict(model.state_dict())
        weighted_loss(sample_losses(stepped, BATCH), weights).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, p in stepped.named_parameters():
                assert p.grad is not None
                p.sub_(LEARNING_RATE * p.grad * (1.0 if scale is None else scale[name]))
            return float(sample_losses(stepped, VALIDATION).mean())

    weights, h = WEIGHTS + 0.1, 1e-4
    expected = [
        (validation_loss_after_step(weights + h * e) - validation_loss_after_step(weights - h * e)) / (2 * h)
        for e in torch.eye(B, dtype=torch.float64)
    ]
    got = compute(model, method="exact", weights=weights, preconditioner=scale)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(("method", "bound"), [("jvp", 1e-6), ("finite_difference", 1e-4)])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("preconditioned", [None, "diagonal", "function"])
def test_methods_agree_with_exact(
    model: SmallTransformer, method: str, bound: float, weights: Tensor | None, preconditioned: str | None
) -> None:
    table = diagonal(model)
    functions: dict[str | None, Any] = {"diagonal": table, "function": lambda name, g: table[name] * g}
    common = {"weights": weights, "preconditioner": functions.get(preconditioned)}
    expected = compute(model, method="exact", **common)
    assert relative_error(compute(model, method=method, unrolled=True, **common), expected) <= bound


def test_without_unrolling_the_direction_is_that_of_the_present_parameters(model: SmallTransformer) -> None:
    model.eval()
    parameters = list(model.parameters())
    v = torch.autograd.grad(sample_losses(model, VALIDATION).mean(), parameters)
    expected = []
    for loss in sample_losses(model, BATCH):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected.append(-LEARNING_RATE / B * sum(float((a * b).sum()) for a, b in zip(v, gradients, strict=True)))
    got = compute(model, method="jvp")
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert relative_error(compute(model, alpha=1e-4), got) <= 1e-4
    small = [compute(model, method=method, learning_rate=1e-4) for method in ("jvp", "exact")]
    assert 1e-6 < relative_error(*small) < 1e-2, "a small step away: near the exact one, but not it"


def test_one_sided_takes_the_losses_that_are_known(model: SmallTransformer) -> None:
    model.eval()
    forward_passes = []

    def counted(model: nn.Module, ids: Tensor) -> Tensor:
        forward_passes.append(len(ids))
        return sample_losses(model, ids)

    known = sample_losses(model, BATCH)
    with_base = compute(model, sample_losses=counted, two_sided=False, base_losses=known, alpha=1e-6)
    assert forward_passes == [len(VALIDATION), B]
    assert relative_error(with_base, compute(model, method="jvp")) < 1e-3
    assert torch.equal(with_base, compute(model, two_sided=False, alpha=1e-6))
    assert not with_base.requires_grad


def test_a_validation_loss_of_its_own(model: SmallTransformer) -> None:
    def last_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1])[:, -1], ids[:, -1])

    expected = compute(model, method="exact", validation_loss=last_token_loss)
    assert relative_error(compute(model, validation_loss=last_token_loss, unrolled=True, alpha=1e-4), expected) <= 1e-4
    assert relative_error(compute(model, method="exact"), expected) > 0.1


def test_frozen_parameters_take_no_part(model: SmallTransformer) -> None:
    model.embedding.weight.requires_grad_(False)
    expected = compute(model, method="exact")
    assert relative_error(compute(model, method="jvp", unrolled=True), expected) <= 1e-6
    assert relative_error(compute(model, unrolled=True, alpha=1e-4), expected) <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_llama_in_float32(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(config)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    arguments = (llama, llama_losses, draw_ids(5, 16, 64), draw_ids(6, 8, 64))
    results = {method: cotangent(*arguments, learning_rate=1e-2, method=method) for method in METHODS}
    assert {r.dtype for r in results.values()} == {torch.float32}
    assert correlation(results["jvp"], results["exact"]) > 0.999
    assert correlation(results["finite_difference"], results["exact"]) > 0.99
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_bfloat16_parameters_need_a_larger_alpha(model: SmallTransformer) -> None:
    expected = compute(model.float(), method="jvp")
    model.bfloat16()
    assert correlation(compute(model, alpha=3e-2), expected) > 0.8


# ---- What a call leaves alone ----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Copies of all that must not change, and the identity of the tensors and of their memory."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "objects": {name: (id(t), t.data_ptr(), id(t.grad), t._version) for name, t in tensors.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert now["objects"] == before["objects"]
    assert now["modes"] == before["modes"]
    assert torch.equal(now["random"], before["random"])
    for part in ("values", "gradients"):
        assert now[part].keys() == before[part].keys()
        assert all(torch.equal(now[part][name], t) for name, t in before[part].items())


def trained(model: SmallTransformer) -> SmallTransformer:
    """In training mode but for one layer, with gradients."""
    model.train()
    model.layers[1].eval()
    sample_losses(model, BATCH).mean().backward()  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unrolled", [False, True])
def test_nothing_changes(model: SmallTransformer, method: str, unrolled: bool) -> None:
    before = snapshot(trained(model))
    first = compute(model, method=method, unrolled=unrolled)
    assert_unchanged(model, before)
    assert torch.equal(compute(model, method=method, unrolled=unrolled), first), "dropout took part"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_nothing_changes_when_a_call_raises_half_way(model: SmallTransformer, method: str, failing_call: int) -> None:
    before = snapshot(trained(model))
    values_seen = set()
    calls = 0

    def failing(model: SmallTransformer, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        losses = sample_losses(model, ids)
        values_seen.add(float(model.embedding.weight.detach().sum()))
        if calls == failing_call:
            raise RuntimeError("out of memory, say")
        return losses

    expected_calls = {"exact": 2, "jvp": 3, "finite_difference": 4}[method]
    if failing_call <= expected_calls:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            compute(model, sample_losses=failing, method=method, unrolled=True)
    else:
        compute(model, sample_losses=failing, method=method, unrolled=True)
    assert calls == min(failing_call, expected_calls)
    assert_unchanged(model, before)
    if failing_call >= 4 and method == "finite_difference":
        assert len(values_seen) == 4, "theta, theta' and both perturbed ones"


def test_a_rebound_buffer_is_put_back(model: SmallTransformer) -> None:
    def rebinding(model: SmallTransformer, ids: Tensor) -> Tensor:
        losses = sample_losses(model, ids)
        model.calls = model.calls + 100
        return losses

    before = snapshot(model)
    compute(model, sample_losses=rebinding)
    assert_unchanged(model, before)


def test_a_graph_from_before_the_call_still_gives_its_gradient(model: SmallTransformer) -> None:
    model.eval()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sample_losses(model, BATCH).mean(), parameters)
    loss = sample_losses(model, BATCH).mean()
    compute(model, unrolled=True)
    got = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_it_works_under_no_grad(model: SmallTransformer) -> None:
    expected = compute(model)
    with torch.no_grad():
        assert torch.equal(compute(model), expected)
        assert not torch.is_grad_enabled()


# ---- Errors ----------------------------------------------------------------------------------------------------------


def detached(model: nn.Module, ids: Tensor) -> Tensor:
    return sample_losses(model, ids).detach()


def cached(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.arange(1.0, len(ids) + 1, dtype=torch.float64)


def of_model(model: nn.Module, ids: Tensor) -> Tensor:
    return sample_losses(model, ids).mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sample_losses": detached, "validation_loss": of_model, "method": "exact"},
            "the batch's loss does not depend",
        ),
        (
            {"sample_losses": detached, "validation_loss": of_model, "method": "jvp", "unrolled": True},
            "the batch's loss",
        ),
        ({"sample_losses": cached, "validation_loss": of_model, "method": "jvp"}, r"zero for all 6 samples: no loss"),
        (
            {"sample_losses": cached, "validation_loss": of_model},
            "zero for all 6 samples: moving the parameters by 0.001",
        ),
        ({"validation_loss": lambda m, b: of_model(m, b).detach()}, "validation_loss does not depend on the model's"),
        ({"validation_loss": lambda m, b: torch.ones(())}, "validation_loss does not depend on the model's"),
        ({"validation_loss": lambda m, b: torch.ones(()), "method": "exact"}, "after the step does not depend on"),
        ({"validation_loss": lambda m, b: 0.0 * of_model(m, b)}, "has norm 0.0"),
        ({"validation_loss": lambda m, b: float("inf") * of_model(m, b)}, "has norm nan|has norm inf"),
        ({"validation_loss": lambda m, b: float("inf") * of_model(m, b), "method": "jvp"}, "cotangent is not finite"),
        ({"batch": BATCH[:1].expand(B, -1)}, "for all 6 samples, so it prefers none"),
        ({"batch": BATCH[:1]}, "at least two different samples"),
    ],
)
def test_degenerate_cotangents_are_errors(model: SmallTransformer, changes: dict[str, Any], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(DegenerateCotangent, match=message):
        compute(model, **changes)
    assert_unchanged(model, before)


def test_alpha_too_small_for_bfloat16_is_an_error(model: SmallTransformer) -> None:
    # Zero parameters would resolve any step, however small.
    nonzero = [p for p in model.parameters() if bool((p != 0).all())]
    for p in model.parameters():
        p.requires_grad_(any(p is n for n in nonzero))
    with pytest.raises(DegenerateCotangent, match=r"changed no loss.*alpha is too small for its dtype; bfloat16"):
        compute(model.bfloat16(), alpha=1e-9)


def test_all_zero_parameters_are_an_error(model: SmallTransformer) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name == "norm.bias")
    with pytest.raises(DegenerateCotangent, match=r"all trained parameters are zero.*use method 'jvp'"):
        compute(model)
    assert compute(model, method="jvp").abs().min() > 0


def scaled(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return sample_losses(model, ids) * torch.tensor([1.0] * (len(ids) - 1) + [factor], dtype=torch.float64)

    return losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method is 'magic', expected one of exact, jvp, finite_difference"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"alpha": 0.0}, "alpha is 0.0, expected"),
        ({"weights": WEIGHTS[:3]}, r"weights have shape \[3\], expected \[6\]"),
        ({"weights": WEIGHTS[:3], "method": "exact"}, r"weights have shape \[3\], expected \[6\]"),
        ({"weights": WEIGHTS * float("nan")}, "weights hold values that are not finite"),
        ({"base_losses": torch.ones(4), "two_sided": False}, r"base_losses have shape \[4\], expected \[6\]"),
        ({"base_losses": torch.full((B,), torch.nan), "two_sided": False}, r"base_losses\[0\] is nan"),
        ({"sample_losses": scaled(float("inf"))}, r"sample_losses\[3\] is inf, expected a finite loss"),
        ({"sample_losses": of_model}, r"sample_losses is one number for the whole batch \(shape \[\]\)"),
        (
            {"sample_losses": lambda m, b: sample_losses(m, b).bfloat16()},
            "sample_losses are bfloat16, expected float32",
        ),
        ({"validation_loss": sample_losses}, r"validation_loss has shape \[4\], expected a scalar"),
        ({"validation_loss": sample_losses, "method": "exact"}, r"validation_loss has shape \[4\], expected a scalar"),
        ({"preconditioner": {}}, "preconditioner has no entry 'embedding.weight'"),
        ({"preconditioner": {"embedding.weight": torch.ones(2)}}, r"has shape \[2\], expected that of the parameter"),
    ],
)
def test_wrong_arguments_are_errors(model: SmallTransformer, changes: dict[str, Any], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(InvalidArgument, match=message):
        compute(model, **changes)
    assert_unchanged(model, before)


def test_a_model_without_trained_parameters_is_an_error(model: SmallTransformer) -> None:
    with pytest.raises(InvalidArgument, match="no parameter with requires_grad"):
        compute(model.requires_grad_(False))
