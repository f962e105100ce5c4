"""How much each sample of a batch counts: all alike, or as a job's weighter says, through a record.

The record makes resuming exact. Knows nothing of models or optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from trainer_client.features import FEATURE_NAMES, batch_features
from trainer_client.job import Job, Scores
from trainer_client.pending import Pending
from trainer_client.run.deliver import deliver
from trainer_client.run.recorder import Record, Recorder
from trainer_client.run.task import Task
from trainer_client.run.teach import MetaBatch
from weighting_contract.columns import needs_profile

LEAST_SHARE = 0.4  # effective, inside a batch; also of weighters that were taught before, with a guard of their own


@dataclass(frozen=True)
class Weights:
    """The weights of a step."""

    values: np.ndarray  # [B] float32, mean 1
    fallback: bool = False  # all 1, as the weighter did not answer
    metrics: dict[str, Any] = field(default_factory=dict)  # of the answer


class Weigher(Protocol):
    """Gives the samples of each step their weights."""

    @property
    def reads_losses(self) -> bool:
        """Whether the weights depend on the trainer's losses."""

    def weigh(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Weights:
        """The weights of a step's batch.

        Args:
            step: optimiser step, from 0.
            losses: [B, T] nats, detached, of all tokens but the first; [B, 0] may do where they are not read.
            tokens: [B, T+1] token ids.
        """

    def recorded(self, steps: int) -> np.ndarray:
        """[steps, B] float32, the weights that the first `steps` steps were trained with."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Asks(Protocol):
    """A weigher that asks somebody, which takes a while."""

    def ask(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> None:
        """Sends for the weights of a step, whose `weigh` then waits for them; returns at once."""


class Even:
    """Weight 1 for every sample."""

    reads_losses = False

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def weigh(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Weights:
        return Weights(np.ones(self._batch_size, np.float32))

    def recorded(self, steps: int) -> np.ndarray:
        return np.ones((steps, self._batch_size), np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Learned:
    """Asks the job's weighter, records the answer, then hands it out; a recorded step is not asked about again.

    The weighter reads statistics of the trainer's own losses, and mostly those against the target, too: for them the
    trainer counts the n-grams of its validation and training samples. They are made on the CPU: on a GPU they would
    wait for the backward pass, which waits for the weights.
    """

    reads_losses = True

    def __init__(
        self,
        job: Job,
        recorder: Recorder,
        task: Task,
        *,
        columns: tuple[str, ...] = FEATURE_NAMES,
        taught_before: bool = False,
        inner: bool = False,
    ) -> None:
        """
        Args:
            columns: what the weighter reads, of `weighting_contract.columns.COLUMNS`.
            taught_before: it started from another, whose spec's guard may be for candidates.
            inner: it weighs what another weighter has selected; its metrics are called `inner_...` then.
        """
        self._job, self._recorder = job, recorder
        self._unigram_nll = task.unigram_nll
        self._names = columns
        self._table = task.target_table(task.profile_tokens) if needs_profile(columns) else None
        self._min_share = LEAST_SHARE if taught_before else None
        self._prefix = "inner_" if inner else ""
        self._asked: dict[int, Pending[Scores]] = {}  # by step, until it is weighed

    def ask(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> None:
        """Sends the features of a step that is not on record."""
        if self._recorder.get(step) is None:
            features = partial(self._features, losses.cpu(), tokens.cpu())  # made on the job's thread
            self._asked[step] = self._job.score_soon(features, step, min_effective_share=self._min_share)

    def weigh(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Weights:
        record = self._recorder.get(step) or self._answered(step, losses, tokens)
        metrics = {"position": record.position, "trust": record.trust}
        named = {self._prefix + name: value for name, value in metrics.items()}
        return Weights(record.weights, record.fallback, named)

    def learn(self, batch: MetaBatch) -> bool:
        """Teaches with the samples of a meta-update; the service knows those that it has already."""
        record = None if batch.in_pause else self._recorder.get(batch.step)
        self._job.meta_update(
            batch.cotangent,
            self._features(batch.losses.cpu(), batch.tokens.cpu()),
            batch.step,
            scored_position=None if record is None else record.position,
            update_id=batch.update_id,
            probes=batch.probes,
        )
        return True

    def flush(self, step: int) -> None:
        """Delivers the meta-updates so far, as far as the service is there to take them."""
        deliver(self._job)

    def recorded(self, steps: int) -> np.ndarray:
        records = [self._recorder.get(step) for step in range(steps)]
        return np.stack([record.weights for record in records if record is not None])

    def state_dict(self) -> dict[str, Any]:
        return {"job": self._job.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._job.load_state_dict(state["job"])

    def _answered(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Record:
        if step not in self._asked:
            self.ask(step, losses, tokens)
        scores = self._asked.pop(step).result()
        weights = scores.weights.float().cpu().numpy()
        record = Record(
            step=step,
            weights=weights,
            kept=np.arange(len(weights)),
            probes=len(weights),
            position=scores.position,
            fallback=scores.fallback,
            trust=scores.trust,
            taught=0,
        )
        self._recorder.append(record)
        return record

    def _features(self, losses: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        unigram_nll = self._unigram_nll[tokens[:, 1:]]
        return batch_features(losses, unigram_nll, names=self._names, tokens=tokens, profile=self._table)
