"""Makes a reference: the pool's counts and, unless these are all, a small causal LM trained on it; as one folder.

For the command line and for runs that need a reference of their own. Knows no service.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from trainer_client.loss import per_sample_loss
from trainer_client.reference.config import COUNTED, ReferenceConfig
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Document, Progress, Samples, load_corpus, load_documents, unigram_counts
from trainer_client.run.evaluate import fixed_subset, mean_loss
from trainer_client.run.forward import token_losses
from trainer_client.run.models import build_model, count_parameters, no_progress_bar
from trainer_client.run.optimiser import build_optimizer, learning_rate, optimise
from trainer_client.run.task import to_tensor
from trainer_client.run.tokenizer import Tokenizer
from weighting_contract.counted import CountedModel, count_bi_and_trigrams
from weighting_contract.ngrams import count_ngrams
from weighting_contract.reference import (
    Counts,
    ReferenceInfo,
    build_reference,
    check_free,
    check_reference,
    write_reference,
)

_LOSS_SAMPLES = 512  # of the pool, behind the loss that a reference states
_REPORT_EVERY = 10


@dataclass(frozen=True)
class MadeReference:
    """The files of a reference, and what it took."""

    files: dict[str, bytes]
    parameters: int  # 0: it is counted
    seconds: float  # of training or counting


@dataclass(frozen=True)
class SavedReference:
    """A reference on the disk, and what it took."""

    folder: Path
    info: ReferenceInfo
    parameters: int  # 0: it is counted
    seconds: float  # of training or counting
    size_bytes: int  # of the folder


def save_reference(
    samples: Samples,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    config: ReferenceConfig,
    *,
    trained_on: str,
    command: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> SavedReference:
    """`make_reference`, written whole into a folder that is absent or empty, or, with `config.overwrite`, gives way.

    Raises:
        InvalidArgument: as of `make_reference`.
        AlreadyExists: the folder is taken; seen before training.
    """
    check_free(folder, replace=config.overwrite)
    made = make_reference(
        samples, tokenizer, config, trained_on=trained_on, command=command, device=device, progress=progress
    )
    written = write_reference(folder, made.files, replace=config.overwrite)
    size = sum(len(content) for content in made.files.values())
    return SavedReference(written, check_reference(made.files, str(written)), made.parameters, made.seconds, size)


def make_reference(
    samples: Samples,
    tokenizer: Tokenizer,
    config: ReferenceConfig,
    *,
    trained_on: str,
    command: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> MadeReference:
    """Counts the samples and, unless that is all (`COUNTED`), trains on them. Equal arguments give equal files.

    Args:
        samples: of the pool, by this tokenizer; their length is the reference's seq_len.
        config: size, steps, batch_size, lr, warmup_steps, seed and ngram_buckets are used.
        trained_on, command: words for people, kept in reference.json.

    Raises:
        InvalidArgument: an unknown size, fewer samples than a batch of training, or more tokens than can be counted.
    """
    started = time.perf_counter()
    seq_len = samples.tokens.shape[1] - 1
    counts = Counts(unigram_counts(samples, tokenizer.vocab_size), count_ngrams(samples.tokens, config.ngram_buckets))
    subset = fixed_subset(samples.tokens, _LOSS_SAMPLES)
    model: PreTrainedModel | None = None
    if config.size == COUNTED:
        counts = _counted(samples.tokens, counts)
        loss = _counted_loss(counts, subset)
    else:
        model = build_model(config.size, tokenizer.vocab_size, seq_len, config.seed)
        _train(model, samples, config, torch.device(device), progress)
        loss = mean_loss(model, subset, config.batch_size, torch.device(device))
    seconds = time.perf_counter() - started
    model_config, parameters = (None, None) if model is None else _saved(model)
    files = build_reference(
        model_config,
        parameters,
        tokenizer.to_json().encode(),
        counts,
        seq_len=seq_len,
        trained_on=trained_on,
        command=command,
        steps=0 if model is None else config.steps,
        loss=loss,
    )
    return MadeReference(files, 0 if model is None else count_parameters(model), seconds)


def load_pool(config: ReferenceConfig, progress: Progress | None = None) -> list[Document]:
    """The documents to train on: the very ones that a run with the same data, val and test trains on.

    Raises:
        InvalidArgument: data that can't be read.
    """
    if config.val or config.data == ReferenceConfig.data:
        return list(load_corpus(config.data, config.val, config.test, progress=progress).train)
    return load_documents(config.data, progress=progress)


def _train(
    model: nn.Module, samples: Samples, config: ReferenceConfig, device: torch.device, progress: Progress | None
) -> None:
    """`config.steps` plain steps of AdamW on the mean loss, optimiser and schedule as a run's."""
    recipe = RunConfig(steps=config.steps, lr=config.lr, warmup_steps=config.warmup_steps)
    order = BatchOrder(samples, config.batch_size, config.seed)
    model.to(device).eval()  # dropout off, as in a run
    optimizer = build_optimizer(model, recipe)
    for step in range(config.steps):
        tokens = to_tensor(samples.tokens[order.indices(step)], device)
        loss = per_sample_loss(token_losses(model, tokens)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimise(model, optimizer, learning_rate(recipe, step))
        if progress is not None and ((step + 1) % _REPORT_EVERY == 0 or step + 1 == config.steps):
            progress(step + 1, config.steps, f"training the reference, loss {float(loss.detach()):.3f}")


def _counted(tokens: np.ndarray, counts: Counts) -> Counts:
    """Those of a counted reference: of distinct samples, as what is repeated would predict itself."""
    distinct = np.unique(tokens, axis=0)
    unigrams = np.bincount(distinct[:, 1:].ravel(), minlength=len(counts.unigrams))
    return replace(counts, unigrams=unigrams, bi_and_trigrams=count_bi_and_trigrams(distinct))


def _counted_loss(counts: Counts, tokens: np.ndarray) -> float:
    assert counts.bi_and_trigrams is not None
    losses = CountedModel(counts.unigrams, counts.bi_and_trigrams).token_losses(to_tensor(tokens, torch.device("cpu")))
    return float(losses.mean())


def _saved(model: PreTrainedModel) -> tuple[bytes, bytes]:
    """Contents of config.json and model.safetensors, as transformers writes them."""
    with tempfile.TemporaryDirectory() as temporary, no_progress_bar():
        model.save_pretrained(temporary, max_shard_size="1000GB")
        folder = Path(temporary)
        return (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
