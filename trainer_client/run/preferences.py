"""What a step preferred: how much counts of what was drawn, by source, length, loss and times seen. Numpy only.

Knows samples, weights and cotangents; nothing of models, of the service, or of who decided. What a run has trained on
before is counted from its choices, so that a resumed run has the figures of an uninterrupted one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer_client.run.data import Samples

MOST_GROUPS = 12  # sources that have figures of their own; all others of the samples count as one
OTHERS = "all others"
QUARTERS = ("q1", "q2", "q3", "q4")  # by loss, the lowest first
SEEN = ("0", "1", "2", "3+")  # times that the run has trained on a sample before
UNKNOWN = -1  # in place of a quarter

_MOST_LENGTHS = 6
_DIGITS = 5


def loss_quarters(losses: np.ndarray) -> np.ndarray:
    """[N] int8: 0 for the lowest quarter of the losses to 3 for the highest; equal ones in the order they come.

    Args:
        losses: [N] finite, in any unit.
    """
    quarters = np.empty(len(losses), np.int8)
    quarters[np.argsort(losses, kind="stable")] = np.arange(len(losses)) * len(QUARTERS) // len(losses)
    return quarters


class Preferences:
    """The figures of each step of a run, in the order of the steps.

    By group of samples there are two shares: of what was drawn, the step's candidates or the batch as it is drawn, and
    of what was trained on, each sample by its weight. The second over the first is the group's relative weight: 1 for
    even weights, and the mean weight where a batch is weighed as it was drawn. Groups that a step drew none of are left
    out.
    """

    def __init__(self, train: Samples) -> None:
        """
        Args:
            train: the samples that steps are made of.
        """
        self._sources, self._source = _groups_by_source(train)
        self._lengths, self._length = _groups_by_length(train)
        self._seen = np.zeros(len(train), np.int32)

    def trained(self, indices: np.ndarray) -> None:
        """A step was trained on these samples [B]."""
        np.add.at(self._seen, indices, 1)  # a batch may hold a sample twice

    def of_step(
        self,
        indices: np.ndarray,
        drawn: np.ndarray,
        weights: np.ndarray,
        losses: np.ndarray,
        quarters: np.ndarray | None,
        cotangent: np.ndarray | None,
    ) -> dict[str, Any]:
        """The metrics of a step, before its samples are counted.

        Args:
            indices: [B] of the training samples, those trained on.
            drawn: [D] those they were chosen from; equal to `indices` for a batch as drawn.
            weights: [B] of mean 1.
            losses: [B] nats, the trainer's.
            quarters: [B] as of `loss_quarters` among those drawn; None: not known where the batch was chosen.
            cotangent: [n] dL_val/dw of the first n samples; None: the step was not taught.

        Returns:
            `mean_weight` and `trained_share` by source; `preference`: by "source", "length", "loss" and "seen" for each
            group [share of what was drawn, share of what was trained on]; `cotangent`: its mean by source, where there
            is one. A group with a negative mean helps: more weight on it lowers the validation loss.
        """
        if quarters is None and np.array_equal(indices, drawn):
            quarters = loss_quarters(losses)
        known = quarters is not None and (quarters != UNKNOWN).all()
        of_drawn = np.arange(len(drawn)) * len(QUARTERS) // len(drawn)
        source = self._source[indices]
        by_source = _shares(self._sources, self._source[drawn], source, weights)
        figures = {
            "mean_weight": _means(self._sources, source, weights),
            "trained_share": {name: by_source.get(name, [0.0, 0.0])[1] for name in self._sources},
            "preference": {
                "source": by_source,
                "length": _shares(self._lengths, self._length[drawn], self._length[indices], weights),
                **({"loss": _shares(QUARTERS, of_drawn, quarters, weights)} if quarters is not None and known else {}),
                "seen": _shares(SEEN, self._times(drawn), self._times(indices), weights),
            },
        }
        if cotangent is not None:
            figures["cotangent"] = _means(self._sources, source[: len(cotangent)], cotangent, f".{_DIGITS}g")
        return figures

    def _times(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(np.minimum(self._seen[indices], len(SEEN) - 1))


def _groups_by_source(train: Samples) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and [N] the index of each sample's."""
    counts = np.bincount(train.source_index, minlength=len(train.sources))
    if len(counts) <= MOST_GROUPS:
        return train.sources, train.source_index
    own = np.sort(np.argsort(-counts, kind="stable")[: MOST_GROUPS - 1])
    index_of = np.full(len(counts), len(own))
    index_of[own] = np.arange(len(own))
    return (*(train.sources[i] for i in own), OTHERS), index_of[train.source_index]


def _groups_by_length(train: Samples) -> tuple[tuple[str, ...], np.ndarray]:
    """By the tokens of a sample's document: names of ranges, and [N] the index of each sample's.

    Ranges are from one power of two to the next. Where they are too many, the emptier one of the two at the ends is
    joined to its neighbour, again and again.
    """
    width = train.tokens.shape[1]
    tokens = np.full(len(train), width)
    if train.document_tokens is not None and train.document_index is not None:
        tokens = train.document_tokens[train.document_index]
    exponents = np.floor(np.log2(tokens)).astype(np.int64)
    lowest = int(exponents.min())
    counts = np.bincount(exponents - lowest).tolist()
    first, last = 0, len(counts) - 1
    while last - first >= _MOST_LENGTHS:
        if counts[first] <= counts[last]:
            counts[first + 1] += counts[first]
            first += 1
        else:
            counts[last - 1] += counts[last]
            last -= 1
    names = [f"{1 << e}-{(2 << e) - 1}" for e in range(lowest + first, lowest + last + 1)]
    if first:
        names[0] = f"under {2 << (lowest + first)}"
    if last < len(counts) - 1:
        names[-1] = f"{1 << (lowest + last)} or more"
    return tuple(names), np.clip(exponents - lowest, first, last) - first


def _shares(
    names: tuple[str, ...], drawn: np.ndarray, trained: np.ndarray, weights: np.ndarray
) -> dict[str, list[float]]:
    """Of each group that was drawn [share of the drawn, share of the trained by weight]; both add up to 1."""
    before = np.bincount(drawn, minlength=len(names)) / len(drawn)
    after = np.bincount(trained, weights, minlength=len(names)) / weights.sum(dtype=np.float64)
    return {
        name: [round(float(b), _DIGITS), round(float(a), _DIGITS)]
        for name, b, a in zip(names, before, after, strict=True)
        if b or a
    }


def _means(
    names: tuple[str, ...], index: np.ndarray, values: np.ndarray, form: str = f".{_DIGITS}f"
) -> dict[str, float]:
    """The mean value of each group that there is."""
    counts = np.bincount(index, minlength=len(names))
    sums = np.bincount(index, values, minlength=len(names))
    return {name: float(format(sums[i] / counts[i], form)) for i, name in enumerate(names) if counts[i]}
