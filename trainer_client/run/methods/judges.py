"""The judges: how useful a sample is, by chance, by label, by loss, by likeness, by gradient, by two models.

Know the trainer's model and samples; nothing of what is done with their logits.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from trainer_client.hypergradient import DegenerateCotangent, cotangent
from trainer_client.run.compute import scoring_flops, training_flops
from trainer_client.run.forward import sample_losses
from trainer_client.run.methods.judge import Cost
from trainer_client.run.models import count_parameters
from trainer_client.run.task import Task

logger = logging.getLogger(__name__)

_RANDOM_STREAM = 3  # keeps these draws apart from other draws of the same seed


class RandomJudge:
    """Logits drawn from the normal distribution: the control at equal effective sample size."""

    reads_losses = False
    cost = Cost()

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        drawn = np.random.default_rng([self._seed, _RANDOM_STREAM, step]).standard_normal(len(indices))
        return drawn.astype(np.float32)


class StaticJudge:
    """Logits that every training sample has once and for all, such as its label or a difference of two models."""

    reads_losses = False

    def __init__(self, values: np.ndarray, cost: Cost | None = None) -> None:
        """
        Args:
            values: [N] of all training samples; what a run does not draw may be NaN.
            cost: of having made them; None: nothing.
        """
        self._values, self.cost = values.astype(np.float32), cost or Cost()

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        values: np.ndarray = self._values[indices]
        return values


class LossJudge:
    """LinUpper (Sow et al., ICLR 2025, arXiv 2502.06733): low losses count less, those above the middle all alike.

        logit = min(h + 1, 1)    with h the loss, scaled so that those judged together span [-1, 1]

    The cap is what keeps outliers, mostly noise, from taking over. The paper trains evenly in the first steps; here the
    losses are still alike then, and their standardised logits are not: this judge counts from step 0.
    """

    reads_losses = True
    cost = Cost()

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        assert losses is not None
        return lin_upper(losses.cpu().numpy())


def lin_upper(losses: np.ndarray) -> np.ndarray:
    """[n] float32 from 0 for the lowest loss to 1 from the middle between lowest and highest on."""
    low, high = float(losses.min()), float(losses.max())
    if high <= low:
        return np.zeros(len(losses), np.float32)
    scaled = 2 * (losses - low) / (high - low) - 1
    return np.minimum(scaled + 1, 1).astype(np.float32)


class ReducibleLossJudge:
    """RHO-LOSS (Mindermann et al., ICML 2022, arXiv 2206.07137): the trainer's loss minus that of a holdout model.

    High where there is something left to learn that the holdout model, which was tuned on validation documents, knows:
    not for what is learned already, nor for noise, nor for what those documents say nothing about.
    """

    reads_losses = True

    def __init__(self, holdout_losses: np.ndarray, cost: Cost) -> None:
        """
        Args:
            holdout_losses: [N] nats, mean token losses of the training samples by the holdout model; NaN for those
                that a run does not draw.
            cost: of having made them.
        """
        self._holdout_losses, self.cost = holdout_losses, cost

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        assert losses is not None
        reducible: np.ndarray = losses.cpu().numpy() - self._holdout_losses[indices]
        return reducible.astype(np.float32)


class SimilarityJudge:
    """ADAPT (Zhao et al. 2026, arXiv 2605.05227): cosine of a sample's hidden state to the mean of validation samples'.

    Hidden states are the trainer's last ones, averaged over the sample's places. The validation samples are drawn anew
    for each step, as many as a batch has.
    """

    reads_losses = False

    def __init__(self, model: torch.nn.Module, task: Task, draw: int) -> None:
        """
        Args:
            model: the trainer's, a causal LM of transformers.
            draw: validation samples of a step.
        """
        self._model: Any = model
        self._task = task
        self._draw = min(draw, len(task.val))
        forward = scoring_flops(count_parameters(model), task.val.tokens.shape[1] - 1)
        self.cost = Cost(per_sample=forward, per_step=forward * self._draw)

    @torch.no_grad()
    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        validation = self._task.validation_draw(step, self._draw, tokens.device)
        target = self._hidden(validation).mean(0)  # [H]
        pooled = torch.cat([self._hidden(part) for part in torch.split(tokens, self._draw)])  # [n, H]
        similarity: np.ndarray = torch.cosine_similarity(pooled, target[None]).cpu().numpy()
        return similarity

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, H] float32"""
        states: torch.Tensor = self._model.base_model(tokens[:, :-1]).last_hidden_state
        return states.float().mean(1)


class AlignmentJudge:
    """GREATS' inner products (Wang et al., NeurIPS 2024, arXiv 2406.11011): -c, the step's own cotangent, as it is.

    How much a small step along a sample's gradient lowers the loss of a few validation samples, by one-sided
    differences as a weighter is taught. Without GREATS' correction for samples that say the same.
    """

    reads_losses = True

    def __init__(self, model: torch.nn.Module, task: Task, draw: int) -> None:
        """
        Args:
            model: the trainer's.
            draw: validation samples behind the cotangent of a step.
        """
        self._model, self._task = model, task
        self._draw = min(draw, len(task.val))
        parameters, length = count_parameters(model), task.val.tokens.shape[1] - 1
        self.cost = Cost(
            per_sample=scoring_flops(parameters, length), per_step=training_flops(parameters, self._draw * length)
        )
        self._warned = False

    def logits(self, step: int, indices: np.ndarray, tokens: torch.Tensor, losses: torch.Tensor | None) -> np.ndarray:
        validation = self._task.validation_draw(step, self._draw, tokens.device)
        try:
            found = cotangent(
                self._model,
                sample_losses,
                tokens,
                validation,
                learning_rate=1.0,  # scales all alike
                two_sided=False,
                base_losses=losses,
            )
        except DegenerateCotangent as exc:
            if not self._warned:
                logger.warning("step %d counts all samples alike: %s (later ones do so silently)", step, exc)
            self._warned = True
            return np.zeros(len(indices), np.float32)
        aligned: np.ndarray = (-found).cpu().numpy()
        return aligned
