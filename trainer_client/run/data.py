"""From documents to batches: a corpus of three splits, fixed-length token windows, and the order that they come in.

Knows nothing of models, weights or the service. The source of a sample is for reports; no weighter ever sees it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from trainer_client.run import builtin_corpus
from trainer_client.run.documents import SOURCE, Document, Progress, read_documents, without
from weighting_contract.errors import InvalidArgument

if TYPE_CHECKING:
    from trainer_client.run.tokenizer import Tokenizer

__all__ = [
    "BUILTIN",
    "BatchOrder",
    "Corpus",
    "Document",
    "Progress",
    "Samples",
    "load_corpus",
    "load_documents",
    "make_samples",
    "unigram_counts",
]

logger = logging.getLogger(__name__)

BUILTIN = "builtin"  # as a name of data: the built-in corpus


# ---- Corpora --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Three splits, none empty; no text is in two of them."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    warnings: tuple[str, ...] = ()  # what was removed for that, in sentences


def load_corpus(
    data: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    *,
    group_by: str = SOURCE,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus that the names describe (see `load_documents`; `builtin` means the split in question).

    Without `val`, validation and test are the built-in ones, which only makes sense for built-in data. Without `test`,
    the validation documents are split in two, the same way every time. A text that is in two splits (white space
    aside) stays in test before validation before train, and the number of removed documents is a warning.

    Args:
        group_by: the field of documents that is taken for their source, as of `read_documents`.

    Raises:
        InvalidArgument: unreadable or empty data; no `val` for data of one's own; a single validation document and
            no `test`; no training document has the field `group_by`.
    """
    builtin = cache(lambda: builtin_corpus.build(progress=progress))
    names, val_names, test_names = _names(data), _names(val), _names(test)
    if not val_names:
        if BUILTIN not in names:
            raise InvalidArgument(f"--val is missing: name documents of the target that {', '.join(names)} is to serve")
        val_names = [BUILTIN]
    if not test_names and val_names == [BUILTIN]:
        test_names = [BUILTIN]

    train = _load(names, lambda: builtin().train, progress, group_by)
    if group_by != SOURCE and all(document.source == without(group_by) for document in train):
        raise InvalidArgument(
            f"--group-by is {group_by}, but none of the {len(train)} training documents has that field: name one that "
            "they have, or leave the flag out to group them by source"
        )
    validation = _load(val_names, lambda: builtin().validation, progress, group_by)
    if test_names:
        held_out = _load(test_names, lambda: builtin().test, progress, group_by)
        validation, of_validation = _without(validation, held_out, "validation", "test", "--val")
    else:
        (validation, held_out), of_validation = _halves(validation), []
    train, of_train = _without(train, [*validation, *held_out], "train", "validation or test", "--data")
    return Corpus(tuple(train), tuple(validation), tuple(held_out), tuple(of_validation + of_train))


def load_documents(name: str | Sequence[str], *, progress: Progress | None = None) -> list[Document]:
    """The documents of one or more names: `builtin` (its training pool), or what `read_documents` takes.

    Raises:
        InvalidArgument: no such file or dataset, unreadable, damaged, or without documents.
    """
    return _load(_names(name), lambda: builtin_corpus.build(progress=progress).train, progress)


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _load(
    names: Sequence[str],
    builtin: Callable[[], Iterable[Document]],
    progress: Progress | None,
    group_by: str = SOURCE,
) -> list[Document]:
    documents: list[Document] = []
    for name in names:
        if name != BUILTIN:
            documents.extend(read_documents(name, group_by=group_by, progress=progress))
        elif group_by == SOURCE:
            documents.extend(builtin())
        else:
            documents.extend(replace(document, source=without(group_by)) for document in builtin())
    if not documents:
        raise InvalidArgument("--data names nothing: expected builtin, files, or a dataset")
    return documents


