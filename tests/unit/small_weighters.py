"""Specs of small weighters, with and without a token encoder, and inputs for them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch

from weighting_contract.spec import FeatureSpec, HeadSpec, TokenSpec, WeighterSpec
from weighting_service.domain import Inputs

CPU = torch.device("cpu")
ENCODER = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
FEATURES = WeighterSpec(features=FeatureSpec(names=("a", "b", "c"), hidden_size=2), head=HeadSpec(width=8), seed=1)
TOKENS = replace(FEATURES, tokens=TokenSpec(encoder_config=json.dumps(ENCODER), max_tokens=16))
SPECS = {"features": FEATURES, "tokens": TOKENS}


def inputs_of(spec: WeighterSpec, seed: int, samples: int = 10) -> Inputs:
    rng = np.random.default_rng(seed)
    tokens = lengths = None
    if spec.tokens:
        tokens, lengths = rng.integers(0, 50, (samples, 9)), rng.integers(1, 10, samples)
    return Inputs(
        rng.normal(size=(samples, 3)).astype(np.float32),
        rng.normal(size=(samples, 2)).astype(np.float32),
        tokens,
        lengths,
    )
