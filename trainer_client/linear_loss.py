"""Losses straight from hidden states and the output matrix: by token and by sample, without the logits in memory.

    losses, mask = linear_token_losses(hidden, model.lm_head.weight, labels)     # any function of the losses, or none
    loss, sample_losses = weighted_linear_loss(hidden, weight, labels, weights)  # weights known before: one pass

Logits [N, V] are made, used and dropped a few tokens at a time. `linear_token_losses` makes them anew in its backward
pass; where each token's share in the loss is known beforehand, the gradients are taken beside the losses and none is
made twice. Values and gradients are those of `token_losses(hidden @ weight.T, labels)`: matrix products in the inputs'
dtype or autocast's, log-sum-exp in float32 (float64 stays).

Needs torch, knows neither models nor the service.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from trainer_client.loss import causal_labels, check_weights, dtype_name, per_sample_loss
from weighting_contract.errors import InvalidArgument

LOGITS_SHARE = 1 / 8  # of the bytes of hidden states and matrix, for a chunk's logits: a 1/16 of what is there anyway
LEAST_LOGITS_BYTES = 2**20  # below, chunks only cost calls


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of every label under logits = hidden @ weight.T + bias; nothing is shifted here.

    Differentiable once in hidden, weight and bias, as often as the graph is retained. Forward-mode and second
    derivatives (`cotangent`'s methods `jvp` and `exact`) need the logits: they are errors here. Under torch.compile it
    runs uncompiled (a graph break), since a compiler would keep the logits for the backward pass.

    Args:
        hidden: [..., d] floating.
        weight: [V, d], the output matrix, tied or not; under FSDP2 as its module sees it within the model's forward.
        labels: [...] integer token ids, as `hidden` without its last dimension; `ignore_index` marks places that are
            no real tokens.
        bias: [V] or None.
        softcap: c of logits <- c tanh(logits / c), as some models cap them.
        chunk_tokens: tokens whose logits are in memory at once; None: `default_chunk_tokens`.

    Returns:
        (losses, mask) as of `trainer_client.loss.token_losses`: [...] float32 (float64 for float64 inputs), nats, 0
        where ignored; and [...] bool, True where the token is real.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit together, labels outside the vocabulary (seen on the CPU
            only), a sharded weight, settings that are no positive numbers.
    """
    how = _checked(hidden, weight, labels, bias, ignore_index, softcap, chunk_tokens)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    losses: Tensor = _token_losses(flat, weight, bias, ids, how)
    return losses.view(labels.shape), labels != ignore_index


