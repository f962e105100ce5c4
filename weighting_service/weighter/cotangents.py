"""What a job's cotangents say: brought to one scale, and how well the weighter's word agrees with them.

Plain float64 arithmetic on the CPU, so that it is the same on every device. Knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from weighting_contract.spec import LearningSpec
from weighting_service.weighter.trust import TrustSignal


@dataclass(frozen=True)
class RunningMean:
    """Mean of what was added so far."""

    count: int = 0
    mean: float = 0.0

    def add(self, value: float) -> RunningMean:
        count = self.count + 1
        return RunningMean(count, self.mean + (value - self.mean) / count)


@dataclass(frozen=True)
class JobSignal:
    """What is kept about one job: a mean square of its cotangents, their correlation with logits, and its trust.

    All but the trust move with the updates that were learned from; the trust moves with those that had probes.
    """

    updates: int = 0
    mean_square: float = 0.0  # not bias-corrected
    correlation: RunningMean = RunningMean()
    trust: TrustSignal = field(default_factory=TrustSignal)

    def rms(self, memory: float) -> float:
        """Running root mean square of the centred cotangents, corrected for the zero that it started from."""
        return math.sqrt(self.mean_square / (1 - memory**self.updates)) if self.updates else 0.0

    def observe(self, cotangent: np.ndarray, agreement: float, memory: float) -> JobSignal:
        """With one more centred cotangent [B], and its correlation with the logits given before it was learned."""
        return replace(
            self,
            updates=self.updates + 1,
            mean_square=memory * self.mean_square + (1 - memory) * float(np.mean(np.square(cotangent))),
            correlation=self.correlation.add(agreement),
        )


def centred(cotangent: np.ndarray) -> np.ndarray:
    """float64 [B] with mean 0. Weights have a fixed sum, so the mean says nothing about them."""
    values = cotangent.astype(np.float64)
    return np.asarray(values - values.mean())


def scaled(cotangent: np.ndarray, rms: float, learning: LearningSpec) -> np.ndarray:
    """A centred cotangent [B] in units of its job's running RMS, clipped to +-cotangent_clip; float32."""
    return np.clip(cotangent / rms, -learning.cotangent_clip, learning.cotangent_clip).astype(np.float32)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of [B] and [B]; 0 where either is constant, for it says nothing then."""
    a, b = centred(a), centred(b)
    norm = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if norm == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.clip((a @ b) / norm, -1.0, 1.0))
