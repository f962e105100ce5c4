"""The weighter: a state machine that scores batches and moves on by one meta-update at a time.

Its state is a function of the spec and the updates applied, in order; on one kind of hardware, bit for bit. One thread
at a time may call `apply`, `load_state` and the `state_` methods; any thread may call `score` meanwhile. Knows no log,
no snapshots and no transport.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weighting_contract.spec import WeighterSpec
from weighting_service.domain import Estimator, Inputs, JobStatistics, LearningStatistics, MetaUpdate, Scores
from weighting_service.weighter.cotangents import JobSignal, RunningMean, centred, correlation, scaled
from weighting_service.weighter.model import DataWeightingModel, Samples
from weighting_service.weighter.normalise import guarded, to_weights
from weighting_service.weighter.state import State, check_tensors, state_from_json, state_to_json


@dataclass(frozen=True)
class Published:
    """A state that scores are computed from. Never changed: the next update publishes another one."""

    position: int
    model: DataWeightingModel
    statistics: LearningStatistics


@dataclass(frozen=True)
class _Lesson:
    """What one applied update did."""

    job: JobSignal
    gradient_norm: float
    logit_std: float
    effective_share: float
    agreement: float  # correlation of -cotangent with the logits given before it was learned


class Weighter:
    """A data weighting model that serves scores while it learns.

    Args:
        spec: inputs, head and learning.
        device: where the model lives.
        models_dir: holds the folders of pretrained token encoders.

    Raises:
        InvalidArgument: the token encoder can't be built or loaded.
    """

    def __init__(self, spec: WeighterSpec, *, device: torch.device, models_dir: Path | None = None) -> None:
        self.spec = spec
        self.device = device
        head = spec.head
        self._normalise = partial(
            to_weights,
            temperature=head.temperature,
            floor=head.floor,
            min_effective_share=head.min_effective_share,
        )
        self._guard = partial(
            guarded,
            temperature=head.temperature,
            floor=head.floor,
            min_effective_share=head.min_effective_share,
        )
        self._model = DataWeightingModel(spec, models_dir).to(device).eval()  # eval: no dropout, in learning neither
        self._trainable = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._optimiser = self._fresh_optimiser()
        self._jobs: dict[str, JobSignal] = {}
        self._agreement = RunningMean()
        self.published = self._snapshot(0, LearningStatistics())

    @property
    def position(self) -> int:
        return self.published.position

    @property
    def statistics(self) -> LearningStatistics:
        return self.published.statistics

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids must lie below it; None where the weighter reads no tokens."""
        return self._model.vocabulary_size

    # ---- Scoring ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, batches: Sequence[Inputs]) -> list[Scores]:
        """Weights of each batch, all from one published state; a batch's result doesn't depend on its companions.

        Args:
            batches: of one job or several, with the parts that the spec names (checked by the service).
        """
        if not batches:
            return []
        published = self.published  # read once: an update may publish another one at any moment
        embedded = published.model.embed(Samples.of(batches, self.device))
        rows = torch.split(embedded, [b.samples for b in batches])
        results: dict[int, Scores] = {}
        for group in _of_similar_size([len(r) for r in rows]):
            padded, mask = _pad([rows[i] for i in group])
            logits = published.model.compare(padded, mask)  # [J, B]
            weights, effective = self._normalise(logits, mask)
            parts = (weights.cpu().numpy(), logits.cpu().numpy(), effective.tolist())
            for i, w, z, size in zip(group, *parts, strict=True):
                samples = len(rows[i])
                results[i] = Scores(w[:samples].copy(), z[:samples].copy(), published.position, size)
        return [results[i] for i in range(len(batches))]

    # ---- Learning ---------------------------------------------------------------------------------------------------

    def apply(self, position: int, update: MetaUpdate) -> None:
        """Learns from one meta-update and publishes the state after it.

        An update that can't be learned from (a constant cotangent, anything not finite on the way) moves the position
        and counts as skipped; parameters, optimiser and running statistics stay as they were.

        Raises:
            ValueError: `position` is not the next one.
        """
        if position != self.position + 1:
            raise ValueError(f"position {position} can't be applied at {self.position}, expected {self.position + 1}")
        lesson = self._learn(update)
        self._optimiser.zero_grad()  # frees the gradients' memory until the next one
        before = self.published
        if lesson is None:
            skipped = replace(before.statistics, updates_skipped=before.statistics.updates_skipped + 1)
            self.published = Published(position, before.model, skipped)
            return
        self._jobs[update.job_id] = lesson.job
        self._agreement = self._agreement.add(lesson.agreement)
        self.published = self._snapshot(position, self._statistics_after(lesson))

    def _learn(self, update: MetaUpdate) -> _Lesson | None:
        """One optimiser step; None, and nothing changed, where there is nothing to learn or a number isn't finite."""
        learning = self.spec.learning
        if not np.isfinite(update.cotangent).all() or (update.cotangent == update.cotangent[0]).all():
            return None
        cotangent = centred(update.cotangent)
        self._optimiser.zero_grad()
        logits = self._model(Samples.of([update.inputs], self.device))  # [B]
        given = logits.detach().cpu().double().numpy()
        if not np.isfinite(given).all():
            return None
        before = self._jobs.get(update.job_id, JobSignal())
        agreement = correlation(-cotangent, given)
        job = before.observe(cotangent, agreement, learning.cotangent_memory)
        taught = scaled(cotangent, job.rms(learning.cotangent_memory), learning)
        weights, effective = self._normalise(logits)
        loss = self._surrogate(torch.from_numpy(taught).to(self.device), logits, weights, update.estimator)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self._trainable.values(), learning.max_gradient_norm))
        if not math.isfinite(norm) or not self._step():
            return None
        return _Lesson(
            job=job,
            gradient_norm=norm,
            logit_std=float(given.std()),
            effective_share=float(effective) / len(given),
            agreement=agreement,
        )

    def _surrogate(self, cotangent: Tensor, logits: Tensor, weights: Tensor, estimator: Estimator) -> Tensor:
        """The scalar whose gradient is the update's direction, over B so that its size doesn't grow with the batch.

        VJP: sum_i c_i w_i / B, for samples as they were drawn. Score function: sum_i c_i log w_i / B with w before the
        floor, for samples that were selected by their weights.
        """
        if estimator is Estimator.SCORE_FUNCTION:
            weights = self._guard(logits).log_softmax(-1)
        return (cotangent * weights).mean()

    def _step(self) -> bool:
        """An optimiser step; False, and everything as before, where a parameter would not be finite after it."""
        saved = {p: {k: t.clone() for k, t in moments.items()} for p, moments in self._optimiser.state.items()}
        self._optimiser.step()
        if all(bool(torch.isfinite(p).all()) for p in self._trainable.values()):
            return True
        self._model.load_state_dict(self.published.model.state_dict())
        self._optimiser.state.clear()
        self._optimiser.state.update(saved)
        return False

    def _fresh_optimiser(self) -> torch.optim.AdamW:
        learning = self.spec.learning
        decayed = [p for p in self._trainable.values() if p.ndim >= 2]
        others = [p for p in self._trainable.values() if p.ndim < 2]  # biases, and the scales of norms
        groups = [
            {"params": decayed, "weight_decay": learning.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning.learning_rate)

    def _statistics_after(self, lesson: _Lesson) -> LearningStatistics:
        before = self.published.statistics
        return LearningStatistics(
            updates_applied=before.updates_applied + 1,
            updates_skipped=before.updates_skipped,
            gradient_norm=lesson.gradient_norm,
            logit_std=lesson.logit_std,
            effective_share=lesson.effective_share,
            signal_correlation=self._agreement.mean,
            jobs=self._job_statistics(),
        )

    def _job_statistics(self) -> dict[str, JobStatistics]:
        memory = self.spec.learning.cotangent_memory
        return {
            name: JobStatistics(job.updates, job.rms(memory), job.correlation.mean) for name, job in self._jobs.items()
        }

    def _snapshot(self, position: int, statistics: LearningStatistics) -> Published:
        """The learner's model as it is now, as a copy that shares only what never learns."""
        shared = {id(p): p for p in self._model.parameters() if not p.requires_grad}
        model = copy.deepcopy(self._model, shared)
        model.requires_grad_(False)
        return Published(position, model, statistics)

    # ---- State ------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of parameters, buffers and the optimiser's moments; goes with `state_metadata`."""
        tensors = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        for name, moments in self._moments().items():
            tensors |= {f"optimiser.{kind}.{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    def state_metadata(self) -> dict[str, Any]:
        """The rest of the state as plain JSON values."""
        steps = {name: int(moments["step"]) for name, moments in self._moments().items()}
        return state_to_json(State(self.position, self.statistics, dict(self._jobs), self._agreement, steps))

    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Continues, bit for bit, where the state was taken. The metadata may have gone through JSON.

        Not while another thread scores: parameters that never learn are shared with the published state.

        Raises:
            InvalidArgument: the state is not one of a weighter of this spec; nothing was changed then.
        """
        state = state_from_json(metadata)
        expected = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        known = {name: p for name, p in self._trainable.items() if name in state.optimiser_steps}
        expected |= {f"optimiser.{kind}.{n}": p for n, p in known.items() for kind in ("exp_avg", "exp_avg_sq")}
        check_tensors(tensors, expected, "this weighter's state")
        self._model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        self._optimiser = self._fresh_optimiser()
        for name, parameter in known.items():
            moments = {kind: tensors[f"optimiser.{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(state.optimiser_steps[name])),  # AdamW keeps it on the CPU
                **{kind: t.to(self.device, copy=True) for kind, t in moments.items()},
            }
        self._jobs, self._agreement = dict(state.jobs), state.agreement
        self.published = self._snapshot(state.position, replace(state.statistics, jobs=self._job_statistics()))

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts from the parameters and buffers of another weighter; the optimiser and the position stay fresh.

        Raises:
            InvalidArgument: they don't fit this weighter's spec; nothing was changed then.
            ValueError: the weighter has applied updates, which the new parameters would not follow from.
        """
        if self.position:
            raise ValueError(f"the weighter is at position {self.position}; only a fresh one can take other parameters")
        check_tensors(tensors, self._model.state_dict(), "this weighter's parameters")
        self._model.load_state_dict(dict(tensors))
        self.published = self._snapshot(0, self.statistics)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by parameter name; parameters that never had a gradient have none."""
        state = self._optimiser.state
        return {name: state[p] for name, p in self._trainable.items() if state.get(p)}


def _of_similar_size(sizes: Sequence[int]) -> Iterable[list[int]]:
    """Indices of batches, grouped so that padding one group to its largest batch at most doubles its samples."""
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault((size - 1).bit_length(), []).append(i)
    return groups.values()


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows of [B_j, width] -> [J, B, width] and the mask [J, B] of real samples, None where all are."""
    sizes = [len(r) for r in rows]
    if len(set(sizes)) == 1:
        return torch.stack(list(rows)), None
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    real = torch.arange(padded.shape[1])[None] < torch.tensor(sizes)[:, None]
    return padded, real.to(padded.device)