def _halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Every other distinct text, in the order of their hashes."""
    distinct = sorted({_digest(document): document for document in reversed(documents)}.items())
    if len(distinct) < 2:
        raise InvalidArgument(
            "--test is missing, and --val has only one document: name test documents, or more of --val"
        )
    return [document for _, document in distinct[::2]], [document for _, document in distinct[1::2]]


def _without(
    documents: list[Document], others: list[Document], split: str, kept_in: str, flag: str
) -> tuple[list[Document], list[str]]:
    """What is not among the others, and a warning where that is not all."""
    taken = {_digest(document) for document in others}
    kept = [document for document in documents if _digest(document) not in taken]
    removed = len(documents) - len(kept)
    if not kept:
        raise InvalidArgument(
            f"{split} is empty: all {len(documents)} of its documents are in {kept_in} too; name other documents for "
            f"{flag}"
        )
    if not removed:
        return kept, []
    warning = (
        f"{removed} of {len(documents)} documents removed from {split}: they are in {kept_in} too, where they would be "
        f"judged by what was learned from them; the run goes on without, take them out of {flag} if that is not meant"
    )
    logger.warning("%s", warning)
    return kept, [warning]


def _digest(document: Document) -> bytes:
    normalised = " ".join(document.text.split())
    return hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).digest()


# ---- Samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """N windows of token ids; each is of one document, hence of one source."""

    tokens: np.ndarray  # [N, seq_len + 1] uint16, or uint32 for vocabularies over 65,536
    source_index: np.ndarray  # [N] int64, into sources
    sources: tuple[str, ...]
    document_index: np.ndarray | None = None  # [N] int64, counted from 0; None: each window is of its own
    document_tokens: np.ndarray | None = None  # [documents] int64, with the rests; None: not known
    dropped_documents: int = 0  # too short for one window
    dropped_tokens: int = 0  # of rests and dropped documents

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> np.ndarray:
        """[N, seq_len]"""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> np.ndarray:
        """[N, seq_len], the inputs shifted by one."""
        return self.tokens[:, 1:]


def make_samples(
    documents: Collection[Document], tokenizer: Tokenizer, seq_len: int, *, progress: Progress | None = None
) -> Samples:
    """Cuts each document into windows of seq_len + 1 tokens, seq_len apart, so that every token but the first of a
    document is a label once. Rests and documents shorter than a window are dropped and counted.

    Raises:
        InvalidArgument: seq_len below 1, or no document is as long as a window.
    """
    if seq_len < 1:
        raise InvalidArgument(f"--seq-len is {seq_len}, expected 1 or more")
    listed = list(documents)
    sources = tuple(sorted({document.source for document in listed}))
    index_of = {source: index for index, source in enumerate(sources)}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    windows: list[np.ndarray] = []
    source_index: list[int] = []
    counts: list[int] = []  # windows of each document that has some
    lengths: list[int] = []  # its tokens
    dropped_documents = dropped_tokens = 0
    for start in range(0, len(listed), 64):
        chunk = listed[start : start + 64]
        for document, ids in zip(chunk, tokenizer.encode_batch([d.text for d in chunk]), strict=True):
            count = max(0, len(ids) - 1) // seq_len
            if count:
                rows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype), seq_len + 1)
                windows.append(rows[: count * seq_len : seq_len])
                source_index.extend([index_of[document.source]] * count)
                counts.append(count)
                lengths.append(len(ids))
            dropped_documents += count == 0
            dropped_tokens += len(ids) - (count * seq_len + 1 if count else 0)
        if progress is not None:
            progress(start + len(chunk), len(listed), "tokenizing")
    if not windows:
        raise InvalidArgument(
            f"none of {len(listed)} documents has the {seq_len + 1} tokens of a sample: "
            f"lower --seq-len ({seq_len}) or give longer documents"
        )
    if dropped_documents:
        logger.info("%d of %d documents are shorter than a sample and left out", dropped_documents, len(listed))
    return Samples(
        np.concatenate(windows),
        np.array(source_index, np.int64),
        sources,
        np.repeat(np.arange(len(counts)), counts),
        np.array(lengths, np.int64),
        dropped_documents,
        dropped_tokens,
    )


def every_sixth_document(samples: Samples) -> np.ndarray:  # [N] bool
    """The windows of every sixth document; where there are fewer than twelve, the last quarter of each document's."""
    index = np.arange(len(samples)) if samples.document_index is None else samples.document_index
    counts = np.bincount(index)
    if len(counts) >= 12:
        return np.asarray(index % 6 == 5)
    of_document = counts[index]
    place = np.arange(len(samples)) - (np.cumsum(counts) - counts)[index]  # in its document
    held_out: np.ndarray = place >= of_document - of_document // 4
    return held_out


def unigram_counts(samples: Samples, vocab_size: int) -> np.ndarray:  # [V] int64
    """How often each token is a label in the samples.

    Raises:
        InvalidArgument: a token id is not below vocab_size.
    """
    largest = int(samples.tokens.max(initial=0))
    if largest >= vocab_size:
        raise InvalidArgument(f"vocab_size is {vocab_size}, but the samples hold token id {largest}")
    return np.bincount(samples.labels.ravel(), minlength=vocab_size)


