"""Mean token loss of a model on fixed samples. Knows nothing of training or weights."""

from __future__ import annotations

import numpy as np
import torch

from trainer_client.run.forward import token_losses
from trainer_client.run.task import to_tensor


@torch.no_grad()
def mean_loss(model: torch.nn.Module, tokens: np.ndarray, batch_size: int, device: torch.device) -> float:
    """Mean NLL of a token, in nats.

    Args:
        tokens: [N, T+1] ids, N at least 1.
        batch_size: samples a forward pass.
    """
    total, count = 0.0, 0
    for start in range(0, len(tokens), batch_size):
        batch = to_tensor(tokens[start : start + batch_size], device)
        losses = token_losses(model, batch)
        total += float(losses.sum(dtype=torch.float64))
        count += losses.numel()
    return total / count


def fixed_subset(tokens: np.ndarray, samples: int) -> np.ndarray:
    """At most so many samples, spread evenly over all of them, the same ones every time."""
    if len(tokens) <= samples:
        return tokens
    return tokens[np.linspace(0, len(tokens) - 1, samples).astype(np.int64)]
