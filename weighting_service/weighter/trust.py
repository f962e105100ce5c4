"""How far a weighter's word has proved right for a job: the factor in [0, 1] on the job's logits.

What an update says is the correlation of -cotangent with the logits given before, over its samples: whether a high
logit went with a helpful sample. Samples that were chosen by their logits count as well, as a choice by the one side of
a regression does not bias its slope; but without some that were drawn evenly, the *probes*, logits would differ too
little to say much. For the same reason an update of chosen samples counts by the variance of its logits, as it would
for a slope: one whose samples were chosen for being alike shows nothing either way. And what choosing costs is taken
from its correlation. A fresh weighter's first lessons don't count where samples were chosen: what one cotangent taught,
the next ones repeat for as long as all texts are as new to the model, and on data that are all alike, too.

Plain float64 arithmetic on the CPU, so that it is the same on every device. Knows no model and nothing of how a
weighter learns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY = 0.995  # of the moments, per probed update: the last two hundred count
LEAST_PROBES = 2  # of an update that counts
FIRST_LESSONS = 24  # of a fresh weighter: what it prefers meanwhile agrees with the next cotangents in any case
LEAST_UPDATES = 8  # probed ones; before, nothing is held against the weighter
COST_OF_CHOICE = 0.07  # what choosing gains in one step by less, it loses by seeing fewer samples more often
NEW_FOR = 100  # optimiser steps of a trainer, as many as selection warms up by default
COST_WHILE_NEW = 0.15  # then easy texts help with every other text, and who prefers them agrees with every cotangent
DISTRUSTED_T = 3.0  # trust is 0 up to it, and whole from one more on
LARGEST_T = 1e6  # in place of infinity, where every update agreed to the same degree


@dataclass(frozen=True)
class TrustSignal:
    """Weighted moments of what each update so far says, x; weights fade by `MEMORY`."""

    updates: int = 0  # probed ones
    weight: float = 0.0  # sum of the weights w
    weight_squares: float = 0.0  # sum of w^2
    weight_products: float = 0.0  # sum of w_i w_j over i other than j: (sum w)^2 - sum w^2, without its rounding
    mean: float = 0.0
    squares: float = 0.0  # sum of w (x - mean)^2
    while_new: bool = False  # the trainer is new, and `COST_WHILE_NEW` was taken from each x

    def add(self, x: float, weight: float) -> TrustSignal:
        """With one more update's agreement. Moves mean and squares together, so that nothing cancels (West, 1979).

        Args:
            weight: above 0: the variance of the logits of chosen samples, 1 for samples as they were drawn.
        """
        before = MEMORY * self.weight
        total = before + weight
        off = x - self.mean
        return TrustSignal(
            updates=self.updates + 1,
            weight=total,
            weight_squares=MEMORY**2 * self.weight_squares + weight**2,
            weight_products=MEMORY**2 * self.weight_products + 2 * before * weight,
            mean=self.mean + off * weight / total,
            squares=MEMORY * self.squares + off**2 * (before * weight / total),
            while_new=self.while_new,
        )

    def of_chosen(self, agreement: float, weight: float, *, while_new: bool) -> TrustSignal:
        """With the agreement of an update of chosen samples, less what choosing costs.

        More is taken off while the trainer is new. Trust that is whole by then was earned, and is kept by what others
        have: the difference is given back. By measurement, docs/method.md: in the first 32 steps weighters that then
        did harm agreed by up to 0.31, those that helped mostly by more; later these agreed by as little as 0.1, as
        their choice leaves little to disagree on.

        Args:
            while_new: the weighter was taught elsewhere, and the trainer is in its first `NEW_FOR` steps. (A fresh
                weighter has its `FIRST_LESSONS` instead.)
        """
        signal = self
        if self.while_new and not while_new:
            given_back = COST_WHILE_NEW - COST_OF_CHOICE if self.factor == 1 else 0.0
            signal = replace(self, mean=self.mean + given_back, while_new=False)
        elif while_new and not self.updates:
            signal = replace(self, while_new=True)
        return signal.add(agreement - (COST_WHILE_NEW if signal.while_new else COST_OF_CHOICE), weight)

    @property
    def t(self) -> float:
        """Mean over its standard error, in [-LARGEST_T, LARGEST_T]; 0 before the second probed update.

            t = mean / sqrt(variance / (n - 1)),   n = (sum w)^2 / sum w^2   the effective number of updates

        `variance` is the weighted mean square about the mean; over n - 1 rather than n, as it is about the sample's
        own mean.
        """
        if not self.weight_products:
            return 0.0
        error = math.sqrt(self.squares / self.weight * (self.weight_squares / self.weight_products))
        if error <= abs(self.mean) / LARGEST_T:
            return math.copysign(LARGEST_T, self.mean) if self.mean else 0.0
        return self.mean / error

    @property
    def factor(self) -> float:
        """clip(t - 3, 0, 1); 1 before the eighth probed update."""
        if self.updates < LEAST_UPDATES:
            return 1.0
        return min(max(self.t - DISTRUSTED_T, 0.0), 1.0)
