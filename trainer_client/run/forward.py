"""Losses of a causal LM of transformers on windows of token ids: the one place that calls the model."""

from __future__ import annotations

import torch

from trainer_client.loss import causal_token_losses, per_sample_loss


def token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] loss of each token but the first, nats, float32; tokens [B, T+1], all real."""
    losses, _ = causal_token_losses(model(tokens[:, :-1]).logits, tokens)
    return losses


def sample_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[B] mean token NLL of each sample."""
    return per_sample_loss(token_losses(model, tokens))
