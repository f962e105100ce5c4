"""The features that a trainer sends to be scored: the portable statistics of its batch's token losses.

Needs torch, knows no service. The formulas are the contract's, so that every trainer and the service agree on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weighting_contract.columns import batch_columns
from weighting_contract.errors import InvalidArgument
from weighting_contract.statistics import NAMES, raw_statistics

FEATURE_NAMES: tuple[str, ...] = NAMES  # the columns of `batch_features`: `feature_names` of a job that sends them


@torch.no_grad()
def batch_features(
    token_losses: Tensor,
    unigram_nll: Tensor,
    mask: Tensor | None = None,
    *,
    names: Sequence[str] = FEATURE_NAMES,
    tokens: Tensor | None = None,
    profile: Tensor | None = None,
) -> Tensor:
    """[B, len(names)] float32 on the losses' device, detached; `portable_statistics` has the formulas.

    Args:
        token_losses: [B, T] nats, of the whole batch: the features are relative to it.
        unigram_nll: [B, T] nats, on any device: `unigram_nll_table(counts)[labels]`.
        mask: [B, T] bool, True where a token is real, on any device; None: everywhere.
        names: of `weighting_contract.columns.COLUMNS`; those against a target profile need `tokens` and `profile`.
        tokens: [B, T] ids that the losses are of, or [B, T+1] with each sample's first one, on any device.
        profile: [buckets] of `weighting_contract.ngrams.profile_table`, on any device.

    Raises:
        InvalidArgument: shapes that do not fit together, an empty batch, an unknown name, or one that lacks what it
            is made of.
    """
    device = token_losses.device
    mask = None if mask is None else mask.to(device)
    return batch_columns(
        raw_statistics(token_losses, unigram_nll.to(device), mask),
        names,
        tokens=None if tokens is None else tokens.to(device),
        mask=None if tokens is None else _token_mask(tokens, token_losses.shape, mask),
        table=None if profile is None else profile.to(device),
    )


def _token_mask(tokens: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor | None:
    """[B, T] or [B, T+1] bool, as the tokens: a sample's first token has no loss, but is real. `shape`: [B, T]."""
    rows, places = shape
    if tokens.shape == shape:
        return mask
    if tokens.shape == (rows, places + 1):
        return None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    raise InvalidArgument(
        f"tokens have shape {list(tokens.shape)}, expected [{rows}, {places}] as the losses, or one place more"
    )
