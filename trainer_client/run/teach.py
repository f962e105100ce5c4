"""Teaching: when a meta-update is due, of which samples it is made, and what happens when there is nothing to teach.

Knows those that learn from a meta-update by what they do, not what stands behind them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trainer_client.cadence import Cadence
from trainer_client.hypergradient import cotangent
from trainer_client.loss import per_sample_loss
from trainer_client.ranks import Ranks
from trainer_client.run.config import RunConfig
from trainer_client.run.forward import sample_losses, token_losses
from trainer_client.run.parallel import autocast
from trainer_client.run.task import Task
from weighting_contract.errors import FailedPrecondition, InvalidArgument

logger = logging.getLogger(__name__)

_FLUSH_EVERY = 16


@dataclass(frozen=True)
class MetaBatch:
    """The samples of a meta-update and how the validation loss depends on their weights."""

    update_id: str
    step: int
    in_pause: bool  # between two stages, of samples that no step has scored
    tokens: torch.Tensor  # [n, T+1] token ids
    losses: torch.Tensor  # [n, T] token losses, nats
    probes: np.ndarray  # [n] bool, drawn evenly
    cotangent: torch.Tensor  # [n]


class Learner(Protocol):
    """Somebody who learns from meta-updates."""

    def learn(self, batch: MetaBatch) -> bool:
        """Takes a meta-update; whether there was something to learn from."""

    def flush(self, step: int) -> None:
        """Sees to it that the meta-updates of the steps before `step` are delivered."""


@dataclass
class TaughtCounts:
    """Meta-updates of a run so far."""

    computed: int = 0
    sent: int = 0
    degenerate: int = 0


class Teacher:
    """Computes cotangents and hands them over, online at a cadence or in the pauses between stages.

    Cheap teaching: the first `meta_batch` samples of the step's batch (their order is random, or the probes lead) are
    taken for a batch of their own, the cotangent towards a few validation samples is a one-sided difference, and the
    losses of the training forward are reused. Both gradients are those of the parameters before the optimiser step,
    with P = I.

    Collective: each rank computes its part of a cotangent, and the first one hands over the whole.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        model: torch.nn.Module,
        learners: Sequence[Learner],
        cadence: Cadence,
        *,
        held_out: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            learners: none on all ranks but the first.
            held_out: cotangents are towards the validation samples that no profile is made of.
        """
        self._held_out, self._ranks = held_out, ranks or Ranks.alone()
        self._config, self._task, self._model, self._learners = config, task, model, learners
        self._cadence = cadence
        self._device = next(model.parameters()).device
        self.counts = TaughtCounts()

    def teaches_at(self, step: int) -> bool:
        """Whether the online schedule has a meta-update in `step`."""
        return self._config.schedule == "online" and self._cadence.due(step)

    def pauses_before(self, step: int) -> bool:
        """Whether the staged schedule begins a stage, other than the first, with `step`.

        During a stage this job sends nothing, so that its weights come from one version of a weighter of its own.
        """
        steps, stages = self._config.steps, self._config.stages
        return self._config.schedule == "staged" and step in {k * steps // stages for k in range(1, stages)}

    def teach(
        self,
        step: int,
        tokens: torch.Tensor,
        losses: torch.Tensor | None,
        samples: torch.Tensor,
        probes: int,
        learning_rate: float,
    ) -> torch.Tensor | None:
        """One meta-update from the first samples of a step's batch; their cotangent [n], None where it is degenerate.

        Args:
            tokens: [n, T+1] their ids.
            losses: [n, T] their token losses at the model's present parameters, detached; on the first rank.
            samples: [n] their mean token losses.
            probes: the first so many samples of the batch were drawn evenly.
            learning_rate: of the step.
        """
        computed = self._cotangent(step, tokens, samples, self._validation(step), learning_rate)
        if computed is not None:
            even = np.arange(len(tokens)) < probes
            self._hand_over(lambda: MetaBatch(f"step-{step}", step, False, tokens, _there(losses), even, computed))
        return computed

    def teach_in_pause(self, step: int, learning_rate: float) -> None:
        """The meta-updates between two stages, on batches of their own; `step` is the next one to train."""
        for draw in range(self._config.stage_updates):
            tokens = self._task.pause_draw(step, self._config.meta_batch, self._device, draw)
            validation = self._validation(step, draw + 1)
            with torch.no_grad(), autocast(self._config, self._device):
                mine = token_losses(self._model, tokens[self._ranks.my_rows(len(tokens))])
            losses, samples = self._ranks.gather_rows(mine), self._ranks.all_rows(per_sample_loss(mine))
            computed = self._cotangent(step, tokens, samples, validation, learning_rate)
            if computed is not None:
                self._hand_over_of_pause(step, draw, tokens, losses, computed)
            if draw % _FLUSH_EVERY == 0:  # a job keeps a bounded number of updates that are not delivered
                self.flush(step)

    def flush(self, step: int) -> None:
        """Delivers the meta-updates of the steps before `step`."""

        def deliver() -> None:
            for learner in self._learners:
                learner.flush(step)

        self._ranks.from_first(deliver)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = TaughtCounts(**state)

    def _hand_over_of_pause(
        self, step: int, draw: int, tokens: torch.Tensor, losses: torch.Tensor | None, computed: torch.Tensor
    ) -> None:
        even = np.ones(len(tokens), np.bool_)
        self._hand_over(lambda: MetaBatch(f"pause-{step}-{draw}", step, True, tokens, _there(losses), even, computed))

    def _hand_over(self, made: Callable[[], MetaBatch]) -> None:
        def teach() -> bool:
            batch = made()
            learned = [learner.learn(batch) for learner in self._learners]
            return any(learned)

        self.counts.sent += self._ranks.from_first(teach)

    def _validation(self, step: int, draw: int = 0) -> torch.Tensor:
        return self._task.validation_draw(step, self._config.val_batch, self._device, draw, held_out=self._held_out)

    def _cotangent(
        self, step: int, tokens: torch.Tensor, samples: torch.Tensor, validation: torch.Tensor, learning_rate: float
    ) -> torch.Tensor | None:
        """[n], None where it is degenerate; the same on all ranks."""
        self.counts.computed += 1
        mine = self._ranks.my_rows(len(tokens))
        rows, objective = self._my_validation(validation)
        try:
            with autocast(self._config, self._device):
                computed = cotangent(
                    self._model,
                    sample_losses,
                    tokens[mine],
                    rows,
                    learning_rate=learning_rate,
                    method=self._config.hypergradient,
                    validation_loss=objective,
                    two_sided=False,
                    base_losses=samples[mine],
                    group=self._ranks.group,
                )
        except (InvalidArgument, FailedPrecondition) as exc:  # the second one: another rank's
            if not self.counts.degenerate and self._ranks.is_first:
                logger.warning("no meta-update in step %d: %s (later ones are only counted)", step, exc)
            self.counts.degenerate += 1
            return None
        return self._ranks.all_rows(computed)

    def _my_validation(
        self, validation: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None]:
        """This rank's rows, and their share of the mean over all rows; shares may differ, the ranks' mean is exact."""
        ranks, count = self._ranks, len(validation)
        if ranks.world == 1:
            return validation, None
        rows = validation[ranks.my_rows(count)]
        factor = ranks.world / count if len(rows) else 0.0
        return rows if len(rows) else validation[:1], lambda model, rows: sample_losses(model, rows).sum() * factor


def _there(losses: torch.Tensor | None) -> torch.Tensor:
    assert losses is not None  # on the first rank
    return losses
