"""The optimiser of every model that is trained here, and its learning rate over the steps. Knows nothing of loops."""

from __future__ import annotations

import math

import torch

from trainer_client.hypergradient.shards import is_sharded
from trainer_client.run.config import RunConfig

_MAX_GRADIENT_NORM = 1.0
_FINAL_LR_SHARE = 0.1


def learning_rate(config: RunConfig, step: int) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then constant, or a cosine to a tenth at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.lr * (_FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with torch's defaults (betas .9 and .999, weight decay .01), better here than .95 and .1 for both methods.

    The learning rate is set at every step.
    """
    return torch.optim.AdamW(model.parameters(), lr=config.lr)


def optimise(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> float:
    """An optimiser step at this learning rate, the gradient clipped to a norm of 1; its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(norm.full_tensor() if is_sharded(norm) else norm)  # type: ignore[attr-defined]
