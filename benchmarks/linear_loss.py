"""Memory and time of weighted per-sample losses without logits, against torch's fused mean, which has no weights.

    python -m benchmarks.linear_loss [--rounds 5]

Forward and backward pass of the loss alone, in turns. Peak memory is what is allocated beyond hidden states and matrix,
gradients included: counted allocation by allocation on the CPU, by the allocator on a GPU. On a GPU in bfloat16 at the
size of a language model's head, else in float32 at a smaller one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe, goal
from trainer_client.linear_loss import linear_token_losses, weighted_linear_loss
from trainer_client.loss import per_sample_loss, token_losses, weighted_loss

GOAL_MEMORY = 1.2  # of torch's fused mean
GOAL_TIME = 1.2  # likewise, where weights are known before

Method = Callable[["Head"], Tensor]


@dataclass(frozen=True)
class Head:
    """What a loss is made of."""

    hidden: Tensor  # [B, T, d]
    weight: Tensor  # [V, d]
    labels: Tensor  # [B, T]
    weights: Tensor  # [B], mean 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, else, writes of its starts and stops
    print(describe())
    if torch.cuda.is_available():
        head = make_head(8, 2048, 4096, 131_072, torch.bfloat16, "cuda")
        print(torch.cuda.get_device_name())
    else:
        torch.set_num_threads(1)
        head = make_head(8, 64, 256, 8_192, torch.float32, "cpu")
    (b, t, d), v = head.hidden.shape, len(head.weight)
    print(f"{b} x {t} tokens, width {d}, vocabulary {v:,}, {head.hidden.dtype} on {head.hidden.device.type}")
    methods = METHODS
    fused = hasattr(F, "linear_cross_entropy")
    if not fused:
        print(
            f"torch {torch.__version__} has no linear_cross_entropy, which came with 2.13: beside logits in memory only"
        )
        methods = {name: method for name, method in METHODS.items() if name != FUSED}
    peaks = {name: peak_bytes(lambda m=method: run(m, head), head.hidden.device) for name, method in methods.items()}
    times = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, method in methods.items():  # in turns, so that whatever else the machine does meets all alike
            times[name].append(timed(lambda m=method: run(m, head)))
    reached = True
    basis, its = (FUSED, "torch's") if fused else (WITH_LOGITS, "that with logits")
    saves, as_fast = (WITHOUT_LOGITS, (ONE_PASS,)) if fused else ((), ())  # what is held against goals
    for name in methods:
        memory = peaks[name] / peaks[basis]
        slower = median(times[name][1:]) / median(times[basis][1:])
        goals = goal(memory, GOAL_MEMORY) if name in saves else ""
        goals_time = goal(slower, GOAL_TIME) if name in as_fast else ""
        print(f"{name:43} peak {peaks[name] / 2**20:8.1f} MiB, {memory:5.2f} of {its} {goals}")
        print(f"{'':43} time {1e3 * median(times[name][1:]):8.1f} ms,  {slower:5.2f} of {its} {goals_time}")
        reached &= name not in saves or memory <= GOAL_MEMORY
        reached &= name not in as_fast or slower <= GOAL_TIME
    return int(not reached)


def make_head(b: int, t: int, d: int, v: int, dtype: torch.dtype, device: str) -> Head:
    """Random, but with logits of the spread that models have."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(b, t, d, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(v, (b, t), generator=generator).to(device)
    weights = torch.rand(b, generator=generator)
    return Head(hidden, weight, labels, (weights / weights.mean()).to(device))


def fused_mean(head: Head) -> Tensor:
    """Unweighted: torch's own, without logits in memory."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(
        head.hidden.flatten(0, 1), head.weight, head.labels.flatten(), options=options
    )
    return loss


def one_pass(head: Head) -> Tensor:
    return weighted_linear_loss(head.hidden, head.weight, head.labels, head.weights)[0]


def two_passes(head: Head) -> Tensor:
    losses = per_sample_loss(*linear_token_losses(head.hidden, head.weight, head.labels))
    return weighted_loss(losses, head.weights)


def with_logits(head: Head) -> Tensor:
    losses = per_sample_loss(*token_losses(head.hidden @ head.weight.T, head.labels))
    return weighted_loss(losses, head.weights)


FUSED, ONE_PASS = "unweighted mean: torch's fused", "weighted_linear_loss (weights known before)"
TWO_PASSES, WITH_LOGITS = "linear_token_losses (weights read losses)", "weighted, logits in memory"
METHODS: dict[str, Method] = {
    FUSED: fused_mean,
    ONE_PASS: one_pass,
    TWO_PASSES: two_passes,
    WITH_LOGITS: with_logits,
}
WITHOUT_LOGITS = (ONE_PASS, TWO_PASSES)


def run(method: Method, head: Head) -> None:
    """Forward and backward pass; the gradients are dropped afterwards."""
    method(head).backward()
    head.hidden.grad = head.weight.grad = None


def timed(what: Callable[[], None]) -> float:
    """Seconds, the device's work included."""
    start = time.perf_counter()
    what()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(what: Callable[[], None], device: torch.device) -> int:
    """Most bytes that were allocated on the device at once during a call, beyond what was before it."""
    what()  # so that nothing is counted that only a first call needs
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        what()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        what()
    results: Any = profiler.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.exit(main())
