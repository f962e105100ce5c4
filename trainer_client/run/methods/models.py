"""The small models of methods: the job's reference, and a copy of it tuned on validation documents, cached.

Knows how references are trained; nothing of what their losses are used for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer_client.reference.config import SMALLEST, ReferenceConfig
from trainer_client.reference.train import make_reference
from trainer_client.run.compute import training_flops
from trainer_client.run.data import Progress, Samples
from trainer_client.run.forward import sample_losses
from trainer_client.run.models import build_model, count_parameters
from trainer_client.run.reference import RunReference, cache_key, cached_or_trained
from trainer_client.run.task import Task, to_tensor
from trainer_client.run.tokenizer import default_cache_dir
from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import check_reference

TUNING = ReferenceConfig(steps=100, lr=4e-3, warmup_steps=10)  # twice the steps found the built-in target no better
_SAMPLES_AT_ONCE = 256
_REPORT_EVERY = 8


@dataclass(frozen=True)
class SmallModel:
    """A model that judges read, frozen."""

    model: nn.Module  # on the CPU
    parameters: int
    seq_len: int  # longest sample that it reads whole, in labels
    trained_flops: float


def pool_model(reference: RunReference) -> SmallModel:
    """The job's reference, here.

    Raises:
        InvalidArgument: only the service has its files.
    """
    return _loaded(_files(reference), reference.trained_flops)


def tuned_model(
    task: Task,
    reference: RunReference,
    device: torch.device,
    progress: Progress | None,
    *,
    cache_dir: Path | None = None,
    recipe: ReferenceConfig = TUNING,
) -> SmallModel:
    """The job's reference, trained on with the validation samples that cotangents towards held-out ones don't use.

    Args:
        cache_dir: None: that of references. A cache that can't be written is a warning; a damaged entry is made anew.
        recipe: of the tuning.

    Raises:
        InvalidArgument: only the service has the reference's files.
    """
    files = _files(reference)
    tokens = task.profile_tokens[:, : reference.seq_len + 1]
    batch_size = min(recipe.batch_size, len(tokens))
    names = ("steps", "batch_size", "lr", "warmup_steps", "seed", "ngram_buckets")
    folder = (cache_dir or default_cache_dir()) / f"tuned-{cache_key(recipe, names, reference.checksum, tokens)}"
    tuned = cached_or_trained(
        folder, "tuned model", lambda: _tuned(task, files, tokens, recipe, batch_size, device, progress)
    )
    labels = recipe.steps * batch_size * (tokens.shape[1] - 1)
    return _loaded(tuned, training_flops(reference.parameters, labels))


@torch.no_grad()
def pool_losses(
    small: SmallModel, tokens: np.ndarray, device: torch.device, progress: Progress | None = None, label: str = ""
) -> np.ndarray:
    """[N] float32 nats: the mean token loss of each sample; tokens [N, T+1], read up to the model's length.

    In passes of one fixed size, so that a sample has the same loss in every run.
    """
    model, parts = small.model.to(device).eval(), []
    for start in range(0, len(tokens), _SAMPLES_AT_ONCE):
        rows = tokens[start : start + _SAMPLES_AT_ONCE, : small.seq_len + 1]
        parts.append(sample_losses(model, to_tensor(rows, device)).cpu().numpy())
        done = start + len(rows)
        if progress is not None and (len(parts) % _REPORT_EVERY == 0 or done == len(tokens)):
            progress(done, len(tokens), label)
    return np.concatenate(parts)


def _files(reference: RunReference) -> dict[str, bytes]:
    if reference.files is None:
        raise InvalidArgument(
            f"--reference {reference.name} is the service's, but this job has a method that needs its parameters here: "
            "name a folder, or leave --reference out to have one trained"
        )
    if not reference.parameters:
        raise InvalidArgument(
            f"--reference {reference.name} is counted, but this job has a method that reads and tunes a model: name "
            f"one with a model (python -m trainer_client.reference --size {SMALLEST}), or leave --reference out to "
            "have one trained"
        )
    return reference.files


def _loaded(files: Mapping[str, bytes], trained_flops: float) -> SmallModel:
    info = check_reference(files, "the reference")
    with _as_folder(files) as folder:
        model = build_model(folder, info.vocab_size, info.seq_len, seed=0)
    return SmallModel(model, count_parameters(model), info.seq_len, trained_flops)


def _as_folder(files: Mapping[str, bytes]) -> tempfile.TemporaryDirectory[str]:
    """The model's files where transformers can read them."""
    folder = tempfile.TemporaryDirectory()
    for name in ("config.json", "model.safetensors"):
        (Path(folder.name) / name).write_bytes(files[name])
    return folder


def _tuned(
    task: Task,
    files: Mapping[str, bytes],
    tokens: np.ndarray,
    recipe: ReferenceConfig,
    batch_size: int,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, bytes]:
    samples = Samples(tokens, np.zeros(len(tokens), np.int64), ("validation",))
    with _as_folder(files) as folder:
        return make_reference(
            samples,
            task.tokenizer,
            _with(recipe, size=folder, batch_size=batch_size),
            trained_on=f"{len(samples):,} validation samples, from a reference of the pool",
            command="",
            device=device,
            progress=progress,
        ).files


def _with(recipe: ReferenceConfig, *, size: str, batch_size: int) -> ReferenceConfig:
    return ReferenceConfig(**{**asdict(recipe), "size": size, "batch_size": batch_size})
