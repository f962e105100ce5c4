"""How well and how fast the ways to a cotangent are, on small plain transformers and one thread.

    python -m benchmarks.hypergradient [--seeds 3] [--steps 150] [--rounds 5] [--device cuda]

First the Spearman rank correlation of finite differences with `exact` in float32, by precision and by alpha: what
`trainer_client.hypergradient.precision.ALPHAS` was chosen from. Its worst seed counts, and the goal is 0.95 at the
alphas that a call takes by itself, not counting parameters that are bfloat16 themselves. Then, on the CPU, the
processor time of every method in forward passes of the batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe, goal_at_least
from trainer_client.hypergradient import DegenerateCotangent, cotangent
from trainer_client.hypergradient.precision import alpha_for
from trainer_client.loss import causal_token_losses, per_sample_loss

TOKENS, SAMPLES, VALIDATION_SAMPLES, KINDS = 64, 32, 8, 4
LEARNING_RATE = 2e-3
ALPHAS = (3e-4, 1e-3, 2.15e-3, 3e-3, 1e-2, 3e-2)
EARLY = 20  # steps: the rules have just begun to be learned, and the curvature is high
GOAL_CORRELATION = 0.95


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, -1, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        residual: Tensor = self.mlp(self.before_mlp(x))
        return x + residual


class Transformer(nn.Module):
    """Tied embeddings; casts nothing by itself, as models of transformers do."""

    def __init__(self, width: int = 64, layers: int = 2, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(TOKENS, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.embedding, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, vocabulary]
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


def plain_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[B] float32, whatever the model computes in."""
    return per_sample_loss(*causal_token_losses(model(ids[:, :-1]), ids))


def draw_kinds(generator: torch.Generator, kinds: Tensor, vocabulary: int = 256) -> Tensor:
    """[B, T+1] ids, rows of several kinds: each has a rule for the next token, and breaks it more or less often."""
    noise = torch.randint(vocabulary, (len(kinds), TOKENS + 1), generator=generator)
    broken = torch.rand(noise.shape, generator=generator) < (0.15 + 0.1 * kinds)[:, None]
    columns = [noise[:, 0]]
    for t in range(1, TOKENS + 1):
        expected = (columns[-1] * (2 * kinds + 3) + 7 * kinds + 1) % vocabulary
        columns.append(torch.where(broken[:, t], noise[:, t], expected))
    return torch.stack(columns, 1)


def trained_transformer(seed: int, steps: int) -> tuple[Transformer, Tensor, Tensor]:
    """(a model after so many steps, a batch of all kinds, a validation batch of one kind)."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        return draw_kinds(generator, torch.randint(KINDS, (SAMPLES,), generator=generator))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer()
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        plain_losses(model, batch()).mean().backward()
        optimiser.step()
    optimiser.zero_grad()
    return model, batch(), draw_kinds(generator, torch.zeros(VALIDATION_SAMPLES, dtype=torch.int64))


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two rows without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    worst = print_quality(given.seeds, given.steps, torch.device(given.device))
    if given.device == "cpu":
        print_costs(given.rounds)
    return int(worst < GOAL_CORRELATION)


def print_quality(seeds: int, steps: int, device: torch.device) -> float:
    """The table of rank correlations; the worst at a default alpha."""
    stages = (0, EARLY, steps)
    trained = [trained_transformer(seed, steps) for steps in stages for seed in range(seeds)]
    cases = [(model.to(device), batch.to(device), validation.to(device)) for model, batch, validation in trained]
    exact = [_cotangent(*case, method="exact") for case in cases]
    precisions: dict[str, tuple[torch.dtype, bool]] = {
        "float32": (torch.float32, False),
        "float16 autocast": (torch.float16, True),
        "bfloat16 autocast": (torch.bfloat16, True),
        "bfloat16 parameters": (torch.bfloat16, False),
    }
    stages_named = ", ".join(map(str, stages))
    print(f"\nRank correlation with float32 `exact`, on {device}, worst of {seeds} seeds, after {stages_named} steps")
    print(f"{'':32}" + "".join(f"{f'alpha {alpha:g}':>20}" for alpha in ALPHAS))
    at_default = []
    for name, (dtype, autocast) in precisions.items():
        for two_sided in (True, False):
            row = []
            for alpha in ALPHAS:
                with torch.autocast(device.type, dtype, enabled=autocast):
                    found = [
                        _correlation(case, wanted, dtype, autocast, alpha, two_sided)
                        for case, wanted in zip(cases, exact, strict=True)
                    ]
                row.append(" ".join(f"{min(found[i : i + seeds]):.3f}" for i in range(0, len(found), seeds)))
                if alpha == alpha_for(dtype):
                    at_default += [min(found)] if autocast or dtype == torch.float32 else []
                    row[-1] = "*" + row[-1]
            print(
                f"{name:22}{'two' if two_sided else 'one'}-sided " + "".join(f"{cell:>20}" for cell in row), flush=True
            )
    worst = min(at_default)
    print(f"* taken by itself; the worst of them: {worst:.3f} {goal_at_least(worst, GOAL_CORRELATION)}")
    return worst


def _correlation(
    case: tuple[Transformer, Tensor, Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    autocast: bool,
    alpha: float,
    two_sided: bool,
) -> float:
    """Of a finite difference with `exact`; 0 where it has nothing to say."""
    model, batch, validation = case
    if not autocast and dtype != torch.float32:
        coarse = Transformer().to(batch.device, dtype)
        coarse.load_state_dict(model.state_dict())
        model = coarse
    try:
        return spearman(_cotangent(model, batch, validation, alpha=alpha, two_sided=two_sided), exact)
    except DegenerateCotangent:
        return 0.0


def _cotangent(model: Transformer, batch: Tensor, validation: Tensor, **how: Any) -> Tensor:
    return cotangent(model, plain_losses, batch, validation, learning_rate=LEARNING_RATE, **how)


def print_costs(rounds: int) -> None:
    """Processor time of each way, in forward passes of the batch."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(width=256, layers=4, vocabulary=1024)
    batch = draw_kinds(generator, torch.arange(SAMPLES) % KINDS, 1024)
    validation = batch[:VALIDATION_SAMPLES]

    @torch.no_grad()
    def forward() -> Tensor:
        return plain_losses(model, batch)

    def validation_gradient() -> None:
        torch.autograd.grad(plain_losses(model, validation).mean(), list(model.parameters()))

    known = forward()
    ways: dict[str, Callable[[], object]] = {
        "forward pass": forward,
        "validation gradient": validation_gradient,
        "training step's passes": lambda: torch.autograd.grad(
            plain_losses(model, batch).mean(), list(model.parameters())
        ),
        "one-sided, known losses": lambda: _cotangent(model, batch, validation, two_sided=False, base_losses=known),
        "two-sided": lambda: _cotangent(model, batch, validation),
        "jvp": lambda: _cotangent(model, batch, validation, method="jvp"),
        "exact": lambda: _cotangent(model, batch, validation, method="exact"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    forward_s = statistics.median(seconds["forward pass"])
    size = sum(p.numel() for p in model.parameters())
    print(f"\n{size / 1e6:.1f} M parameters, {SAMPLES} x {TOKENS} tokens, {VALIDATION_SAMPLES} validation samples;")
    print(f"a forward pass takes {forward_s * 1e3:.0f} ms. Validation gradient included, in forward passes:")
    for name, taken in seconds.items():
        print(f"  {name:26}{statistics.median(taken) / forward_s:6.2f}")


if __name__ == "__main__":
    sys.exit(main())
