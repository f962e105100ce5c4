"""Weights that come while the backward pass runs: it asks for them halfway through the model's output layer.

Needs torch, knows neither losses nor the service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer_client.loss import check_weights
from weighting_contract.errors import InvalidArgument


@contextmanager
def late_weights(head: nn.Module, weights: Callable[[], Tensor]) -> Iterator[None]:
    """Has the backward pass of a forward pass made within it multiply each sample's gradient by the sample's weight.

    A weight multiplies a whole sample's loss, so it may as well multiply what leaves the output layer backwards, which
    is much smaller than the logits. The backward pass through the loss and through half of the output layer needs no
    weights: they may be on their way meanwhile. After

        with late_weights(model.lm_head, lambda: pending.result().weights):
            logits = model(ids[:, :-1]).logits
        losses, mask = causal_token_losses(logits, ids)
        loss = per_sample_loss(losses, mask).mean()  # without weights
        pending = job.score_soon(batch_features(losses.detach(), ...), step)
        loss.backward()

    the parameters have the gradient of `weighted_loss(per_sample_loss(losses, mask), weights)`.

    Args:
        head: the output layer, a plain nn.Linear; its weight may be tied. All of the loss comes by its outputs, and
            what follows it keeps samples apart (such as a cap on logits). Not inside of what torch.compile compiles.
        weights: gives [B] (or [1] for all), finite, 0 or more, on any device; called once for each backward pass. What
            it raises, `backward` raises.

    Raises:
        InvalidArgument: another kind of layer; on leaving, where the layer was not called just once, with gradients
            on, for [B, ..., d]; in the backward pass as of `weighted_loss`.
    """
    if not is_plain(head):
        raise InvalidArgument(
            f"head is a {type(head).__name__}{', whose forward is replaced' if 'forward' in vars(head) else ''}, "
            "expected the model's output layer, a plain nn.Linear"
        )
    calls: list[tuple[int, ...]] = []  # shapes of the inputs

    def forward(hidden: Tensor) -> Tensor:
        calls.append(tuple(hidden.shape) if torch.is_grad_enabled() else ())
        logits: Tensor = _Head.apply(hidden, head.weight, head.bias, weights)  # type: ignore[no-untyped-call]
        return logits

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
    if len(calls) != 1 or len(calls[0]) < 2:
        raise InvalidArgument(
            f"within late_weights the output layer was called {len(calls)} times, with inputs of shape "
            f"{[list(shape) for shape in calls]} ([]: with gradients off), expected one forward pass of the model that "
            "calls it for [B, ..., d]: else no weight, or another sample's, would reach the gradient"
        )


def is_plain(head: object) -> TypeGuard[nn.Linear]:
    """Whether `late_weights` takes it."""
    return type(head) is nn.Linear and "forward" not in vars(head)


class _Head(torch.autograd.Function):
    """(hidden [B, ..., d], weight [V, d], bias [V] or None) -> logits [B, ..., V]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.weights = weights
        return F.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        slopes = upstream.flatten(0, -2)
        of_hidden = (slopes @ weight.to(slopes.dtype)).view(hidden.shape) if ctx.needs_input_grad[0] else None
        weigh = _weighing(ctx.weights(), hidden)
        of_weight = slopes.T @ weigh(hidden).to(slopes.dtype).flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_bias = None
        if ctx.needs_input_grad[2]:
            of_bias = weigh(slopes.new_ones(*hidden.shape[:-1], 1)).to(slopes.dtype).flatten() @ slopes
        return None if of_hidden is None else weigh(of_hidden).to(hidden.dtype), of_weight, of_bias, None


def _weighing(weights: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies the rows of a tensor by their weights; leaves it as it is where all weights are 1."""
    check_weights(weights, len(rows))
    if bool((weights == 1).all()):
        return lambda values: values
    return partial(torch.mul, weights.to(rows.device).view(-1, *[1] * (rows.ndim - 1)))
