"""How much compute a run has taken, by the usual counts: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Per parameter and token of the meta-batch. One-sided differences reuse the training forward and add another one; the
# forward-mode derivative costs three; the second-order graph about three training steps.
_TEACHING_FLOPS = {"finite_difference": 2, "jvp": 6, "exact": 18}


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of a run.

    With N the parameters of a model, training takes 6 N per token (a forward and a backward pass), and a forward pass
    alone 2 N (Kaplan et al. 2020, arXiv 2001.08361):

        training  = 6 N_trainer x steps x B x T
        teaching  = meta-updates x (2 N_trainer x n x T, more for other ways to the cotangent + 6 N_trainer x v x T)
        scoring   = 2 N_reference x candidates computed x T; what a method's judge takes (run/methods)
        relative  = (training + teaching + scoring) / training: to a uniform run of as many steps

    with T tokens a sample, n samples of a meta-update and v validation samples. Whatever does not change is computed
    once a sample and counted once: candidates are, as the service says how many it computed (an older one doesn't: then
    all count), and so are samples that a method's frozen models read. Attention's share is left out, and so is the
    weighter itself, which reads one row of a few statistics a sample. What training the reference took is given beside
    it as `reference`: it is spent once a pool, and is no part of `relative`.
    """

    training_flops: float
    teaching_flops: float
    scoring_flops: float
    reference_flops: float

    @property
    def total(self) -> float:
        return self.training_flops + self.teaching_flops + self.scoring_flops

    @property
    def relative(self) -> float:
        return self.total / self.training_flops

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative": self.relative}


def training_flops(parameters: int, tokens: int) -> float:
    """Of a forward and a backward pass."""
    return 6.0 * parameters * tokens


def teaching_flops(parameters: int, method: str, taught_tokens: int, validation_tokens: int) -> float:
    """Of meta-updates over so many tokens of training and validation samples."""
    return float(_TEACHING_FLOPS[method] * parameters * taught_tokens + 6 * parameters * validation_tokens)


def scoring_flops(parameters: int, tokens: int) -> float:
    """Of a reference's forward pass over candidates."""
    return 2.0 * parameters * tokens