# ---- Order ----------------------------------------------------------------------------------------------------------


_STEPS_CACHED = 16
_OTHERS = 1 << 32  # added to a seed: candidates beside the batch come in an order of their own


class BatchOrder:
    """Which samples make up each step's batch: one endless stream of epochs, each a fresh permutation, cut in batches.

    Every sample comes exactly once an epoch; a batch may span two epochs. Stateless: the batch of a step depends on
    (seed, number of samples, batch size, step) alone, so a resumed run needs only its step.

    Raises:
        InvalidArgument: fewer samples than one batch, a batch size below 1, or a negative seed.
    """

    def __init__(self, samples: Sized, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise InvalidArgument(f"--batch-size is {batch_size}, expected 1 or more")
        if seed < 0:
            raise InvalidArgument(f"--seed is {seed}, expected 0 or more")
        if len(samples) < batch_size:
            raise InvalidArgument(
                f"there are {len(samples)} samples, fewer than one batch of {batch_size}: "
                "give more data, or lower --batch-size or --seq-len"
            )
        self.count = len(samples)
        self.batch_size = batch_size
        self.seed = seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def indices(self, step: int) -> np.ndarray:  # [B] int64
        """The batch of `step` (0 or more), as indices of samples."""
        if step < 0:
            raise InvalidArgument(f"step is {step}, expected 0 or more")
        start, end = step * self.batch_size, (step + 1) * self.batch_size
        epoch, offset = divmod(start, self.count)
        head = self._permutation(epoch)[offset : offset + self.batch_size]
        if end <= (epoch + 1) * self.count:
            return head.copy()
        return np.concatenate([head, self._permutation(epoch + 1)[: self.batch_size - len(head)]])

    def drawn(self, steps: int) -> np.ndarray:  # [n] int64
        """The different samples of the first `steps` batches, in the order in which they come first."""
        return self._permutation(0)[: steps * self.batch_size].copy()

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            self._cached = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count))
        return self._cached[1]


class CandidateOrder:
    """What each step chooses its batch from: the batch that it would have without a choice, then others.

    So a choice that prefers nothing can take the first of them, and the run is that without a choice. The others come
    from a stream of their own, and none of them is twice among a step's candidates. Stateless as a `BatchOrder`.

    Raises:
        InvalidArgument: fewer samples than candidates, or as of `BatchOrder`.
    """

    def __init__(self, samples: Sized, batch_size: int, candidates: int, seed: int) -> None:
        """
        Args:
            candidates: M, batches' worth of samples a step.
        """
        self.batch_size = candidates * batch_size  # of a step's candidates
        if self.batch_size > len(samples):
            raise InvalidArgument(
                f"there are {len(samples)} samples, fewer than the {candidates} x {batch_size} candidates of a step: "
                "give more data, or lower --candidates or --batch-size"
            )
        self._first = BatchOrder(samples, batch_size, seed)
        self._others = BatchOrder(samples, self.batch_size - batch_size, seed + _OTHERS) if candidates > 1 else None
        self._cached: dict[int, np.ndarray] = {}  # by step: one is asked about several times

    def indices(self, step: int) -> np.ndarray:  # [M B] int64
        """The candidates of `step` (0 or more), as indices of samples."""
        if step not in self._cached:
            first = self._first.indices(step)
            found = first if self._others is None else np.concatenate([first, self._beside(first, step)])
            if len(self._cached) >= _STEPS_CACHED:
                del self._cached[next(iter(self._cached))]
            self._cached[step] = found
        return self._cached[step].copy()

    def drawn(self, steps: int) -> np.ndarray:  # [n] int64
        """The different samples among the candidates of the first `steps` steps, in the order they come first."""
        seen, found = np.zeros(self._first.count, np.bool_), [np.empty(0, np.int64)]
        for step in range(steps):
            indices = self.indices(step)
            indices = indices[~seen[indices]]
            seen[indices] = True
            found.append(indices)
            if seen.all():
                break
        return np.concatenate(found)

    def _beside(self, first: np.ndarray, step: int) -> np.ndarray:
        """The step's others; in place of those that it has already, some at random."""
        assert self._others is not None
        others = self._others.indices(step)
        taken, random = set(first.tolist()), np.random.default_rng([self._others.seed, 0, step])
        for place, index in enumerate(others.tolist()):
            while index in taken:
                index = int(random.integers(self._first.count))
            taken.add(index)
            others[place] = index
        return others
