"""Weighbridge in a training loop of one's own: what it adds to a plain loop in torch are the five lines marked (n).

    python examples/own_loop.py                            # the weighter lives in this process
    python examples/own_loop.py grpc://localhost:50051     # or in a service: python -m weighting_service

The model is anything that maps token ids [B, T] to logits [B, T, V]; the data here are bytes, half of them noise.
"""

from __future__ import annotations

import argparse
import inspect
import random

import torch

from trainer_client import connect
from trainer_client.features import FEATURE_NAMES, batch_features
from trainer_client.hypergradient import cotangent
from trainer_client.loss import causal_token_losses, per_sample_loss, weighted_loss
from weighting_contract.statistics import unigram_nll_table

VOCABULARY, TOKENS, BATCH, LEARNING_RATE = 256, 32, 16, 3e-3


class OwnModel(torch.nn.Module):
    """A small recurrent language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 48)
        self.rnn = torch.nn.GRU(48, 96, batch_first=True)
        self.head = torch.nn.Linear(96, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.embed(ids))
        logits: torch.Tensor = self.head(states)
        return logits


def own_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T+1] training samples, the second half noise, and [M, T+1] validation samples of what we care about."""
    text = inspect.getsource(argparse).encode()
    windows = [list(text[i : i + TOKENS + 1]) for i in range(0, len(text) - TOKENS - 1, TOKENS)]
    rng = random.Random(seed)
    rng.shuffle(windows)
    validation, wanted = windows[:64], windows[64:]
    noise = [[rng.randrange(32, 127) for _ in range(TOKENS + 1)] for _ in wanted]
    return torch.tensor(wanted + noise), torch.tensor(validation)


def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] losses of next-token prediction."""
    return causal_token_losses(model(ids[:, :-1]), ids)[0]


def sample_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B] mean loss of each sample."""
    return per_sample_loss(token_losses(model, ids))


def train(url: str, steps: int, seed: int = 0) -> float:
    """Trains; the mean weight of the noise over the last quarter of the steps (1: the weighter learned nothing)."""
    torch.manual_seed(seed)
    train_ids, val_ids = own_data(seed)
    is_noise = torch.arange(len(train_ids)) >= len(train_ids) // 2
    unigram_nll = unigram_nll_table(torch.bincount(train_ids.flatten(), minlength=VOCABULARY))
    model = OwnModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    spec = {"features": {"names": list(FEATURE_NAMES)}}
    noise_weights: list[torch.Tensor] = []

    with connect(url) as client, client.open_job(weighter="own-loop", spec=spec) as job:  # (1)
        for step in range(steps):
            chosen = torch.randint(len(train_ids), (BATCH,))
            ids = train_ids[chosen]
            losses = token_losses(model, ids)
            features = batch_features(losses, unigram_nll[ids[:, 1:]])  # (2)
            scores = job.score(features, step)  # (3)
            loss = weighted_loss(per_sample_loss(losses), scores.weights)  # (4) instead of losses.mean()
            optimizer.zero_grad()
            loss.backward()
            if step % 2 == 0:
                validation = val_ids[torch.randint(len(val_ids), (BATCH,))]
                towards = cotangent(model, sample_losses, ids, validation, learning_rate=LEARNING_RATE)
                job.meta_update(towards, features, step)  # (5)
            optimizer.step()
            noise_weights.append(scores.weights[is_noise[chosen]])
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}, effective samples {scores.effective_sample_size:.1f}")
    return float(torch.cat(noise_weights[-steps // 4 :]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Weighbridge in a training loop of one's own.")
    parser.add_argument(
        "weighter", nargs="?", default="embedded", help="embedded, grpc://HOST:PORT or http://HOST:PORT"
    )
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps (default: 80)")
    arguments = parser.parse_args()
    mean = train(arguments.weighter, arguments.steps)
    print(f"mean weight of the noise over the last quarter of the steps: {mean:.2f} (uniform: 1)")


if __name__ == "__main__":
    main()
