"""Raw statistics of samples that were scored before: bounded, in memory, of one reference. Knows digests, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from weighting_contract.statistics import RAW_NAMES

_DIGEST_BYTES = 16


def sample_keys(rows: Sequence[np.ndarray], scope: str = "") -> list[bytes]:
    """A key for each sample, equal for equal samples of one scope.

    Args:
        rows: [T_i] token ids as they are computed, of any integer type.
        scope: whose samples they are; two that differ share nothing, so that neither learns what the other has sent.
    """
    scoped = hashlib.blake2b(f"{scope}\0".encode(), digest_size=_DIGEST_BYTES)
    keys = []
    for row in rows:
        digest = scoped.copy()
        digest.update(np.ascontiguousarray(row, np.int64).data)
        keys.append(digest.digest())
    return keys


class SampleCache:
    """Rows of raw statistics by key, the newest `capacity` of them. One thread uses it."""

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: rows that are kept; 0: none.
        """
        self._capacity = capacity
        self._places: dict[bytes, int] = {}
        self._keys: list[bytes] = []  # by place
        self._rows = torch.empty(capacity, len(RAW_NAMES))  # takes memory only as it is written
        self._next = 0  # place that is written next; once all are, the oldest

    def __len__(self) -> int:
        return len(self._places)

    def read(self, keys: Sequence[bytes]) -> tuple[Tensor, np.ndarray]:
        """(rows [N, len(RAW_NAMES)] float32, known [N] bool); a row that is not known has no meaning."""
        places = np.array([self._places.get(key, -1) for key in keys], np.int64)
        known = places >= 0
        rows = torch.empty(len(keys), len(RAW_NAMES))
        rows[torch.from_numpy(known)] = self._rows[torch.from_numpy(places[known])]
        return rows, known

    def add(self, keys: Iterable[bytes], rows: Tensor) -> None:
        """Keeps rows that are not kept yet, in place of the oldest; those that are not finite are left out.

        Args:
            keys: N different ones, none of which is known.
            rows: [N, len(RAW_NAMES)] float32.
        """
        finite = rows.isfinite().all(1).tolist()  # what is not is an error to whoever sent it, each time
        kept = [(key, n) for n, key in enumerate(keys) if finite[n]][-self._capacity :] if self._capacity else []
        if not kept:
            return
        places = [(self._next + n) % self._capacity for n in range(len(kept))]
        for (key, _), place in zip(kept, places, strict=True):
            if place < len(self._keys):
                del self._places[self._keys[place]]
                self._keys[place] = key
            else:
                self._keys.append(key)
            self._places[key] = place
        self._rows[places] = rows[[n for _, n in kept]]
        self._next = (places[-1] + 1) % self._capacity
