"""A reference at work: token ids in, raw portable statistics out, many samples at a time.

Torch only: no files, no threads; one thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import Counts, ReferenceInfo
from weighting_contract.statistics import raw_statistics, unigram_nll_table
from weighting_service.reference.cache import SampleCache, sample_key
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
        return self.raw_statistics_of([rows], fields=["rows"])[0]

    def raw_statistics_of(
        self,
        batches: Sequence[Sequence[Row]],
        fields: Sequence[str] | None = None,
        scopes: Sequence[str] | None = None,
        *,
        checked: bool = False,
    ) -> list[Tensor]:
        """`raw_statistics` of several callers' batches, packed together.

        What is known of a sample, from an earlier call or as it comes twice in this one, is not computed again; in
        `last_report`, the first caller with it is the one that it was computed for.

        Args:
            batches: rows of each caller.
            fields: names of the batches in error messages.
            scopes: of each caller; those of different scopes share nothing that is known. None: all are of one.
            checked: the rows come from `check_rows` and need no second look.

        Raises:
            InvalidArgument: as of `raw_statistics`, for any of them: use `check_rows` before putting callers together.
        """
        if not checked:
            fields = fields or [f"batches[{b}]" for b in range(len(batches))]
            batches = [self.check_rows(batch, field) for batch, field in zip(batches, fields, strict=True)]
        owners = [scope for scope, batch in zip(scopes or [""] * len(batches), batches, strict=True) for _ in batch]
        whole = [np.asarray(row) for batch in batches for row in batch]
        rows = [row[: self.max_tokens] for row in whole]
        keys = [sample_key(row, scope) for row, scope in zip(rows, owners, strict=True)]
        raw, known = self._cache.read(keys)
        first = {keys[i]: i for i in np.flatnonzero(~known)[::-1]}  # the first row of each sample that is not known
        fresh = sorted(first.values())
        packs = pack_rows([rows[i] for i in fresh], self.tokens_per_pack)
        if packs:
            raw[[fresh[i] for pack in packs for i in pack.indices]] = self._score(packs)
            unknown = np.flatnonzero(~known)
            raw[torch.from_numpy(unknown)] = raw[[first[keys[i]] for i in unknown]]
            self._cache.add([keys[i] for i in fresh], raw[fresh])
        ends = np.cumsum([len(batch) for batch in batches])
        self.last_report = PackReport(
            packs=len(packs),
            samples=len(rows),
            real_tokens=sum(pack.real_tokens for pack in packs),
            padded_tokens=sum(pack.padded_tokens for pack in packs),
            cut_samples=sum(len(row) > self.max_tokens for row in whole),
            computed_samples=tuple(np.bincount(np.searchsorted(ends, fresh, "right"), minlength=len(batches)).tolist()),
        )
        return list(torch.split(raw, [len(batch) for batch in batches]))

    def check_rows(self, rows: Sequence[Row], field: str = "rows") -> list[np.ndarray]:
        """The rows as [T_i] int64 arrays, uncut. Touches no device: any thread may call it.

        Raises:
            InvalidArgument: naming `field`, the row and what is wrong with it.
        """
        return [self._checked(np.asarray(row), f"{field}[{i}]") for i, row in enumerate(rows)]

    def _checked(self, row: np.ndarray, field: str) -> np.ndarray:
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise InvalidArgument(
                f"{field} is {row.dtype.name} of shape {list(row.shape)}, expected integer token ids of [T]"
            )
        if len(row) < 2:
            raise InvalidArgument(
                f"{field} has {len(row)} tokens, expected 2 or more: a sample's first token is predicted by nothing"
            )
        least, most = int(row.min()), int(row.max())
        if least < 0 or most >= self.vocab_size:
            raise InvalidArgument(
                f"{field} has the token id {least if least < 0 else most}, but the reference {self.name!r} knows ids "
                f"from 0 to {self.vocab_size - 1}: was the sample made with another tokenizer?"
            )
        return row.astype(np.int64)

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
