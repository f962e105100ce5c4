"""What is done with a judge's logits: a batch is chosen from candidates, or the batch as drawn is weighed.

Know judges by what they do. A step that is on record is not judged again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from trainer_client.loss import per_sample_loss
from trainer_client.run.choose import Choice
from trainer_client.run.compute import scoring_flops
from trainer_client.run.data import BatchOrder
from trainer_client.run.forward import sample_losses
from trainer_client.run.methods.judge import Judge, Sharpness
from trainer_client.run.models import count_parameters
from trainer_client.run.preferences import UNKNOWN, loss_quarters
from trainer_client.run.recorder import Record, Recorder
from trainer_client.run.task import Task
from trainer_client.run.weigh import Weights
from trainer_client.select.choice import choose, evenly_in_warm_up, keep_highest
from weighting_contract.errors import InvalidArgument

Passes = Callable[[], AbstractContextManager[Any]]  # around the trainer's forward passes, such as autocast


class JudgedChooser:
    """Of each step's candidates those that a judge prefers.

    As many as a batch has are kept by Gumbel top-k on log w, seeded by (seed, step), with the weights w that
    `sharpness` makes of the logits. At temperature 0 those of the highest logits are, in the order they were drawn.
    In a warm-up those that are drawn evenly come first.
    """

    def __init__(
        self,
        judge: Judge,
        sharpness: Sharpness,
        task: Task,
        model: torch.nn.Module,
        recorder: Recorder,
        keep: int,
        passes: Passes = nullcontext,
        warm_up: int = 0,
    ) -> None:
        """
        Args:
            model: the trainer's, for the losses of candidates where the judge reads them.
            recorder: of the run's choices, with `keep` of the candidates of a step.
            keep: samples of a batch.
            warm_up: first steps, in which some are drawn evenly (`evenly_in_warm_up`).
        """
        self._judge, self._sharpness, self._task = judge, sharpness, task
        self._model, self._recorder, self._keep, self._passes = model, recorder, keep, passes
        self._warm_up = warm_up
        self._device = next(model.parameters()).device

    def choose(self, step: int) -> Choice:
        drawn = self._task.candidate_order.indices(step)
        record = self._recorder.get(step) or self._judged(step, drawn)
        kept = drawn[record.kept]
        return Choice(kept, drawn, record.probes, quarters=record.quarters)

    def flops(self, steps: int) -> float:
        """What judging the candidates of so many steps takes, the losses of all of them included."""
        order = self._task.candidate_order
        samples = steps * order.batch_size
        length = self._task.train.tokens.shape[1] - 1
        losses = scoring_flops(count_parameters(self._model), samples * length) if self._judge.reads_losses else 0.0
        return self._judge.cost.of(steps, samples, len(order.drawn(steps))) + losses

    @property
    def trained_flops(self) -> float:
        """What training the models took that the judge reads."""
        return self._judge.cost.training

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _judged(self, step: int, drawn: np.ndarray) -> Record:
        tokens = self._task.tokens(drawn, self._device)
        with self._passes():
            losses = self._losses(tokens)
            logits = self._judge.logits(step, drawn, tokens, losses)
        weights = self._sharpness.weights(logits, step)
        seed, evenly = (self._task.seed, step), evenly_in_warm_up(step, self._keep, self._warm_up)
        if self._sharpness.temperature == 0:
            kept = keep_highest(logits, self._keep, evenly, seed)
        else:
            kept, _ = choose(weights, self._keep, evenly, seed, from_first=True)
        quarters = None if losses is None else loss_quarters(losses.float().cpu().numpy())[kept]
        record = _record(step, np.ones(self._keep, np.float32), kept, quarters, evenly)
        self._recorder.append(record)
        return record

    def _losses(self, tokens: torch.Tensor) -> torch.Tensor | None:
        if not self._judge.reads_losses:
            return None
        with torch.no_grad():
            return torch.cat([sample_losses(self._model, part) for part in torch.split(tokens, self._keep)])


class JudgedWeigher:
    """The weights that `sharpness` makes of a judge's logits of the batch as it is drawn."""

    def __init__(
        self, judge: Judge, sharpness: Sharpness, task: Task, recorder: Recorder, passes: Passes = nullcontext
    ) -> None:
        """
        Args:
            recorder: of the run's weights.
        """
        self._judge, self._sharpness, self._task, self._recorder = judge, sharpness, task, recorder
        self._passes = passes

    @property
    def reads_losses(self) -> bool:
        return self._judge.reads_losses

    def weigh(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Weights:
        record = self._recorder.get(step) or self._judged(step, losses, tokens)
        return Weights(record.weights)

    def recorded(self, steps: int) -> np.ndarray:
        records = [self._recorder.get(step) for step in range(steps)]
        return np.stack([record.weights for record in records if record is not None])

    def flops(self, steps: int) -> float:
        """What judging so many batches takes; the losses are those of the training forward."""
        order = self._task.order
        return self._judge.cost.of(steps, steps * order.batch_size, len(order.drawn(steps)))

    @property
    def trained_flops(self) -> float:
        """What training the models took that the judge reads."""
        return self._judge.cost.training

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _judged(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Record:
        indices = self._task.order.indices(step)
        samples = per_sample_loss(losses.detach()) if self.reads_losses else None
        with self._passes():
            logits = self._judge.logits(step, indices, tokens, samples)
        record = _record(step, self._sharpness.weights(logits, step), np.arange(len(indices)))
        self._recorder.append(record)
        return record


class LabelledBatches:
    """Full batches of the target's samples, drawn from the whole pool: the most that choosing by label can give."""

    def __init__(self, task: Task, labelled: np.ndarray, keep: int) -> None:
        """
        Args:
            labelled: [N] bool, the target's among all training samples.
            keep: samples of a batch.

        Raises:
            InvalidArgument: there are fewer of them than a batch has.
        """
        self._task, self._rows = task, np.flatnonzero(labelled)
        if len(self._rows) < keep:
            raise InvalidArgument(
                f"only {len(self._rows)} training samples are of the target's sources, fewer than a batch of {keep}: "
                "name others with --oracle-source, or lower --batch-size"
            )
        self._order = BatchOrder(self._rows, keep, task.seed)

    def choose(self, step: int) -> Choice:
        indices = self._rows[self._order.indices(step)]
        return Choice(indices, indices, probes=0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _record(
    step: int, weights: np.ndarray, kept: np.ndarray, quarters: np.ndarray | None = None, evenly: int = 0
) -> Record:
    return Record(
        step=step,
        weights=weights,
        kept=kept,
        probes=evenly,
        position=0,
        fallback=False,
        trust=1.0,
        taught=0,
        quarters=np.full(len(kept), UNKNOWN, np.int8) if quarters is None else quarters,
    )
