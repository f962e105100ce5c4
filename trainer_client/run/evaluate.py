"""Mean token loss of a model on fixed samples. Knows nothing of training or weights."""

from __future__ import annotations

import numpy as np
import torch

from trainer_client.ranks import Ranks
from trainer_client.run.forward import token_losses
from trainer_client.run.task import to_tensor


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, tokens: np.ndarray, batch_size: int, device: torch.device, ranks: Ranks | None = None
) -> float:
    """Mean NLL of a token, in nats; the same on all ranks.

    Args:
        tokens: [N, T+1] ids, N at least 1.
        batch_size: samples a forward pass, over all ranks.
        ranks: share out each batch; None: one process.
    """
    ranks = ranks or Ranks.alone()
    total, count = 0.0, 0
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        mine = batch[ranks.my_rows(len(batch))]
        # With nothing to do a rank goes along all the same: a sharded model is whole only where all ranks ask for it.
        losses = token_losses(model, to_tensor(mine if len(mine) else batch[:1], device))[: len(mine)]
        total += float(losses.sum(dtype=torch.float64))
        count += losses.numel()
    sums = ranks.all_rows(torch.tensor([[total, count]], dtype=torch.float64)).sum(0)
    return float(sums[0] / sums[1])


def fixed_subset(tokens: np.ndarray, samples: int) -> np.ndarray:
    """At most so many samples, spread evenly over all of them, the same ones every time."""
    if len(tokens) <= samples:
        return tokens
    return tokens[np.linspace(0, len(tokens) - 1, samples).astype(np.int64)]
