"""Attention across the samples of a batch, with a gradient that is the same at every replay and cheap on a CPU.

Pure tensor functions; knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def attention(
    q: Tensor,  # [J, heads, d, B]
    k: Tensor,  # [J, heads, d, B]
    v: Tensor,  # [J, heads, d, B]
    mask: Tensor | None = None,  # [J, B] bool, True for a sample that may be looked at
) -> Tensor:
    """softmax(q^T k / sqrt(d)) over the samples, applied to v: [J, heads, d, B]."""
    keys = None if mask is None else mask[:, None, None, :]
    if torch.is_grad_enabled():
        attended: Tensor = _Attention.apply(q, k, v, keys)  # type: ignore[no-untyped-call]
        return attended
    q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(-1, -2)


class _Attention(torch.autograd.Function):
    """Spelled out: fused kernels have backward passes that aren't reproducible on CUDA, and a replay must be.

    Every product has its few channels (d) as rows: a product of as few columns takes four times as long on a CPU, and
    autograd's own derivative has some, and copies a matrix of [B, B] to get them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        scores = (q * q.shape[-2] ** -0.5).transpose(-1, -2) @ k  # [J, heads, B, B]
        shares = (scores if keys is None else scores.masked_fill(~keys, -torch.inf)).softmax(-1)
        attended: Tensor = v @ shares.transpose(-1, -2)
        ctx.save_for_backward(q, k, v, shares, attended)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, shares, attended = ctx.saved_tensors
        # Of the shares p, then of the scores: p (g - sum of p g); the sum over samples is one over channels, too.
        sums = (gradient * attended).sum(-2)[..., None]  # [J, heads, B, 1]
        scores = (gradient.transpose(-1, -2) @ v).sub_(sums).mul_(shares)
        scale = q.shape[-2] ** -0.5
        return (k @ scores.transpose(-1, -2)).mul_(scale), (q @ scores).mul_(scale), gradient @ shares, None
