"""Samples of any length to packs for one forward pass each: rows of similar length, padded to the longest.

Knows lengths and token ids; nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weighting_contract.rows import padded

# A pack that has this share of its budget ends where longer rows would make more than a tenth of it padding; below it,
# another pass costs more than the padding.
_WORTH_A_PASS = 1 / 8
_LEAST_EFFICIENCY = 0.9


@dataclass(frozen=True)
class PackReport:
    """What became of a call's samples; tokens are places that the model computed, labels of real ones."""

    packs: int
    samples: int
    real_tokens: int
    padded_tokens: int
    cut_samples: int  # longer than the reference takes
    computed_samples: tuple[int, ...]  # of each caller's batch; the others were known

    @property
    def known_samples(self) -> int:
        """Samples that nothing was computed for."""
        return self.samples - sum(self.computed_samples)

    @property
    def efficiency(self) -> float:
        """Real over padded tokens; 1 for nothing."""
        return self.real_tokens / self.padded_tokens if self.padded_tokens else 1.0


@dataclass(frozen=True)
class Pack:
    """Rows of one forward pass."""

    indices: tuple[int, ...]  # into the rows that were packed
    tokens: np.ndarray  # [N, T] int64, padded on the right with 0
    lengths: np.ndarray  # [N] int64, real tokens of each row

    @property
    def labels(self) -> np.ndarray:
        """[N, T-1] bool: where a token but the first is none of the padding."""
        real: np.ndarray = np.arange(1, self.tokens.shape[1]) < self.lengths[:, None]
        return real

    @property
    def real_tokens(self) -> int:
        """Labels."""
        return int(self.lengths.sum()) - len(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Places that the model computes: each row's last token is a label only."""
        rows, longest = self.tokens.shape
        return int(rows * (longest - 1))


def pack_rows(rows: Sequence[np.ndarray], tokens_per_pack: int) -> list[Pack]:
    """The rows in packs, sorted by length and, within it, by content: the packs do not depend on the rows' order.

    Args:
        rows: [T_i] int64 each, T_i of 2 or more.
        tokens_per_pack: most padded tokens of a pack; a longer row is a pack alone.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i].tobytes()))
    packs: list[Pack] = []
    held: list[int] = []
    real = 0
    for i in order:
        width = len(rows[i]) - 1
        places = (len(held) + 1) * width
        wasteful = real + width < _LEAST_EFFICIENCY * places and places > _WORTH_A_PASS * tokens_per_pack
        if held and (places > tokens_per_pack or wasteful):
            packs.append(pad_rows(rows, held))
            held, real = [], 0
        held.append(i)
        real += width
    if held:
        packs.append(pad_rows(rows, held))
    return packs


def pad_rows(rows: Sequence[np.ndarray], indices: Sequence[int]) -> Pack:
    """One pack of `rows[i]` for each of `indices`, in this order."""
    return Pack(tuple(indices), *padded([rows[i] for i in indices]))
