"""Sums and means over the last steps, for what is noisy from one step to the next. Numpy only."""

from __future__ import annotations

import numpy as np


def moving_sum(values: np.ndarray, window: int) -> np.ndarray:
    """[S] sums over the last `window` steps, or as many as there are."""
    sums = np.cumsum(values)
    before = np.arange(len(values)) - window
    return np.asarray(sums - np.where(before >= 0, sums[before], 0))


def moving_ratio(above: np.ndarray, below: np.ndarray, window: int, least: float = 1e-9) -> np.ndarray:
    """[S] ratio of two sums over the last `window` steps; not a number where the one below is not above `least`."""
    top, bottom = moving_sum(above, window), moving_sum(below, window)
    result = np.full(len(top), np.nan)
    np.divide(top, bottom, out=result, where=bottom > least)
    return result


def moving_mean(values: np.ndarray, window: int, least: float = 0.5) -> np.ndarray:
    """[S] means over those of the last `window` steps that are numbers; not one where there are `least` or fewer."""
    there = np.isfinite(values)
    return moving_ratio(np.where(there, values, 0.0), there.astype(np.float64), window, least)
