"""Teaching: when a meta-update is due, of which samples it is made, and what happens when there is nothing to teach.

Knows the job that takes meta-updates, not what stands behind it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer_client.features import batch_features
from trainer_client.hypergradient import cotangent
from trainer_client.job import Job
from trainer_client.loss import per_sample_loss
from trainer_client.run.config import RunConfig
from trainer_client.run.forward import sample_losses, token_losses
from trainer_client.run.task import Task
from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)

_FLUSH_EVERY, _FLUSH_S = 16, 10.0


@dataclass
class TaughtCounts:
    """Meta-updates of a run so far."""

    sent: int = 0
    degenerate: int = 0


class Teacher:
    """Computes cotangents and hands them to a job, online every K steps or in the pauses between stages.

    Cheap teaching: the first `meta_batch` samples of the step's batch (its order is random) are taken for a batch of
    their own, the cotangent towards a few validation samples is a one-sided difference, and the losses of the training
    forward are reused. Both gradients are those of the parameters before the optimiser step, with P = I.
    """

    def __init__(self, job: Job, config: RunConfig, task: Task, model: torch.nn.Module) -> None:
        self._job, self._config, self._task, self._model = job, config, task, model
        self._device = next(model.parameters()).device
        self._unigram_nll = task.unigram_nll.to(self._device)
        self.counts = TaughtCounts()

    def teaches_at(self, step: int) -> bool:
        """Whether the online schedule has a meta-update in `step`."""
        return self._config.schedule == "online" and step % self._config.meta_every == 0

    def pauses_before(self, step: int) -> bool:
        """Whether the staged schedule begins a stage, other than the first, with `step`.

        During a stage this job sends nothing, so that its weights come from one version of a weighter of its own.
        """
        steps, stages = self._config.steps, self._config.stages
        return self._config.schedule == "staged" and step in {k * steps // stages for k in range(1, stages)}

    def teach(
        self, step: int, tokens: torch.Tensor, losses: torch.Tensor, scored_position: int, learning_rate: float
    ) -> None:
        """One meta-update from the batch of a step.

        Args:
            tokens: [B, T+1] ids of the batch.
            losses: [B, T] token losses at the model's present parameters, detached.
            scored_position: of the step's weights.
            learning_rate: of the step.
        """
        part = self._config.meta_batch
        validation = self._task.validation_draw(step, self._config.val_batch, self._device)
        self._send(f"step-{step}", step, tokens[:part], losses[:part], validation, scored_position, learning_rate)

    def teach_in_pause(self, step: int, learning_rate: float) -> None:
        """The meta-updates between two stages, on batches of their own; `step` is the next one to train."""
        for draw in range(self._config.stage_updates):
            tokens = self._task.pause_draw(step, self._config.meta_batch, self._device, draw)
            validation = self._task.validation_draw(step, self._config.val_batch, self._device, draw + 1)
            with torch.no_grad():
                losses = token_losses(self._model, tokens)
            self._send(f"pause-{step}-{draw}", step, tokens, losses, validation, None, learning_rate)
            if draw % _FLUSH_EVERY == 0:  # a job keeps a bounded number of updates that are not delivered
                self._job.flush(_FLUSH_S)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = TaughtCounts(**state)

    def _send(
        self,
        update_id: str,
        step: int,
        tokens: torch.Tensor,
        losses: torch.Tensor,
        validation: torch.Tensor,
        scored_position: int | None,
        learning_rate: float,
    ) -> None:
        try:
            taught = cotangent(
                self._model,
                sample_losses,
                tokens,
                validation,
                learning_rate=learning_rate,
                method=self._config.hypergradient,
                two_sided=False,
                base_losses=per_sample_loss(losses),
            )
        except InvalidArgument as exc:
            self._skip(step, exc)
            return
        features = batch_features(losses, self._unigram_nll[tokens[:, 1:]])
        self._job.meta_update(taught, features, step, scored_position=scored_position, update_id=update_id)
        self.counts.sent += 1

    def _skip(self, step: int, why: InvalidArgument) -> None:
        if not self.counts.degenerate:
            logger.warning("no meta-update in step %d: %s (later ones are only counted)", step, why)
        self.counts.degenerate += 1
