"""Small references with random parameters, as files, for the tests of the service's reference models."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer_client.run.models import no_progress_bar
from trainer_client.run.tokenizer import train_tokenizer
from weighting_contract.counted import count_bi_and_trigrams
from weighting_contract.reference import Counts, build_reference

VOCABULARY, SEQ_LEN, BUCKETS = 300, 24, 1 << 10
TEXTS = ["the weights of a batch say how much each sample counts", "1, 2, 3; 4, 5, 6", "def loss(w): return w * 2"] * 9

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY + 20,  # padded, as embeddings often are
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": SEQ_LEN,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@cache
def tokenizer_json() -> bytes:
    """Of a byte-pair tokenizer with exactly VOCABULARY tokens."""
    tokenizer = train_tokenizer(TEXTS, VOCABULARY)
    assert tokenizer.vocab_size == VOCABULARY
    return tokenizer.to_json().encode()


def causal_model(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()


def reference(causal: dict[str, Any] = LLAMA, seed: int = 0, **changed: Any) -> dict[str, bytes]:
    """The files of a reference; `changed` replaces arguments of `build_reference`."""
    with tempfile.TemporaryDirectory() as folder, no_progress_bar():
        causal_model(causal, seed).save_pretrained(folder)
        model = {name: (Path(folder) / file).read_bytes() for name, file in MODEL_FILES.items()}
    arguments: dict[str, Any] = {
        **model,
        "tokenizer": tokenizer_json(),
        "counts": counts(),
        "seq_len": SEQ_LEN,
        "trained_on": "nothing",
        "command": "none",
        "steps": 0,
        "loss": 5.7,
    }
    return build_reference(**{**arguments, **changed})


def counted_reference(seed: int = 0) -> dict[str, bytes]:
    """The files of a reference without a model."""
    pool = np.random.default_rng(seed).integers(0, VOCABULARY, (50, SEQ_LEN + 1))
    tables = replace(counts(seed=seed), bi_and_trigrams=count_bi_and_trigrams(pool))
    return reference(config=None, model=None, counts=tables)


MODEL_FILES = {"config": "config.json", "model": "model.safetensors"}


def counts(vocabulary: int = VOCABULARY, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    return Counts(rng.integers(0, 1000, vocabulary), rng.integers(0, 50, BUCKETS))


def random_rows(seed: int, count: int, longest: int = SEQ_LEN + 1) -> list[np.ndarray]:
    """Samples of 2 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(2, longest + 1)) for _ in range(count)]
