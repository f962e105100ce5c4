"""Losses of a causal language model by token and by sample, and the loss that a trainer minimises.

Needs torch, knows no service. Everything is reduced in float32 (float64 stays), whatever the model computes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weighting_contract.errors import InvalidArgument


def token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of every label under the logits at the same place; nothing is shifted here.

    Args:
        logits: [B, T, V] floating.
        labels: [B, T] integer token ids; `ignore_index` marks places that are no real tokens.

    Returns:
        (losses, mask): [B, T] float32 (float64 for float64 logits), nats, 0 where ignored; and [B, T] bool, True where
        the token is real.

    Raises:
        InvalidArgument: shapes that do not fit together, labels that are no integers or lie outside the vocabulary
            (seen on the CPU only: CUDA reports it as a device-side assertion).
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InvalidArgument(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}, expected [B, T, V] and [B, T]"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InvalidArgument(f"labels are {dtype_name(labels.dtype)}, expected integer token ids")
    labels = labels.long()
    try:
        flat = F.cross_entropy(
            wide(logits).flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none"
        )
    except IndexError as exc:
        raise InvalidArgument(
            f"labels hold ids from {int(labels.min())} to {int(labels.max())}, expected 0 to {logits.shape[2] - 1} "
            f"(the logits' vocabulary) or ignore_index ({ignore_index})"
        ) from exc
    return flat.view(labels.shape), labels != ignore_index


def causal_token_losses(logits: Tensor, ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Losses of next-token prediction: the model read `ids[:, :-1]`, the labels are `ids[:, 1:]`.

        losses, mask = causal_token_losses(model(ids[:, :-1]).logits, ids)

    Args:
        logits: [B, T, V], the model's output for `ids[:, :-1]`.
        ids: [B, T+1] integer token ids, rows padded on the right with any id.
        lengths: [B] integer, real ids of each row; None: T+1.

    Returns:
        (losses, mask) as of `token_losses`, T places a sample.

    Raises:
        InvalidArgument: shapes that do not fit together, and as of `token_losses`.
    """
    if logits.ndim != 3 or ids.ndim != 2 or ids.shape != (logits.shape[0], logits.shape[1] + 1):
        raise InvalidArgument(
            f"ids have shape {list(ids.shape)} and logits {list(logits.shape)}, expected [B, T+1] and [B, T, V]: "
            "the logits of ids[:, :-1]"
        )
    return token_losses(logits, causal_labels(ids, lengths))


def causal_labels(ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Labels of next-token prediction, [B, T] int64: `ids[:, 1:]`, and -100 beyond a row's real ids.

    Args:
        ids: [B, T+1] integer token ids, rows padded on the right with any id.
        lengths: [B] integer, real ids of each row; None: T+1.

    Raises:
        InvalidArgument: lengths of another batch.
    """
    labels = ids[:, 1:].long()
    if lengths is None:
        return labels
    if lengths.shape != ids.shape[:1]:
        raise InvalidArgument(f"lengths have shape {list(lengths.shape)}, expected [{len(ids)}], one for each sample")
    places = torch.arange(1, ids.shape[1], device=ids.device)
    return labels.masked_fill(places >= lengths.to(ids.device)[:, None], -100)


def per_sample_loss(token_losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean loss of each sample's real tokens, [B] float32 (float64 stays); 0 for a sample that has none.

    Args:
        token_losses: [B, T] nats.
        mask: [B, T] bool, True where a token is real; None: everywhere.

    Raises:
        InvalidArgument: shapes that do not fit together.
    """
    check_not_reduced(token_losses, "token_losses")
    if token_losses.ndim != 2:
        raise InvalidArgument(f"token_losses have shape {list(token_losses.shape)}, expected [B, T]")
    if mask is None:
        mask = torch.ones_like(token_losses, dtype=torch.bool)
    if mask.shape != token_losses.shape or mask.dtype != torch.bool:
        raise InvalidArgument(
            f"mask is {dtype_name(mask.dtype)} of shape {list(mask.shape)}, "
            f"expected bool of the shape of token_losses, {list(token_losses.shape)}"
        )
    return torch.where(mask, wide(token_losses), 0.0).sum(1) / mask.sum(1).clamp(min=1)


def weighted_loss(sample_losses: Tensor, weights: Tensor) -> Tensor:
    """L = (1/B) sum_i w_i l_i, the scalar that the trainer minimises (Yu et al. 2025, arXiv 2507.16178).

    Weights of mean 1 keep the scale of the unweighted mean, and so the learning rate that was tuned for it.

    Args:
        sample_losses: [B] from `per_sample_loss`.
        weights: [B] finite, 0 or more, or [1] for all samples; on any device.

    Raises:
        InvalidArgument: other shapes, or weights that are negative or not finite.
    """
    check_not_reduced(sample_losses, "sample_losses")
    if sample_losses.ndim != 1 or not len(sample_losses):
        raise InvalidArgument(f"sample_losses have shape {list(sample_losses.shape)}, expected [B] with B of 1 or more")
    check_weights(weights, len(sample_losses))
    return (weights.to(sample_losses) * sample_losses).sum() / len(sample_losses)


def check_weights(weights: Tensor, samples: int) -> None:
    """InvalidArgument unless weights are [samples], or [1] for all of them, finite and 0 or more."""
    if weights.shape not in ((samples,), (1,)):
        raise InvalidArgument(
            f"weights have shape {list(weights.shape)}, expected [{samples}]: one for each of the sample_losses"
        )
    if not samples:
        return
    least, most = map(float, torch.aminmax(weights.detach()))  # NaN where one is NaN
    if not 0 <= least <= most < float("inf"):
        sample = int((~(weights.isfinite() & (weights >= 0))).nonzero()[0])
        raise InvalidArgument(f"weights[{sample}] is {float(weights[sample])}, expected finite values of 0 or more")


def check_not_reduced(losses: Tensor, what: str) -> None:
    """InvalidArgument for a single number where losses by token or by sample are expected."""
    if losses.ndim == 0:
        raise InvalidArgument(
            f"{what} is one number for the whole batch (shape []), as models return that are given labels; expected "
            "losses that keep the samples apart. Call the model without labels and use "
            "per_sample_loss(*token_losses(logits, labels)), or without logits in memory "
            "per_sample_loss(*linear_token_losses(hidden, weight, labels))"
        )


def wide(values: Tensor) -> Tensor:
    """In what losses are reduced in: float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def dtype_name(dtype: torch.dtype) -> str:
    """As messages spell it: float32."""
    return str(dtype).removeprefix("torch.")
