"""Losses of a causal LM of transformers on windows of token ids: the one place that calls the model."""

from __future__ import annotations

import torch

from trainer_client.loss import causal_token_losses, per_sample_loss, wide


def read(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [B, T, V], token losses [B, T], nats) of each token but the first, float32; tokens [B, T+1], all real."""
    logits = wide(model(tokens[:, :-1]).logits)
    losses, _ = causal_token_losses(logits, tokens)
    return logits, losses


def token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The losses of `read` alone."""
    return read(model, tokens)[1]


def sample_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[B] mean token NLL of each sample."""
    return per_sample_loss(token_losses(model, tokens))
