"""The causal LM that a run pretrains: Llama size presets, or a transformers model by folder or name.

Knows nothing of data, weights or the service. Weights are read from safetensors, never from pickles; code of a
model's own is never run.
"""

from __future__ import annotations

import json
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

from weighting_contract.building import ONE_AT_A_TIME
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
    "pico": Size(16, 1, 4, 48),  # 0.02 M, for references
    "tiny": Size(32, 1, 4, 96),  # 0.05 M
    "nano": Size(64, 2, 4, 192),  # 0.17 M
    "micro": Size(128, 4, 4, 384),  # 0.98 M
    "small": Size(256, 4, 8, 688),  # 3.4 M
    "base": Size(512, 8, 8, 1344),  # 25 M
    "large": Size(896, 12, 14, 2624),  # 124 M
}


def build_model(name: str, vocab_size: int, seq_len: int, seed: int) -> PreTrainedModel:
    """A causal LM in float32 on the CPU, in training mode, without a key-value cache.

    Args:
        name: a preset (`SIZES`); a folder with config.json and safetensors, whose weights are loaded; a folder or file
            of a config alone, whose model is freshly initialised; or the name of a model on the hub.
        vocab_size: of the tokenizer. A preset takes it; a loaded model must have as many or more.
        seq_len: tokens a sample.
        seed: of the initial parameters; the global random state is left as it was.

    Raises:
        InvalidArgument: nothing of this name, unreadable, not causal, or too small for vocab_size or seq_len.
    """
    if name in SIZES:
        return _fresh(llama_config(SIZES[name], vocab_size, seq_len), seed)
    local = os.path.exists(name)
    config = _read_config(name) if local else _hub_config(name)
    _check_fits(config, name, vocab_size, seq_len)
    with ONE_AT_A_TIME, _seeded(seed), no_progress_bar():  # a checkpoint may lack parts, which are then initialised
        try:
            model = _load(name, config, local)
        except InvalidArgument:
            raise
        except Exception as exc:  # damaged or foreign files: transformers raises many kinds
            raise InvalidArgument(f"model {name} can't be loaded: {_first_line(exc)}") from exc
    _check_causal(model, name, vocab_size, seq_len)
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


def count_config_parameters(config: bytes) -> int:
    """Trainable parameters of the model that a config.json of transformers describes, without making any.

    Raises:
        InvalidArgument: the bytes are no config of a causal LM.
    """
    try:
        values: dict[str, Any] = json.loads(config)
        described = AutoConfig.for_model(values.pop("model_type"), **values)
        with ONE_AT_A_TIME, torch.device("meta"):
            return count_parameters(_auto_model.from_config(described, trust_remote_code=False))
    except Exception as exc:  # not JSON, unknown model type, values of the wrong kind
        raise InvalidArgument(f"config.json is not the config of a causal LM: {_first_line(exc)}") from exc


def _fresh(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with ONE_AT_A_TIME, _seeded(seed):
        model: PreTrainedModel = _auto_model.from_config(config, dtype=torch.float32)
    model.train()
    return model


def _load(name: str, config: PretrainedConfig, local: bool) -> PreTrainedModel:
    model: PreTrainedModel
    if local and not _has_weights(Path(name)):
        model = _auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
    else:
        model = _auto_model.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model


def _read_config(path: str) -> PretrainedConfig:
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise InvalidArgument(f"model {path!r} is a folder without a config.json of transformers")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # not JSON, unknown model type, values of the wrong kind
        raise InvalidArgument(f"the config of {path} can't be read: {_first_line(exc)}") from exc
    config.use_cache = False
    return config


def _hub_config(name: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as exc:  # no such name, no network, a model with code of its own
        raise InvalidArgument(
            f"model {name!r} is neither a size ({', '.join(SIZES)}), nor a folder with a config.json of "
            f"transformers, nor a model that could be loaded from the hub: {_first_line(exc)}"
        ) from exc
    config.use_cache = False
    return config


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0] or type(exc).__name__


def _check_causal(model: PreTrainedModel, name: str, vocab_size: int, seq_len: int) -> None:
    """Another last token must leave the logits before it as they are, up to rounding."""
    tokens = torch.arange(min(seq_len, 4)).remainder(vocab_size).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocab_size
    model.train(False)
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[:, :-1]
    except Exception as exc:  # a model that wants more than token ids
        raise InvalidArgument(f"model {name} can't be run on token ids alone: {_first_line(exc)}") from exc
    if (logits[0] - logits[1]).abs().sum() > 1e-4 * logits.abs().sum():
        raise InvalidArgument(f"model {name} is not causal, its tokens see those after them: name a causal LM")


def _check_fits(config: PretrainedConfig, name: str, vocab_size: int, seq_len: int) -> None:
    known_tokens = getattr(config, "vocab_size", None)
    if known_tokens is not None and known_tokens < vocab_size:
        raise InvalidArgument(
            f"model {name} knows {known_tokens} tokens, but the tokenizer has {vocab_size}: "
            "give the model's own with --tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise InvalidArgument(f"model {name} takes at most {positions} tokens a sample, but --seq-len is {seq_len}")


def _has_weights(folder: Path) -> bool:
    """False for a folder or file of a config alone."""
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
