"""What all runs of a job share: samples of the three splits, the order that they come in, and counts of the pool.

Knows nothing of models, weights or the service.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from trainer_client.run.config import RunConfig
from trainer_client.run.data import (
    BatchOrder,
    CandidateOrder,
    Document,
    Progress,
    Samples,
    every_sixth_document,
    load_corpus,
    make_samples,
    unigram_counts,
)
from trainer_client.run.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import count_ngrams, log_ratios, profile_table
from weighting_contract.profile import documents_checksum
from weighting_contract.statistics import unigram_nll_table

logger = logging.getLogger(__name__)

_VALIDATION_STREAM = 1  # keeps the draws of validation samples apart from other draws of the same seed
_PAUSE_STREAM = 2


@dataclass(frozen=True)
class Task:
    """A job's data, tokenised. Test samples are only ever evaluated."""

    tokenizer: Tokenizer
    train: Samples
    val: Samples
    test: Samples
    order: BatchOrder  # which training samples make up each step's batch where it is taken as drawn
    candidate_order: BatchOrder | CandidateOrder  # which ones a batch is chosen from elsewhere; of the same seed
    unigram_nll: torch.Tensor  # [V] float32, -log p of each token in the training samples
    seed: int
    warnings: tuple[str, ...] = ()  # about the data, in sentences; they are in the summary, too
    val_checksum: str = ""  # of the validation documents as a whole, as of `documents_checksum`

    def tokens(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """[N, T+1] int64 ids of training samples."""
        return to_tensor(self.train.tokens[indices], device)

    @cached_property
    def _held_out(self) -> np.ndarray:
        """[validation samples] bool: what a profile is not made of, so that cotangents can judge it."""
        held_out = every_sixth_document(self.val)
        return held_out if held_out.any() else np.ones_like(held_out)

    @property
    def held_out_count(self) -> int:
        """Validation samples that judge a profile; all of them where there are too few to hold some out."""
        return int(self._held_out.sum())

    @property
    def profile_tokens(self) -> np.ndarray:
        """[N, T+1] validation samples that a target profile is made of: those that are not held out, if there are any.

        A sample that resembles the very documents that measure its worth looks useful where it is not. So a weighter
        that reads a profile is taught, and its trust measured, with cotangents towards other documents than those.
        """
        return self.val.tokens if self._held_out.all() else self.val.tokens[~self._held_out]

    def target_table(self, validation: np.ndarray) -> torch.Tensor:
        """[buckets] float32: the profile of validation samples [N, T+1] against the training samples."""
        return profile_table(log_ratios(count_ngrams(validation), count_ngrams(self.train.tokens)))

    def share_by_source(self, indices: np.ndarray) -> dict[str, float]:
        """Share of each source among training samples."""
        counts = np.bincount(self.train.source_index[indices], minlength=len(self.train.sources))
        return {name: float(count / len(indices)) for name, count in zip(self.train.sources, counts, strict=True)}

    def validation_draw(
        self, step: int, count: int, device: torch.device, draw: int = 0, *, held_out: bool = False
    ) -> torch.Tensor:
        """[count, T+1] int64 validation samples that belong to (seed, step, draw); fewer where there are fewer.

        Args:
            held_out: of those only that `profile_tokens` leaves out.
        """
        rng = np.random.default_rng([self.seed, _VALIDATION_STREAM, step, draw])
        rows = np.flatnonzero(self._held_out) if held_out else np.arange(len(self.val))
        return to_tensor(self.val.tokens[rng.permutation(rows)[:count]], device)

    def pause_draw(self, step: int, count: int, device: torch.device, draw: int) -> torch.Tensor:
        """[count, T+1] int64 training samples for the `draw`-th meta-update in the pause before `step`."""
        rng = np.random.default_rng([self.seed, _PAUSE_STREAM, step, draw])
        return to_tensor(self.train.tokens[rng.choice(len(self.train), count, replace=False)], device)


def to_tensor(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as int64 on a device."""
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def build_task(config: RunConfig, progress: Progress | None = None, tokenizer: Tokenizer | None = None) -> Task:
    """Loads, tokenises and cuts the documents of a job.

    Args:
        tokenizer: of the job, where something else decides it; None: the one that `config` names, or one that is
            trained on the documents.

    Raises:
        InvalidArgument: data that can't be read, or too little of it.
    """
    corpus = load_corpus(config.data, config.val, config.test, group_by=config.group_by, progress=progress)
    if tokenizer is None and config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None:
        texts = [document.text for document in corpus.train]
        tokenizer = cached_tokenizer(texts, config.vocab_size, progress=progress)
    splits = (("--data", corpus.train), ("--val", corpus.validation), ("--test", corpus.test))
    train, val, test = (_samples(name, documents, tokenizer, config, progress) for name, documents in splits)
    order = BatchOrder(train, config.batch_size, config.seed)
    counts = torch.from_numpy(unigram_counts(train, tokenizer.vocab_size))
    task = Task(
        tokenizer=tokenizer,
        train=train,
        val=val,
        test=test,
        order=order,
        candidate_order=(
            CandidateOrder(train, config.batch_size, config.candidates, config.seed)
            if _draws_candidates(config)
            else order
        ),
        unigram_nll=unigram_nll_table(counts),
        seed=config.seed,
        val_checksum=_documents_checksum(corpus.validation, tokenizer) if config.profile else "",
    )
    return replace(task, warnings=(*corpus.warnings, *_warned_of_validation(config, task)))


def _samples(
    name: str, documents: Sequence[Document], tokenizer: Tokenizer, config: RunConfig, progress: Progress | None
) -> Samples:
    try:
        return make_samples(documents, tokenizer, config.seq_len, progress=progress)
    except InvalidArgument as exc:
        raise InvalidArgument(f"{name}: {exc.message}") from exc


def _warned_of_validation(config: RunConfig, task: Task) -> list[str]:
    """What is wrong with the samples that cotangents are towards, said in the log, too."""
    learned = [variant for variant in config.variants if variant.learned]
    if not learned or config.replay_weights:
        return []
    samples, batch = len(task.val), config.val_batch
    more = "give more documents to --val, or lower --val-batch or --seq-len"
    warning = ""
    if samples < batch:
        warning = (
            f"validation has {samples} samples, fewer than the {batch} of --val-batch: every cotangent is towards all "
            f"of them, and noisier than it should be; {more}"
        )
    elif any(variant.reads_profile for variant in learned) and not config.profile:
        judging = task.held_out_count
        if judging == samples:
            warning = (
                f"validation has {samples} samples, too few to hold some out: cotangents are towards the very "
                f"documents that the profile is made of, so what resembles them looks useful where it is not; {more}"
            )
        elif judging < batch:
            warning = (
                f"{judging} of {samples} validation samples are held out to judge the target profile, fewer than the "
                f"{batch} of --val-batch: cotangents are noisier than they should be; {more}"
            )
    if not warning:
        return []
    logger.warning("%s", warning)
    return [warning]


def _documents_checksum(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    return documents_checksum([row for row in tokenizer.encode_batch([d.text for d in documents]) if row])


def _draws_candidates(config: RunConfig) -> bool:
    return any(variant.draws_candidates for variant in config.variants)
