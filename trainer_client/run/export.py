"""The trained model in a folder of its own, as transformers knows it. Knows checkpoints, not how they came about."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer_client.run import checkpoint
from trainer_client.run.models import no_progress_bar

_fast: Any = PreTrainedTokenizerFast  # transformers is typed in parts only


def trained_model(model: PreTrainedModel, checkpoints: Path) -> PreTrainedModel:
    """A copy of `model` on the CPU with the parameters of the newest checkpoint.

    A checkpoint is whole however many ranks have trained it, so one process alone can do this.

    Raises:
        InvalidArgument: there is none that can be read, or it is another model's.
    """
    trained = copy.deepcopy(model).cpu()
    checkpoint.load_model(checkpoints, trained)
    trained.train(False)
    return trained


def export_model(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    """Writes model and tokenizer, whole or not at all; AutoModelForCausalLM and AutoTokenizer read the folder.

    Without generation settings: the documents of a run have no special tokens that these could be about.

    Args:
        tokenizer: a tokenizer.json.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    cached, model.config.use_cache = model.config.use_cache, True  # off in training only
    try:
        with no_progress_bar():
            model.save_pretrained(partial)
    finally:
        model.config.use_cache = cached
    (partial / "generation_config.json").unlink(missing_ok=True)
    fast_tokenizer(tokenizer).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    return partial.replace(folder)


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.json, as transformers wraps it; without special tokens."""
    wrapped: PreTrainedTokenizerFast = _fast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
    return wrapped
