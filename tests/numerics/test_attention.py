"""Attention and its own backward pass against plain softmax attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weighting_service.weighter.attention import attention

SHAPE = (2, 3, 4, 7)  # [J, heads, d, B]
MASK = torch.arange(7)[None] < torch.tensor([7, 5])[:, None]
MASKS = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Sample by sample and head by head."""
    mixed = torch.zeros_like(q)
    for j in range(SHAPE[0]):
        seen = torch.arange(SHAPE[3]) if mask is None else mask[j].nonzero()[:, 0]
        for h in range(SHAPE[1]):
            for i in range(SHAPE[3]):
                scores = q[j, h, :, i] @ k[j, h][:, seen] / math.sqrt(SHAPE[2])
                mixed[j, h, :, i] = v[j, h][:, seen] @ torch.softmax(scores, -1)
    return mixed


@MASKS
def test_it_is_the_naive_one_with_and_without_gradients(mask: Tensor | None) -> None:
    q, k, v = inputs(1)
    expected = naive(q, k, v, mask)
    torch.testing.assert_close(attention(q, k, v, mask), expected)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, mask), expected)


@MASKS
def test_so_are_its_gradients(mask: Tensor | None) -> None:
    given = inputs(2)
    cotangent = inputs(3)[0].detach()
    ours = torch.autograd.grad(attention(*given, mask), given, cotangent)
    theirs = torch.autograd.grad(naive(*given, mask), given, cotangent)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_masked_samples_get_no_gradient_as_keys() -> None:
    q, k, v = inputs(4)
    _, k_gradient, v_gradient = torch.autograd.grad(attention(q, k, v, MASK).square().sum(), (q, k, v))
    assert bool((k_gradient[1, :, :, 5:] == 0).all())
    assert bool((v_gradient[1, :, :, 5:] == 0).all())
    assert bool((v_gradient[1, :, :, :5] != 0).any())
