"""The features that a trainer sends to be scored: the portable statistics of its batch's token losses.

Needs torch, knows no service. The formulas are the contract's, so that every trainer and the service agree on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weighting_contract.statistics import NAMES, portable_statistics

FEATURE_NAMES: tuple[str, ...] = NAMES  # the columns of `batch_features`: `feature_names` of a job that sends them


@torch.no_grad()
def batch_features(token_losses: Tensor, unigram_nll: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, len(FEATURE_NAMES)] float32 on the losses' device, detached; `portable_statistics` has the formulas.

    Args:
        token_losses: [B, T] nats, of the whole batch: the features are relative to it.
        unigram_nll: [B, T] nats, on any device: `unigram_nll_table(counts)[labels]`.
        mask: [B, T] bool, True where a token is real, on any device; None: everywhere.

    Raises:
        InvalidArgument: shapes that do not fit together, or an empty batch.
    """
    device = token_losses.device
    return portable_statistics(token_losses, unigram_nll.to(device), None if mask is None else mask.to(device))
