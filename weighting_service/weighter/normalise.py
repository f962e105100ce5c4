"""Logits to weights: temperature, floor and the guard on the effective sample size. Pure tensor functions.

A job's trust is a factor on its logits before they get here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_EXPONENT = -64.0  # factors of 2^-64 and less count as 0, that is as uniform weights
SECTIONS, ROUNDS = 32, 5  # of the search for the factor: 64 octaves in 32^5 parts, 1e-6 of the factor


def to_weights(
    logits: Tensor,  # [..., B]
    mask: Tensor | None = None,  # [..., B] bool, True for a real sample
    *,
    temperature: float,
    floor: float,
    min_effective_share: float,
) -> tuple[Tensor, Tensor]:
    """Weights with mean 1 over the real samples of each batch, and their effective sample size.

        w = floor + (1 - floor) * B * softmax(factor * logits / temperature)

    `factor` is that of `guarded`, so (sum w)^2 / sum w^2 >= min_effective_share * B holds for the final weights.
    Computed in float32; float64 stays float64.

    Args:
        logits: [..., B], any real numbers.
        mask: [..., B], True for a real sample; absent: all are. Each batch needs at least one.
        temperature: divides the logits, > 0.
        floor: least weight of a real sample, in [0, 1).
        min_effective_share: least effective sample size / B, in [0, 1].

    Returns:
        Weights [..., B], 0 where masked, and effective sample sizes [...], in samples (detached).
    """
    scaled = guarded(logits, mask, temperature=temperature, floor=floor, min_effective_share=min_effective_share)
    return weights_of(scaled, mask, floor=floor)


def weights_of(
    scaled: Tensor,  # [..., B]
    mask: Tensor | None = None,  # [..., B] bool
    *,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Weights [..., B] and effective sample sizes [...] (detached) of logits that `guarded` made ready."""
    weights = _weights(scaled, mask, floor)
    return weights, _effective_sample_size(weights.detach())


def guarded(
    logits: Tensor,  # [..., B]
    mask: Tensor | None = None,  # [..., B] bool
    *,
    temperature: float,
    floor: float,
    min_effective_share: float,
) -> Tensor:
    """Logits ready for the softmax: over temperature, times the largest factor <= 1 that keeps the share.

    The effective sample size falls as the factor grows (its derivative has the sign of E_f[z] - E_2f[z] <= 0 for the
    tilted means of z), so nested sections find the largest admissible factor, in a fixed number of rounds. They
    divide the exponent, so that logits of any size are met with the same relative precision. For derivatives the
    factor is a constant: no gradient flows through it, as if the temperature had been chosen per batch.

    Returns:
        [..., B], shifted so that the largest real one is 0; masked ones are 0 too.
    """
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    scaled = scaled / temperature
    if mask is None:
        scaled = scaled - scaled.detach().amax(-1, keepdim=True)
    else:
        top = scaled.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        scaled = (scaled - top).masked_fill(~mask, 0.0)
    return scaled * _factor(scaled.detach(), mask, floor, min_effective_share)


@torch.no_grad()
def _factor(scaled: Tensor, mask: Tensor | None, floor: float, min_effective_share: float) -> Tensor:
    """[..., 1], the same work whatever the companions, so that equal batches get equal factors."""
    samples = scaled.shape[-1] if mask is None else mask.sum(-1, keepdim=True)  # [..., 1]
    # The shares p give sum w^2 = B (f^2 + 2 f (1 - f)) + B^2 (1 - f)^2 sum p^2, which may be B / min_effective_share.
    largest = (math.inf if min_effective_share == 0 else 1 / min_effective_share) - floor * (2 - floor)
    bound = largest / (samples * (1 - floor) ** 2)
    mask = None if mask is None else mask[..., None, :]

    def admissible(factors: Tensor) -> Tensor:  # [..., K] -> [..., K]
        shares = torch.exp(scaled[..., None, :] * factors[..., :, None])  # times their sum
        shares = shares if mask is None else shares * mask
        return shares.square().sum(-1) <= bound * shares.sum(-1).square()

    whole = torch.ones_like(scaled[..., :1])
    unguarded = admissible(whole)
    if bool(unguarded.all()):
        return whole
    low, step = whole * SMALLEST_EXPONENT, -SMALLEST_EXPONENT
    inner = torch.arange(1, SECTIONS, device=scaled.device, dtype=scaled.dtype)
    for _ in range(ROUNDS):
        step /= SECTIONS
        good = admissible(torch.exp2(low + step * inner))  # [..., SECTIONS - 1], True up to the one sought
        low = low + step * good.long().cumprod(-1).sum(-1, keepdim=True)
    factor = torch.where(low > SMALLEST_EXPONENT, torch.exp2(low), torch.zeros_like(low))
    return torch.where(unguarded, whole, factor)


def _weights(scaled: Tensor, mask: Tensor | None, floor: float) -> Tensor:
    """B * softmax with a floor. exp * (B / sum) rather than B * softmax: equal logits give exactly 1."""
    shares = torch.exp(scaled)
    if mask is not None:
        shares = shares * mask
    samples = scaled.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    weights = shares * (samples / shares.sum(-1, keepdim=True))
    if floor:
        weights = floor + (1 - floor) * weights
        weights = weights if mask is None else weights * mask
    return weights


def _effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension."""
    return weights.sum(-1).square() / weights.square().sum(-1)
