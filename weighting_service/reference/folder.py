"""From a folder to a `Reference`: verified first, then loaded from safetensors, with no code but transformers' own.

One without a model is counted (`weighting_contract.counted`), and needs no transformers.

The files and their checksum are the contract's (`weighting_contract.reference`). Knows neither names of references
nor where a service keeps them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weighting_contract.building import ONE_AT_A_TIME
from weighting_contract.counted import CountedModel
from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import ReferenceInfo, check_reference, read_counts, reference_files, write_reference
from weighting_service.reference.causal import CausalModel
from weighting_service.reference.model import LanguageModel, Reference, Tokenize
from weighting_service.weighter.encoder import FORBIDDEN_KEYS

__all__ = ["load_reference", "reference_files", "write_reference"]


def load_reference(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    name: str = "",
    tokens_per_pack: int | None = None,
    cached_samples: int = 0,
) -> Reference:
    """The reference in a folder, verified, on a device, ready to score.

    Args:
        name: for specs and metrics; the folder's own by default.
        tokens_per_pack: most padded tokens of a forward pass; None: what suits the device.
        cached_samples: whose raw statistics are kept in memory, the newest ones; 0: none.

    Raises:
        InvalidArgument: one sentence about the first thing that is wrong: a missing, truncated or changed file, a
            model and a tokenizer of different vocabularies, a model that is no plain causal LM.
    """
    folder = Path(folder)
    files = reference_files(folder)
    info = check_reference(files, str(folder))
    tokenize = _tokenizer(files["tokenizer.json"], info, folder)
    counts, name = read_counts(files), name or folder.resolve().name
    model: LanguageModel
    if counts.bi_and_trigrams is None:
        trained = _model(folder, files["config.json"], info)
        model = CausalModel(trained, name, info.vocab_size, info.seq_len + 1, device)
    else:
        model = CountedModel(counts.unigrams, counts.bi_and_trigrams, device)
    return Reference(name, info, model, tokenize, counts, device, tokens_per_pack, cached_samples)


def _library(name: str) -> Any:
    """Imported when a reference is loaded: services without references work without it."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise InvalidArgument(
            f"references need {name}, which isn't installed here; install weighbridge[tokens]"
        ) from exc


def _tokenizer(content: bytes, info: ReferenceInfo, folder: Path) -> Tokenize:
    tokenizers = _library("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as exc:  # the library raises nothing narrower
        raise InvalidArgument(f"{folder}: tokenizer.json is not a tokenizer that can be read: {exc}") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size != info.vocab_size:
        raise InvalidArgument(
            f"{folder}: the tokenizer has {size} tokens, but reference.json and the counts are of {info.vocab_size}"
        )
    return lambda texts: [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _model(folder: Path, config_json: bytes, info: ReferenceInfo) -> Any:
    _check_config(config_json, folder)
    auto = _library("transformers")
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = auto.AutoConfig.from_pretrained(folder, **safe)
        _check_fits(config, info, folder)
        with ONE_AT_A_TIME, _no_progress_bar(auto):
            model, report = auto.AutoModelForCausalLM.from_pretrained(
                folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **safe
            )
    except InvalidArgument:
        raise
    except Exception as exc:  # unknown architectures, configs that do not fit the tensors: many kinds
        first = (str(exc).splitlines() or [""])[0]
        raise InvalidArgument(f"{folder}: the model can't be loaded: {type(exc).__name__}: {first}") from exc
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InvalidArgument(
            f"{folder}: model.safetensors lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}"
        )
    return model


def _check_config(content: bytes, folder: Path) -> None:
    """Raises InvalidArgument for a config that is none, or chooses what it may not: code, kernels, other weights."""
    try:
        values = json.loads(content)
    except ValueError as exc:
        raise InvalidArgument(f"{folder}: config.json is not JSON: {exc}") from exc
    forbidden = sorted(FORBIDDEN_KEYS & set(values)) if isinstance(values, dict) else []
    if forbidden:
        raise InvalidArgument(f"{folder}: config.json sets {forbidden[0]!r}, which a reference may not choose")


def _check_fits(config: Any, info: ReferenceInfo, folder: Path) -> None:
    known = getattr(config, "vocab_size", None)
    if not isinstance(known, int) or known < info.vocab_size:  # more is usual: embeddings are padded for speed
        raise InvalidArgument(
            f"{folder}: the model knows {known} tokens, but its tokenizer has {info.vocab_size}: "
            "they do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < info.seq_len:
        raise InvalidArgument(
            f"{folder}: the model takes at most {positions} tokens, but reference.json has seq_len {info.seq_len}"
        )


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    """A service has no terminal to draw on; the setting is put back after."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
