"""What all runs of a job share: samples of the three splits, the order of batches, and the unigram table.

Knows nothing of models, weights or the service.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Progress, Samples, load_corpus, make_samples, unigram_counts
from trainer_client.run.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from weighting_contract.statistics import unigram_nll_table

_VALIDATION_STREAM = 1  # keeps the draws of validation samples apart from other draws of the same seed
_PAUSE_STREAM = 2


@dataclass(frozen=True)
class Task:
    """A job's data, tokenised. Test samples are only ever evaluated."""

    tokenizer: Tokenizer
    train: Samples
    val: Samples
    test: Samples
    order: BatchOrder  # which training samples make up each step's batch
    unigram_nll: torch.Tensor  # [V] float32, -log p of each token in the training samples
    seed: int

    def batch(self, step: int, device: torch.device) -> torch.Tensor:
        """[B, T+1] int64: the batch of `step`."""
        return to_tensor(self.train.tokens[self.order.indices(step)], device)

    def sources(self, steps: int) -> np.ndarray:
        """[steps, B] int64: the sources of the samples of all steps so far, as indices into `train.sources`."""
        return np.stack([self.train.source_index[self.order.indices(step)] for step in range(steps)])

    def mean_by_source(self, step: int, weights: np.ndarray) -> dict[str, float]:
        """Mean weight of each source that is in the batch of `step`."""
        sources = self.train.source_index[self.order.indices(step)]
        return {self.train.sources[i]: float(weights[sources == i].mean()) for i in np.unique(sources)}

    def validation_draw(self, step: int, count: int, device: torch.device, draw: int = 0) -> torch.Tensor:
        """[count, T+1] int64 validation samples that belong to (seed, step, draw); fewer where there are fewer."""
        rng = np.random.default_rng([self.seed, _VALIDATION_STREAM, step, draw])
        return to_tensor(self.val.tokens[rng.permutation(len(self.val))[:count]], device)

    def pause_draw(self, step: int, count: int, device: torch.device, draw: int) -> torch.Tensor:
        """[count, T+1] int64 training samples for the `draw`-th meta-update in the pause before `step`."""
        rng = np.random.default_rng([self.seed, _PAUSE_STREAM, step, draw])
        return to_tensor(self.train.tokens[rng.choice(len(self.train), count, replace=False)], device)


def to_tensor(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as int64 on a device."""
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def build_task(config: RunConfig, progress: Progress | None = None) -> Task:
    """Loads, tokenises and cuts the documents of a job.

    Raises:
        InvalidArgument: data that can't be read, or too little of it.
    """
    corpus = load_corpus(config.data, config.val, config.test, progress=progress)
    tokenizer = (
        load_tokenizer(config.tokenizer)
        if config.tokenizer
        else cached_tokenizer([document.text for document in corpus.train], config.vocab_size, progress=progress)
    )
    train, val, test = (
        make_samples(documents, tokenizer, config.seq_len, progress=progress)
        for documents in (corpus.train, corpus.validation, corpus.test)
    )
    counts = torch.from_numpy(unigram_counts(train, tokenizer.vocab_size))
    return Task(
        tokenizer=tokenizer,
        train=train,
        val=val,
        test=test,
        order=BatchOrder(train, config.batch_size, config.seed),
        unigram_nll=unigram_nll_table(counts),
        seed=config.seed,
    )
