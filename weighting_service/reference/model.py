"""A reference at work: token ids in, raw portable statistics out, many samples at a time.

Torch only: no files, no threads; one thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import Counts, ReferenceInfo
from weighting_contract.statistics import raw_statistics, unigram_nll_table
from weighting_service.reference.cache import SampleCache, sample_keys
from weighting_service.reference.packing import Pack, PackReport, pack_rows

Row = Sequence[int] | np.ndarray  # token ids of one sample
Tokenize = Callable[[Sequence[str]], list[list[int]]]

TOKENS_PER_PACK_CPU = 8192
TOKENS_PER_PACK_CUDA = 131_072


class LanguageModel(Protocol):
    """A small frozen language model, trained or counted."""

    def token_losses(self, tokens: Tensor, real: np.ndarray) -> Tensor:
        """[N, T-1] float32, nats, of rows of ids [N, T] int64 that are padded on the right.

        Args:
            real: [N, T-1] bool, where a label is none of the padding; what is given elsewhere does not matter.
        """


class Reference:
    """Scores samples by a small language model, for any number of weighters and jobs.

    Attributes:
        name: that specs and metrics call it by.
        info: what it says about itself.
        ngram_counts: [buckets] int64, of its pool: the other half of a target profile.
        last_report: how well the latest call's samples were packed.
    """

    def __init__(
        self,
        name: str,
        info: ReferenceInfo,
        model: LanguageModel,
        tokenize: Tokenize,
        counts: Counts,
        device: torch.device | str = "cpu",
        tokens_per_pack: int | None = None,
        cached_samples: int = 0,
    ) -> None:
        """
        Args:
            model: on the device.
            tokenize: texts to token ids.
            counts: of the pool that the model was made of.
            tokens_per_pack: most padded tokens at a time; None: what suits the device.
            cached_samples: whose raw statistics are kept, the newest ones; 0: none.
        """
        self.name, self.info, self.ngram_counts = name, info, counts.ngrams
        self.last_report = PackReport(0, 0, 0, 0, 0, ())
        self._cache = SampleCache(cached_samples)
        self._tokenize = tokenize
        self._model = model
        self._device = torch.device(device)
        self._unigram_nll = unigram_nll_table(torch.from_numpy(counts.unigrams)).to(self._device)
        cuda = self._device.type == "cuda"
        self.tokens_per_pack = tokens_per_pack or (TOKENS_PER_PACK_CUDA if cuda else TOKENS_PER_PACK_CPU)

    @property
    def checksum(self) -> str:
        """Equal exactly for references that give the same statistics."""
        return self.info.checksum

    @property
    def tokenizer_checksum(self) -> str:
        return self.info.tokenizer_checksum

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @property
    def max_tokens(self) -> int:
        """Longest sample that is scored whole; of longer ones, so many tokens from the beginning."""
        return self.info.seq_len + 1

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the reference's own tokenizer, without special tokens."""
        return self._tokenize(texts)

    def raw_statistics(self, rows: Sequence[Row]) -> Tensor:
        """[N, len(RAW_NAMES)] float32 on the CPU: `weighting_contract.statistics.raw_statistics` of every sample.

        A sample of n tokens has n - 1 labels, each token but its first; its losses are the model's, its unigram NLLs
        those of the reference's pool. Rows depend on their own sample only, up to float rounding, and not on the
        order of the samples. Samples longer than `max_tokens` are cut, and counted in `last_report`.

        Args:
            rows: token ids of each sample, 2 or more, in any lengths and integer types.

        Raises:
            InvalidArgument: a row that is none, too short, or with ids outside the vocabulary.
        """
        return self.raw_statistics_of([self.check_rows(rows)])[0]

    def raw_statistics_of(
        self, batches: Sequence[Sequence[np.ndarray]], scopes: Sequence[str] | None = None
    ) -> list[Tensor]:
        """`raw_statistics` of several callers' batches, packed together.

        What is known of a sample, from an earlier call or as it comes twice in this one, is not computed again; in
        `last_report`, the first caller with it is the one that it was computed for.

        Args:
            batches: rows of each caller, from `check_rows`.
            scopes: of each caller; those of different scopes share nothing that is known. None: all are of one.
        """
        most = self.max_tokens
        cut = [[row[:most] for row in batch] for batch in batches]
        scoped = zip(cut, scopes or [""] * len(batches), strict=True)
        keys = [key for batch, scope in scoped for key in sample_keys(batch, scope)]
        rows = list(chain.from_iterable(cut))
        raw, known = self._cache.read(keys)
        unknown = np.flatnonzero(~known).tolist()
        first = {keys[i]: i for i in reversed(unknown)}  # the first row of each sample that is not known
        fresh = sorted(first.values())
        packs = pack_rows([rows[i] for i in fresh], self.tokens_per_pack)
        if packs:
            raw[[fresh[i] for pack in packs for i in pack.indices]] = self._score(packs)
            raw[unknown] = raw[[first[keys[i]] for i in unknown]]
            self._cache.add([keys[i] for i in fresh], raw[fresh])
        sizes = [len(batch) for batch in batches]
        owners = np.searchsorted(np.cumsum(sizes), fresh, "right")
        self.last_report = PackReport(
            packs=len(packs),
            samples=len(rows),
            real_tokens=sum(pack.real_tokens for pack in packs),
            padded_tokens=sum(pack.padded_tokens for pack in packs),
            cut_samples=sum(len(row) > most for batch in batches for row in batch),
            computed_samples=tuple(np.bincount(owners, minlength=len(batches)).tolist()),
        )
        return list(torch.split(raw, sizes))

    def check_rows(self, rows: Sequence[Row], field: str = "rows") -> list[np.ndarray]:
        """The rows as [T_i] int64 arrays, uncut. Touches no device: any thread may call it.

        Raises:
            InvalidArgument: naming `field`, the row and what is wrong with it.
        """
        arrays = [np.asarray(row) for row in rows]
        for i, row in enumerate(arrays):
            if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
                raise InvalidArgument(
                    f"{field}[{i}] is {row.dtype.name} of shape {list(row.shape)}, expected integer token ids of [T]"
                )
            if len(row) < 2:
                raise InvalidArgument(
                    f"{field}[{i}] has {len(row)} tokens, expected 2 or more: a sample's first token is predicted by "
                    "nothing"
                )
        if arrays and self._outside(np.concatenate(arrays)).any():  # all at once: a batch has many short rows
            i, wrong = next((i, row[outside]) for i, row in enumerate(arrays) if (outside := self._outside(row)).any())
            raise InvalidArgument(
                f"{field}[{i}] has the token id {wrong[0]}, but the reference {self.name!r} knows ids from 0 to "
                f"{self.vocab_size - 1}: was the sample made with another tokenizer?"
            )
        return [row.astype(np.int64) for row in arrays]  # of their own: they wait, and a padded matrix need not

    def _outside(self, ids: np.ndarray) -> np.ndarray:
        """[n] bool, of each id whether the vocabulary lacks it."""
        outside: np.ndarray = (ids < 0) | (ids >= self.vocab_size)
        return outside

    @torch.inference_mode()
    def _score(self, packs: Sequence[Pack]) -> Tensor:
        """[N, len(RAW_NAMES)] of all packs, on the CPU; the device is waited for once, at the end."""
        parts = []
        for pack in packs:
            tokens = torch.from_numpy(pack.tokens).to(self._device, non_blocking=True)
            losses = self._model.token_losses(tokens, pack.labels)
            mask = torch.from_numpy(pack.labels).to(self._device, non_blocking=True)
            parts.append(raw_statistics(losses, self._unigram_nll[tokens[:, 1:]], mask))
        return torch.cat(parts).cpu()
