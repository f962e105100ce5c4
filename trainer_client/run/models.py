"""The causal LM that a run pretrains: Llama size presets, or a folder of a transformers model.

Knows nothing of data, weights or the service. Local files only; weights are read from safetensors, never from pickles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from weighting_contract.errors import InvalidArgument

_auto_model: Any = AutoModelForCausalLM  # transformers is typed in parts only
_transformers_logging: Any = transformers_logging


@dataclass(frozen=True)
class Size:
    """Shape of a Llama with tied embeddings; parameters in millions are for a vocabulary of 1,024."""

    hidden: int
    layers: int
    attention_heads: int
    feed_forward: int


SIZES = {
    "tiny": Size(32, 1, 4, 96),  # 0.05 M, for references
    "nano": Size(64, 2, 4, 192),  # 0.17 M
    "micro": Size(128, 4, 4, 384),  # 0.98 M
    "small": Size(256, 4, 8, 688),  # 3.4 M
    "base": Size(512, 8, 8, 1344),  # 25 M
    "large": Size(896, 12, 14, 2624),  # 124 M
}


def build_model(size_or_path: str, vocab_size: int, seq_len: int, seed: int) -> PreTrainedModel:
    """A model in float32 on the CPU, in training mode, without a key-value cache.

    Args:
        size_or_path: a preset (`SIZES`); a folder with config.json and safetensors, whose weights are loaded; or a
            folder or file of a config alone, whose model is freshly initialised.
        vocab_size: of the tokenizer. A preset takes it; a loaded model must have as many or more.
        seq_len: tokens a sample.
        seed: of the initial parameters; the global random state is left as it was.

    Raises:
        InvalidArgument: neither preset nor folder, unreadable, or too small for vocab_size or seq_len.
    """
    if size_or_path in SIZES:
        return _fresh(llama_config(SIZES[size_or_path], vocab_size, seq_len), seed)
    path = Path(size_or_path)
    config = _read_config(path)
    _check_fits(config, size_or_path, vocab_size, seq_len)
    if not path.is_dir() or not _has_weights(path):
        return _fresh(config, seed)
    with _seeded(seed), no_progress_bar():  # a checkpoint may lack parts, which are then initialised
        try:
            model: PreTrainedModel = _auto_model.from_pretrained(
                str(path), config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except Exception as exc:  # damaged or foreign files: transformers raises many kinds
            raise InvalidArgument(f"the model in {path} can't be loaded: {exc}") from exc
    model.train()
    return model


def llama_config(size: Size, vocab_size: int, seq_len: int) -> LlamaConfig:
    """The preset as a transformers config, without special tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.attention_heads,
        num_key_value_heads=size.attention_heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _fresh(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with _seeded(seed):
        model: PreTrainedModel = _auto_model.from_config(config, dtype=torch.float32)
    model.train()
    return model


def _read_config(path: Path) -> PretrainedConfig:
    if not os.path.exists(path) or (path.is_dir() and not (path / "config.json").exists()):
        raise InvalidArgument(
            f"model {str(path)!r} is neither a size ({', '.join(SIZES)}) "
            "nor a folder with a config.json of transformers"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as exc:  # not JSON, unknown model type, values of the wrong kind
        raise InvalidArgument(f"the config of {path} can't be read: {exc}") from exc
    config.use_cache = False
    return config


def _check_fits(config: PretrainedConfig, name: str, vocab_size: int, seq_len: int) -> None:
    known_tokens = getattr(config, "vocab_size", None)
    if known_tokens is not None and known_tokens < vocab_size:
        raise InvalidArgument(
            f"model {name} knows {known_tokens} tokens, but the tokenizer has {vocab_size}: "
            "give the model's own tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise InvalidArgument(f"model {name} takes at most {positions} tokens a sample, but seq_len is {seq_len}")


def _has_weights(folder: Path) -> bool:
    if any(folder.glob("*.safetensors")):
        return True
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled:
        raise InvalidArgument(f"{pickled[0]} is a pickle, which is never loaded: convert the model to safetensors")
    return False


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Parameters made inside come from `seed`; the CPU's random state is put back after, other devices' untouched."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """The run has its own; the setting is put back after."""
    enabled = _transformers_logging.is_progress_bar_enabled()
    _transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            _transformers_logging.enable_progress_bar()