def causal_linear_token_losses(
    hidden: Tensor, weight: Tensor, ids: Tensor, lengths: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Losses of next-token prediction: `hidden` is of `ids[:, :-1]`, the labels are `ids[:, 1:]`.

        hidden = model.model(ids[:, :-1]).last_hidden_state
        losses, mask = causal_linear_token_losses(hidden, model.lm_head.weight, ids, lengths)

    Args:
        hidden: [B, T, d].
        ids: [B, T+1] integer token ids, rows padded on the right with any id.
        lengths: [B] integer, real ids of each row; None: T+1.
        settings: bias, softcap, chunk_tokens of `linear_token_losses`.

    Returns and Raises: as of `linear_token_losses`, T places a sample.
    """
    if hidden.ndim != 3 or ids.ndim != 2 or ids.shape != (hidden.shape[0], hidden.shape[1] + 1):
        raise InvalidArgument(
            f"ids have shape {list(ids.shape)} and hidden {list(hidden.shape)}, expected [B, T+1] and [B, T, d]: "
            "the hidden states of ids[:, :-1]"
        )
    return linear_token_losses(hidden, weight, causal_labels(ids, lengths), **settings)


def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """L = (1/B) sum_i w_i l_i with l_i the mean loss of a sample's real tokens, in one pass over the logits.

    Equal to `weighted_loss(per_sample_loss(*linear_token_losses(...)), weights)`, at two thirds of its cost.

    Args:
        hidden: [B, T, d].
        labels: [B, T].
        weights: [B] finite, 0 or more; on any device.
        weight, ignore_index, settings: as of `linear_token_losses`.

    Returns:
        (loss, sample_losses): the scalar to call backward on; and [B], detached.

    Raises:
        InvalidArgument: as of `linear_token_losses` and `trainer_client.loss.weighted_loss`.
    """
    if labels.ndim != 2 or not len(labels):
        raise InvalidArgument(f"labels have shape {list(labels.shape)}, expected [B, T] with B of 1 or more")
    check_weights(weights, len(labels))
    mask = labels != ignore_index
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shares = weights.to(labels.device, wide) / (len(labels) * mask.sum(1).clamp(min=1))
    loss, losses = weighted_token_sum(
        hidden, weight, labels, shares[:, None].expand(labels.shape), ignore_index=ignore_index, **settings
    )
    return loss, per_sample_loss(losses, mask)


def weighted_token_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_t a_t l_t in one pass over the logits, with a [...] as the labels: each token's share in the loss.

    For losses that are no means over rows, such as those of packed documents (`packed.document_token_weights`).
    The gradients are taken in the forward pass and handed over by `backward`; a second one through a retained graph
    computes them anew. In float16, whose range the small shares would leave before a loss scaler meets them, the
    logits are made twice.

    Returns:
        (sum, losses): the scalar to call backward on, differentiable in `token_weights` too; and [...], detached.

    Raises:
        InvalidArgument: as of `linear_token_losses`, or token_weights of another shape than the labels.
    """
    how = _checked(hidden, weight, labels, bias, ignore_index, softcap, chunk_tokens)
    if token_weights.shape != labels.shape:
        raise InvalidArgument(
            f"token_weights have shape {list(token_weights.shape)}, expected {list(labels.shape)} as the labels"
        )
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    shares = token_weights.reshape(-1).to(hidden.device, how.wide)
    if how.dtype == torch.float16:
        losses: Tensor = _token_losses(flat, weight, bias, ids, how)
        total = (shares * losses).sum()
    else:
        total, losses = _weighted_sum(flat, weight, bias, ids, shares, how)
    return total, losses.detach().view(labels.shape)


def default_chunk_tokens(hidden: Tensor, weight: Tensor) -> int:
    """Tokens a chunk: as many as keep its logits at `LOGITS_SHARE` of the bytes of hidden states and matrix.

    With their gradients these take twice their own bytes whatever the loss does, so the chunks add little to them and
    are still as large as that allows: matrix products of a few tokens waste the device.
    """
    held = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    a_token = len(weight) * max(4, hidden.element_size())
    return max(1, int(max(held * LOGITS_SHARE, LEAST_LOGITS_BYTES) // a_token))


# ---- Autograd --------------------------------------------------------------------------------------------------------

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight, bias; None: not asked for


@dataclass(frozen=True)
class _How:
    """What a pass needs beside its tensors."""

    dtype: torch.dtype  # of the matrix products
    wide: torch.dtype  # of the losses
    ignore_index: int
    softcap: float | None
    chunk_tokens: int


class _TokenLosses(torch.autograd.Function):
    """(hidden [N, d], weight [V, d], bias [V], labels [N]) -> losses [N]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.how = how
        return _pass(hidden, weight, bias, labels, how)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _check_first_derivative()
        hidden, weight, bias, labels = ctx.saved_tensors
        _, gradients = _pass(hidden, weight, bias, labels, ctx.how, upstream, ctx.needs_input_grad[:3])
        return (*gradients, None, None)


class _WeightedSum(torch.autograd.Function):
    """(hidden, weight, bias, labels, shares [N]) -> (sum of shares times losses, losses [N])."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shares: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        losses, ctx.gradients = _pass(hidden, weight, bias, labels, how, shares, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, labels, shares, losses)
        ctx.mark_non_differentiable(losses)
        ctx.how = how
        return (shares * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _check_first_derivative()
        hidden, weight, bias, labels, shares, losses = ctx.saved_tensors
        # Scaled in place, so that there is one copy of them; the caller owns them then, and may have changed them.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _pass(hidden, weight, bias, labels, ctx.how, shares, ctx.needs_input_grad[:3])
        scaled = (None if g is None else g.mul_(upstream) for g in gradients)
        return (*scaled, None, upstream * losses if ctx.needs_input_grad[4] else None, None)


def _check_first_derivative() -> None:
    # torch's once_differentiable lets a constant upstream gradient through, and what follows misses terms unnoticed.
    if torch.is_grad_enabled():
        raise InvalidArgument(
            "a loss without logits has no second derivatives (create_graph=True, cotangent's method 'exact'); expected "
            "one backward pass, or the loss of logits: trainer_client.loss.token_losses(hidden @ weight.T, labels)"
        )


# A compiler would see the logits of the forward pass in the backward pass and keep them. (torch's own lazy spelling
# of torch.compiler.disable, which would import the compiler with this module.)
@_disable_dynamo
def _token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _How) -> Any:
    return _TokenLosses.apply(hidden, weight, bias, labels, how)  # type: ignore[no-untyped-call]


@_disable_dynamo
def _weighted_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shares: Tensor, how: _How
) -> Any:
    if not torch.is_grad_enabled():  # needs_input_grad does not know
        losses, _ = _pass(hidden, weight, bias, labels, how)
        return (shares * losses).sum(), losses
    return _WeightedSum.apply(hidden, weight, bias, labels, shares, how)  # type: ignore[no-untyped-call]


# ---- Passes over the chunks ------------------------------------------------------------------------------------------


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    how: _How,
    shares: Tensor | None = None,
    wanted: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, _Gradients]:
    """(losses [N], gradients of sum_t shares_t l_t that are wanted)."""
    gradients = (
        torch.empty_like(hidden) if wanted[0] else None,
        torch.zeros_like(weight) if wanted[1] else None,
        torch.zeros_like(bias) if wanted[2] and bias is not None else None,
    )
    losses = torch.empty(len(hidden), dtype=how.wide, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(how.dtype)
        for start in range(0, len(hidden), how.chunk_tokens):
            part = slice(start, start + how.chunk_tokens)
            inputs = hidden[part].to(how.dtype)
            losses[part], slopes = _chunk(
                inputs, matrix, bias, labels[part], how, shares[part] if shares is not None and any(wanted) else None
            )
            if slopes is not None:
                _add_gradients(gradients, part, inputs, matrix, slopes)
            del slopes  # before the next chunk's logits are made
    return losses, gradients


def _chunk(
    inputs: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, how: _How, shares: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(losses [n], shares times dl/dlogits [n, V] or None) of a few tokens, in one buffer of logits."""
    logits = F.linear(inputs, matrix, None if bias is None else bias.to(how.dtype)).to(how.wide)
    tanh = None
    if how.softcap is not None:
        tanh = logits.div_(how.softcap).tanh_()
        logits = tanh * how.softcap
    real = labels != how.ignore_index
    places = torch.where(real, labels, 0)[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    at_label = logits.gather(1, places).squeeze(1)
    exps = logits.exp_()
    total = exps.sum(1)
    losses = torch.where(real, total.log() - at_label, 0.0)
    if shares is None:
        return losses, None
    shares = torch.where(real, shares, 0.0)
    slopes = exps.mul_((shares / total)[:, None])  # softmax, minus 1 at the label
    slopes.scatter_add_(1, places, -shares[:, None])
    if tanh is not None:
        slopes.mul_(tanh.square_().neg_().add_(1))
    return losses, slopes


def _add_gradients(gradients: _Gradients, part: slice, inputs: Tensor, matrix: Tensor, slopes: Tensor) -> None:
    """What a chunk adds; over the chunks gradients add up in the dtype of what they are of."""
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias.add_(slopes.sum(0))
    slopes = slopes.to(inputs.dtype)
    if of_hidden is not None:
        of_hidden[part] = slopes @ matrix
    if of_weight is not None:
        if of_weight.dtype == inputs.dtype:
            of_weight.addmm_(slopes.T, inputs)
        else:
            of_weight.add_(slopes.T @ inputs)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_tokens: int | None,
) -> _How:
    if hasattr(weight, "placements"):
        raise InvalidArgument(
            "weight is a sharded DTensor, expected the whole output matrix: compute the loss within the model's "
            "forward, where FSDP2 has gathered it"
        )
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise InvalidArgument(
            f"hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}, expected [..., d] and [V, d]"
        )
    if labels.shape != hidden.shape[:-1]:
        raise InvalidArgument(
            f"labels have shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}: one for each hidden state"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InvalidArgument(f"labels are {dtype_name(labels.dtype)}, expected integer token ids")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidArgument(
            f"bias has shape {list(bias.shape)}, expected [{len(weight)}]: one for each row of weight"
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise InvalidArgument(f"softcap is {softcap}, expected a finite number above 0, or None for no cap")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InvalidArgument(f"chunk_tokens is {chunk_tokens}, expected 1 or more, or None")
    _check_range(labels, ignore_index, len(weight))
    dtype = _product_dtype(hidden, weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return _How(dtype, wide, ignore_index, softcap, chunk_tokens or default_chunk_tokens(hidden, weight))


def _check_range(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    if labels.device.type != "cpu":
        return  # looking would wait for the device, which checks by itself
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(wrong.any()):
        raise InvalidArgument(
            f"labels hold the id {int(labels[wrong][0])}, expected 0 to {vocabulary - 1} (the rows of weight) or "
            f"ignore_index ({ignore_index})"
        )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What `hidden @ weight.T` is computed in: autocast's dtype, which leaves float64 alone, or that of both."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise InvalidArgument(
            f"hidden is {dtype_name(hidden.dtype)} and weight {dtype_name(weight.dtype)}, expected one "
            "floating dtype; convert one of them, or compute under torch.autocast"
        )
    return hidden.dtype
