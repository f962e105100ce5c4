"""What a judge is, what it costs, and how its logits become weights. Knows neither batches nor particular judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trainer_client.select.guard import guarded_weights
from weighting_contract.errors import InvalidArgument

_FLAT_BELOW = 1e-9  # logits that deviate by less, relative to the largest, are equal but for rounding


@dataclass(frozen=True)
class Cost:
    """Floating-point operations that judging takes."""

    per_sample: float = 0.0  # of each sample that is judged
    per_step: float = 0.0  # of each step, whatever the number of samples
    per_new_sample: float = 0.0  # of each sample when it is judged first, such as by a model that does not change
    training: float = 0.0  # of the models that the judge reads; not part of judging, as it is spent once a pool

    def of(self, steps: int, samples: int, different: int) -> float:
        """Of judging in so many steps, so many samples in all, of which so many are different ones."""
        return self.per_step * steps + self.per_sample * samples + self.per_new_sample * different


class Judge(Protocol):
    """Says how useful training samples are."""

    @property
    def reads_losses(self) -> bool:
        """Whether it needs the trainer's losses; where they are not at hand, they cost a forward pass."""

    @property
    def cost(self) -> Cost:
        """Without the forward pass for the losses."""

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        """[n] float32, higher is better; on any scale, as only their order and relative distances count.

        The same for equal (seed, step), samples and trainer.

        Args:
            step: optimiser step, from 0.
            indices: [n] int64, of the training samples.
            tokens: [n, T+1] their token ids, on the trainer's device.
            losses: [n] float32, the trainer's mean token losses in nats, detached; None where the judge reads none.
        """


@dataclass(frozen=True)
class Sharpness:
    """How much logits count. The same for all judges in one mode, so that they differ in their judgement only."""

    temperature: float  # that standardised logits are divided by; 0: the highest ones take all
    min_effective_share: float  # least effective sample size / number of samples

    def weights(self, logits: np.ndarray, step: int) -> np.ndarray:
        """[n] float32, mean 1.

        Raises:
            InvalidArgument: logits that are not finite, as of a trainer that has diverged.
        """
        return guarded_weights(standardised(logits, step), self.temperature, self.min_effective_share)


def standardised(logits: np.ndarray, step: int) -> np.ndarray:
    """[n] float64 of mean 0 and deviation 1; all 0 where the logits are equal.

    Raises:
        InvalidArgument: logits that are not finite.
    """
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise InvalidArgument(
            f"in step {step} the method's logits are not finite: the training has diverged; lower --lr and start again"
        )
    centred: np.ndarray = values - values.mean()
    deviation = float(centred.std())
    if deviation <= _FLAT_BELOW * float(np.abs(values).max()):
        return np.zeros_like(centred)
    return centred / deviation
