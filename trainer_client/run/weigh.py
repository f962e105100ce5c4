"""Where the weights of a step come from: uniform, or a job's weighter through a record that makes resuming exact.

Knows nothing of models or optimisers.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from trainer_client.features import batch_features
from trainer_client.job import Job
from trainer_client.run.recorder import Record, Recorder


class Weigher(Protocol):
    """Gives the samples of each step their weights."""

    method: str

    def weigh(self, step: int, token_losses: torch.Tensor, labels: torch.Tensor) -> Record:
        """The weights of a step's batch.

        Args:
            step: optimiser step, from 0.
            token_losses: [B, T] nats, detached.
            labels: [B, T] token ids that the losses are of.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class UniformWeigher:
    """Weight 1 for every sample."""

    method = "uniform"

    def weigh(self, step: int, token_losses: torch.Tensor, labels: torch.Tensor) -> Record:
        return Record(step, np.ones(len(token_losses), np.float32), position=0, fallback=False)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LearnedWeigher:
    """Asks the job's weighter, records the answer, then hands it out; a recorded step is not asked about again."""

    method = "dwm"

    def __init__(self, job: Job, recorder: Recorder, unigram_nll: torch.Tensor) -> None:
        """
        Args:
            unigram_nll: [V] float32, on the device of the model.
        """
        self._job, self._recorder, self._unigram_nll = job, recorder, unigram_nll

    def weigh(self, step: int, token_losses: torch.Tensor, labels: torch.Tensor) -> Record:
        known = self._recorder.get(step)
        if known is not None:
            return known
        scores = self._job.score(batch_features(token_losses, self._unigram_nll[labels]), step)
        record = Record(step, scores.weights.float().cpu().numpy(), scores.position, scores.fallback)
        self._recorder.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"job": self._job.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._job.load_state_dict(state["job"])
