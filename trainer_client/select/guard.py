"""Logits to weights with a guard on the effective sample size, as the service's weighters do it. Numpy only.

Knows neither jobs nor where logits come from.
"""

from __future__ import annotations

import numpy as np

from weighting_contract.errors import InvalidArgument

_SMALLEST_EXPONENT = -64.0  # factors of 2^-64 and less count as 0, that is as even weights
_HALVINGS = 60


def guarded_weights(logits: np.ndarray, temperature: float, min_effective_share: float) -> np.ndarray:
    """Weights of mean 1, no more uneven than the guard allows.

        w = N softmax(f z / temperature)    with the largest f <= 1 for which (sum w)^2 / sum w^2 >= share N

    Temperature 0 is the limit without a guard: all weight, evenly, on the samples of the highest logit.

    Args:
        logits: [N] finite, N of 1 or more.
        temperature: 0 or more.
        min_effective_share: least effective sample size / N, from 0 to 1; without effect at temperature 0.

    Returns:
        [N] float32.

    Raises:
        InvalidArgument: logits that are not finite or no vector, or numbers out of range.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InvalidArgument(f"logits of shape {list(values.shape)}: expected [N], all finite")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise InvalidArgument(f"temperature is {temperature}, expected a finite number of 0 or more")
    if not 0 <= min_effective_share <= 1:
        raise InvalidArgument(f"min_effective_share is {min_effective_share}, expected from 0 to 1")
    below = values - values.max()
    if temperature == 0:
        return _of_shares((below == 0).astype(np.float64))
    scaled = below / temperature
    return _of_shares(np.exp(scaled * _factor(scaled, min_effective_share)))


def _factor(scaled: np.ndarray, min_effective_share: float) -> float:
    """The effective sample size falls as the factor grows, so halving its exponent's range finds the largest one."""
    least = min_effective_share * len(scaled)

    def admissible(factor: float) -> bool:
        shares = np.exp(scaled * factor)
        return bool(shares.sum() ** 2 >= least * np.square(shares).sum())

    if admissible(1.0):
        return 1.0
    low, high = _SMALLEST_EXPONENT, 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if admissible(2.0**middle) else (low, middle)
    return 2.0**low if low > _SMALLEST_EXPONENT else 0.0


def _of_shares(shares: np.ndarray) -> np.ndarray:
    """exp * (N / sum) rather than N * softmax: equal logits give exactly 1."""
    weights: np.ndarray = (shares * (len(shares) / shares.sum())).astype(np.float32)
    return weights
