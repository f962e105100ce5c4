"""Rows of token ids of different lengths as one array. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded(
    rows: Sequence[Sequence[int] | np.ndarray], dtype: np.dtype | type[np.integer] = np.int64
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, one or more, as [B, T], padded on the right with 0, and their lengths [B] int64."""
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), int(lengths.max())), dtype)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return tokens, lengths
