"""Which candidates are kept: Gumbel top-k on the logs of their weights, and some drawn evenly. Numpy only.

Knows neither jobs nor loaders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weighting_contract.errors import InvalidArgument

WARM_UP = 100  # steps; by measurement, docs/method.md
_EVEN_AT_FIRST = 0.75  # of a batch


@dataclass(frozen=True)
class Selection:
    """The batch of a step, as indices of its N candidates."""

    step: int
    kept: np.ndarray  # [B] int64: the probes first, then by decreasing log weight + noise
    probes: np.ndarray  # [B] bool, drawn evenly from all candidates
    statistics: np.ndarray | None  # [B, F] float32 of those kept, to teach with; None on a fallback
    position: int  # of the weighter that scored; on a fallback the last one known
    fallback: bool  # the first candidates as they came, as they could not be scored, or were not more than B
    trust: float  # the factor in [0, 1] that was on the logits; on a fallback 0
    weights: np.ndarray  # [B] float32 of those kept, of mean 1 over all candidates; on a fallback all 1
    all_statistics: np.ndarray | None = None  # [N, F] float32 of all candidates; None where `statistics` is
    computed_samples: int | None = None  # candidates that the reference computed for it; None: not known, or a fallback


def evenly_in_warm_up(step: int, keep: int, warm_up: int) -> int:
    """Samples of a step's batch that are drawn evenly: three quarters while the model is new, none from `warm_up` on.

    What all texts have in common is learned first, and from all of them sooner than from those that are preferred.

    Args:
        step: of the optimiser, from 0.
        keep: samples of the batch.
        warm_up: steps; 0: none are drawn so.
    """
    return round(_EVEN_AT_FIRST * keep * max(0.0, 1 - step / warm_up)) if warm_up else 0


def keep_highest(scores: np.ndarray, keep: int, evenly: int, seed: Sequence[int]) -> np.ndarray:
    """[keep] int64 of N candidates: `evenly` that are drawn from all N, then those of the highest scores as they came.

    Args:
        scores: [N].
        keep, evenly, seed: as of `choose`, with `evenly` for its probes.
    """
    drawn = np.random.default_rng(seed).choice(len(scores), evenly, replace=False)
    order = np.argsort(-scores, kind="stable")
    best = order[~np.isin(order, drawn)][: keep - evenly]
    return np.concatenate([drawn, np.sort(best)]).astype(np.int64)


def choose(
    weights: np.ndarray, keep: int, probes: int, seed: Sequence[int], *, from_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which of N candidates to keep, and which of these are probes.

    First `probes` are drawn evenly from all N. The other places go, without replacement and with probabilities in
    proportion to the weights, to the rest: to the largest log w_i + g_i with g_i of the standard Gumbel distribution
    (Kool et al. 2019, arXiv 1903.06059). Candidates of weight 0 are kept only where there are no others left.

    With `from_first` the largest g_i go to the first candidates, at random among them, and the probes are drawn from
    these. Where candidates come in random order, that draws from the very same distribution; but equal weights keep the
    first ones, and nearly equal ones most of them. So where these are the batch that a training without a choice would
    have, one whose weighter has nothing to say passes over its data as that does, and sees no sample again before all
    others (which cost 1.3 % of the loss on a small pool).

    Args:
        weights: [N] finite, 0 or more.
        keep: places, 1 to N.
        probes: of these, 0 to keep.
        seed: whole numbers from 0, such as a job's seed and the step; equal ones give equal choices.
        from_first: candidates are in random order, and the first `keep` are the batch without a choice.

    Returns:
        (kept [keep] int64, probes [keep] bool): the probes first, then by decreasing log w_i + g_i.

    Raises:
        InvalidArgument: weights that are no weights, or numbers that do not fit together.
    """
    weights = np.asarray(weights)
    if weights.ndim != 1 or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InvalidArgument(f"weights of shape {list(weights.shape)}: expected [N], all finite and 0 or more")
    if not 1 <= keep <= len(weights):
        raise InvalidArgument(f"keep is {keep}, expected from 1 to {len(weights)}, the number of candidates")
    if not 0 <= probes <= keep:
        raise InvalidArgument(f"probes is {probes}, expected from 0 to {keep}, the number of candidates that are kept")
    generator = np.random.default_rng(list(seed))
    drawn = generator.choice(keep if from_first else len(weights), probes, replace=False)
    noise = generator.gumbel(size=len(weights))
    if from_first:
        largest_first = np.sort(noise)[::-1]
        noise = np.concatenate([generator.permutation(part) for part in np.split(largest_first, [keep])])
    with np.errstate(divide="ignore"):
        logs = np.log(weights.astype(np.float64))
    # Zeros come last, among themselves in the order of the noise.
    order = np.lexsort((-np.where(np.isfinite(logs), logs + noise, noise), weights == 0))
    others = order[~np.isin(order, drawn)][: keep - probes]
    return np.concatenate([drawn, others]).astype(np.int64), np.arange(keep) < probes
