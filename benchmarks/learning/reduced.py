"""The built-in pool after methods that drop documents once, before training: what learned weights stand on top of.

First the half that is most like the validation documents is kept (DSIR, Xie et al. 2023, arXiv 2302.03169, without its
resampling noise), then, of that, what a reference finds neither hardest nor easiest (Marion et al. 2023, arXiv
2309.04564, keep the middle). The tokenizer stays that of the whole pool, so that losses can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.mixtures import Mixture
from trainer_client.reference.config import SMALLEST, ReferenceConfig
from trainer_client.run import builtin_corpus
from trainer_client.run.choose import likeness
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Document
from trainer_client.run.methods.models import pool_losses, pool_model
from trainer_client.run.reference import made_reference
from trainer_client.run.task import Task, build_task
from trainer_client.run.tokenizer import Tokenizer

DSIR, DSIR_LOSS = "builtin-dsir", "builtin-dsir-loss"
REDUCED = (DSIR, DSIR_LOSS)
KEPT_BY_LIKENESS = 0.5
DROPPED_AT_EACH_END = 0.15  # by loss
CPU = torch.device("cpu")


def reduced_flags(folder: Path) -> dict[str, tuple[str, ...]]:
    """The flags of `run` that name each reduced pool's files, which are written into `folder` if they are not there."""
    flags = {name: _flags(folder, name) for name in REDUCED}
    if all(Path(path).is_file() for of in flags.values() for path in of[1::2]):
        return flags
    corpus = builtin_corpus.build()
    config = RunConfig(out=str(folder))
    whole = build_task(config)
    whole.tokenizer.save(folder / "tokenizer.json")
    held_out = [[(d.text, d.source) for d in split] for split in (corpus.validation, corpus.test)]
    pool = _in_samples(corpus.train, whole.tokenizer, config.seq_len)
    pool = _between(pool, -_by_document(whole, likeness(whole)), whole, 0, KEPT_BY_LIKENESS)
    _write(folder / DSIR, pool, held_out)
    smaller = replace(config, data=flags[DSIR][1:2], val=flags[DSIR][3:4], test=flags[DSIR][5:6])
    task = build_task(smaller, tokenizer=whole.tokenizer)
    reference = pool_model(made_reference(smaller, task, CPU, None, recipe=ReferenceConfig(size=SMALLEST)))
    losses = _by_document(task, pool_losses(reference, task.train.tokens, CPU))
    _write(folder / DSIR_LOSS, _between(pool, losses, task, DROPPED_AT_EACH_END, 1 - DROPPED_AT_EACH_END), held_out)
    return flags


def _flags(folder: Path, name: str) -> tuple[str, ...]:
    files = {flag: folder / name / f"{split}.jsonl" for flag, split in (("--data", "pool"), ("--val", "val"))}
    files |= {"--test": folder / name / "test.jsonl", "--tokenizer": folder / "tokenizer.json"}
    return tuple(part for flag, path in files.items() for part in (flag, str(path)))


def _write(folder: Path, pool: list[Document], held_out: list[list[tuple[str, str]]]) -> None:
    Mixture([(d.text, d.source) for d in pool], *held_out).write(folder)


def _in_samples(documents: tuple[Document, ...], tokenizer: Tokenizer, seq_len: int) -> list[Document]:
    """Those that are as long as a sample, as `Samples.document_index` counts them."""
    rows = tokenizer.encode_batch([d.text for d in documents])
    return [d for d, ids in zip(documents, rows, strict=True) if len(ids) > seq_len]


def _by_document(task: Task, values: np.ndarray) -> np.ndarray:
    """[documents] means of what the samples have; values [N]."""
    index = _index(task)
    return np.bincount(index, values) / np.bincount(index)


def _between(documents: list[Document], values: np.ndarray, task: Task, low: float, high: float) -> list[Document]:
    """In their order, those whose place by rising value, counted in samples, is from `low` to `high` of the pool."""
    sizes = np.bincount(_index(task))
    order = np.argsort(values, kind="stable")
    places = np.empty(len(values))
    places[order] = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
    return [d for d, place in zip(documents, places, strict=True) if low <= place <= high]


def _index(task: Task) -> np.ndarray:
    assert task.train.document_index is not None  # of documents that were cut just now
    return task.train.document_index
