"""The weighter: a state machine that scores batches and moves on by one meta-update at a time.

Its state is a function of the spec, of what it started from and of the updates applied, in order; on one kind of
hardware, bit for bit. One thread at a time may call `apply`, `publish`, `load_state`, `restore` and the `state_`
methods; any thread may call `score` meanwhile. Knows no log, no snapshots and no transport.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weighting_contract.errors import InvalidArgument, Unavailable
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import (
    Estimator,
    Inputs,
    JobStatistics,
    LearningStatistics,
    MetaUpdate,
    ScoreOptions,
    Scores,
)
from weighting_service.weighter.cotangents import JobSignal, RunningMean, centred, correlation, scaled
from weighting_service.weighter.model import DataWeightingModel, Samples
from weighting_service.weighter.normalise import guarded, to_weights, weights_of
from weighting_service.weighter.optimiser import AdamW, Layout, clipped
from weighting_service.weighter.pretrained import Pretrained
from weighting_service.weighter.state import State, check_tensors, state_from_json, state_to_json
from weighting_service.weighter.trust import FIRST_LESSONS, LEAST_PROBES, NEW_FOR


@dataclass(frozen=True)
class Published:
    """A state that scores are computed from. Never changed: a later state is published as another one."""

    position: int
    model: DataWeightingModel
    statistics: LearningStatistics

    def trust(self, job_id: str) -> float:
        """The factor on a job's logits; 1 for a job that this state knows nothing of."""
        job = self.statistics.jobs.get(job_id)
        return 1.0 if job is None else job.trust


@dataclass(frozen=True)
class _Heard:
    """What an update says, in the light of the logits that were given before it is learned."""

    samples: Samples
    cotangent: np.ndarray  # [B] float32, centred and scaled
    job: JobSignal  # after this update
    agreement: float  # correlation of -cotangent with the logits
    logit_std: float


@dataclass(frozen=True)
class _Lesson:
    """What one optimiser step did."""

    gradient_norm: float
    effective_share: float


class Weighter(Pretrained):
    """A data weighting model that serves scores while it learns.

    Args:
        spec: inputs, head and learning.
        device: where the model lives.
        models_dir: holds the folders of pretrained token encoders.
        taught_before: its parameters will be loaded from an export; else it is fresh, and its first lessons say nothing
            of how far it can be trusted.

    Raises:
        InvalidArgument: the token encoder can't be built or loaded.
    """

    def __init__(
        self, spec: WeighterSpec, *, device: torch.device, models_dir: Path | None = None, taught_before: bool = False
    ) -> None:
        self.spec = spec
        self.device = device
        self._taught_before = taught_before
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
        learning = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._layout = Layout(learning)
        self._parameters = torch.zeros(self._layout.size, device=device)  # all that learn, end to end
        for name, view in self._layout.views(self._parameters).items():
            view.copy_(learning[name].detach())
            learning[name].data = view
        self._trainable = learning
        self._optimiser = AdamW(self._parameters, spec.learning, self._layout.matrices)
        self._mean = self._parameters.clone()  # their running mean
        self._scoring_model = self._model_of_mean()
        self._jobs: dict[str, JobSignal] = {}
        self._agreement = RunningMean()
        self._position, self._statistics = 0, LearningStatistics()
        self._moved = True  # the running mean, since it was published
        self._withdrawn = ""
        self.published: Published
        self.publish()

    @property
    def position(self) -> int:
        """Of the state that learns; `published.position` is that of the one that scores."""
        return self._position

    @property
    def statistics(self) -> LearningStatistics:
        """Of the state that learns."""
        return self._statistics

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids must lie below it; None where the weighter reads no tokens."""
        return self._model.vocabulary_size

    # ---- Scoring ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, batches: Sequence[Inputs], options: Sequence[ScoreOptions] | None = None) -> list[Scores]:
        """Weights of each batch, all from one published state; a batch's result doesn't depend on its companions.

        A batch's logits are multiplied by its job's trust before temperature, guard and softmax. What is learned from
        a job doesn't depend on its trust.

        Args:
            batches: of one job or several, with the parts that the spec names (checked by the service).
            options: one for each batch; absent: full trust and the spec's guard for all.

        Raises:
            Unavailable: the weighter was withdrawn.
        """
        if self._withdrawn:
            raise Unavailable(self._withdrawn)
        if not batches:
            return []
        if options is None:
            options = [ScoreOptions()] * len(batches)
        published = self.published  # read once: an update may publish another one at any moment
        trusts = [published.trust(o.job_id) for o in options]
        shares = [self._least_share(o) for o in options]
        embedded = published.model.embed(Samples.of(batches, self.device))
        rows = torch.split(embedded, [b.samples for b in batches])
        results: dict[int, Scores] = {}
        for group in _alike([len(r) for r in rows], shares):
            padded, mask = _pad([rows[i] for i in group])
            logits = published.model.compare(padded, mask)  # [J, B]
            trust = logits.new_tensor([trusts[i] for i in group])
            weights, effective = self._normalise(logits * trust[:, None], mask, min_effective_share=shares[group[0]])
            parts = (weights.cpu().numpy(), logits.cpu().numpy(), effective.tolist())
            for i, w, z, size in zip(group, *parts, strict=True):
                samples = len(rows[i])
                results[i] = Scores(w[:samples].copy(), z[:samples].copy(), published.position, size, trusts[i])
        return [results[i] for i in range(len(batches))]

    def withdraw(self, reason: str) -> None:
        """Refuses to score from now on, as the state can't be vouched for; an empty reason lets it score again."""
        self._withdrawn = reason

    def _least_share(self, options: ScoreOptions) -> float:
        given = options.min_effective_share
        return self.spec.head.min_effective_share if given is None else given

    # ---- Learning ---------------------------------------------------------------------------------------------------

    def apply(self, position: int, update: MetaUpdate, *, publish: bool = True) -> None:
        """Learns from one meta-update, and publishes the state after it unless told to leave that to `publish`.

        An update that can't be learned from (a constant cotangent, anything not finite on the way) moves the position
        and counts as skipped; parameters, optimiser and running statistics stay as they were. One for trust alone
        moves its job's trust and the position, and does not count as applied. Whether states in between are published
        makes no difference to any later state.

        Raises:
            ValueError: `position` is not the next one.
        """
        self._check_next(position)
        heard = self._hear(update)
        lesson = None
        if heard is not None and update.trust_only:
            job = replace(self._jobs.get(update.job_id, JobSignal()), trust=heard.job.trust)
            self._keep_job(update.job_id, job)
        elif heard is None or (lesson := self._learn(heard, update.estimator)) is None:
            self._statistics = replace(self._statistics, updates_skipped=self._statistics.updates_skipped + 1)
        else:
            self._keep(update.job_id, heard, lesson)
        self._position = position
        if publish:
            self.publish()

    def publish(self) -> None:
        """Lets the state as it is score from now on."""
        model = self._scoring_model.frozen_copy() if self._moved else self.published.model
        self._moved = False
        self.published = Published(self._position, model, self._statistics)

    def _check_next(self, position: int) -> None:
        if position != self._position + 1:
            raise ValueError(f"position {position} can't be applied at {self._position}, expected {self._position + 1}")

    def _hear(self, update: MetaUpdate) -> _Heard | None:
        """What there is to learn; None, and nothing changed, where there is nothing or a number isn't finite."""
        learning = self.spec.learning
        if not np.isfinite(update.cotangent).all() or (update.cotangent == update.cotangent[0]).all():
            return None
        samples = Samples.of([update.inputs], self.device)
        with torch.inference_mode():
            given = self._scoring_model(samples).cpu().double().numpy()  # [B], as callers were given them
        if not np.isfinite(given).all():
            return None
        cotangent = centred(update.cotangent)
        agreement = correlation(-cotangent, given)
        job = self._jobs.get(update.job_id, JobSignal()).observe(cotangent, agreement, learning.cotangent_memory)
        taught = scaled(cotangent, job.rms(learning.cotangent_memory), learning)
        chosen = update.estimator is Estimator.SCORE_FUNCTION
        known = self._taught_before or self._statistics.updates_applied >= FIRST_LESSONS
        counts = known or update.trust_only or not chosen  # what teaches nothing is repeated by nothing
        if counts and update.drawn_evenly.sum() >= LEAST_PROBES and np.ptp(given) > 0:
            new = (self._taught_before or update.trust_only) and update.step < NEW_FOR
            if chosen:
                trust = job.trust.of_chosen(agreement, float(given.var()), while_new=new)
            else:
                trust = job.trust.add(agreement, 1.0)
            job = replace(job, trust=trust)
        return _Heard(samples, taught, job, agreement, float(given.std()))

    def _learn(self, heard: _Heard, estimator: Estimator) -> _Lesson | None:
        """One optimiser step; None, and nothing changed, where a number isn't finite."""
        logits = self._model(heard.samples)
        cotangent = torch.from_numpy(heard.cotangent).to(self.device)
        if estimator is Estimator.SCORE_FUNCTION:
            loss = _score_function_loss(cotangent, logits, self.spec.learning.logit_penalty)
            share = self._share(logits.detach())
        else:
            weights, effective = weights_of(self._guard(logits), floor=self.spec.head.floor)
            share = float(effective) / len(heard.cotangent)
            loss = (cotangent * weights).mean()  # VJP: sum_i c_i w_i / B, so that its size doesn't grow with the batch
        gradient = self._gradient(loss)
        norm = clipped(gradient, self.spec.learning.max_gradient_norm)
        if not math.isfinite(norm) or not self._optimiser.step(gradient):
            return None
        return _Lesson(norm, share)

    def _share(self, logits: Tensor) -> float:
        """Effective sample size / B of the weights of [B] logits: where it is active, the guard's bound."""
        _, unguarded = self._normalise(logits, min_effective_share=0.0)
        return max(float(unguarded) / len(logits), self.spec.head.min_effective_share)

    def _gradient(self, loss: Tensor) -> Tensor:
        """[parameters] of `loss`, zeros for those that it does not depend on."""
        gradients = torch.autograd.grad(loss, list(self._trainable.values()), allow_unused=True)
        reached = {n: g for n, g in zip(self._trainable, gradients, strict=True) if g is not None}
        return self._layout.joined(reached, like=self._parameters)

    def _keep(self, job_id: str, heard: _Heard, lesson: _Lesson) -> None:
        """What an update that was learned from leaves behind, beside the parameters."""
        self._average(self._statistics.updates_applied)
        self._agreement = self._agreement.add(heard.agreement)
        self._keep_job(job_id, heard.job)
        self._statistics = replace(
            self._statistics,
            updates_applied=self._statistics.updates_applied + 1,
            gradient_norm=lesson.gradient_norm,
            logit_std=heard.logit_std,
            effective_share=lesson.effective_share,
            signal_correlation=self._agreement.mean,
        )

    def _keep_job(self, job_id: str, job: JobSignal) -> None:
        self._jobs[job_id] = job
        jobs = {**self._statistics.jobs, job_id: self._job_statistics(job)}
        self._statistics = replace(self._statistics, jobs=jobs)

    def _job_statistics(self, job: JobSignal) -> JobStatistics:
        return JobStatistics(
            updates_applied=job.updates,
            cotangent_rms=job.rms(self.spec.learning.cotangent_memory),
            signal_correlation=job.correlation.mean,
            trust=job.trust.factor if self.spec.learning.trust else 1.0,
            trust_t=job.trust.t,
            probed_updates=job.trust.updates,
        )

    def _average(self, updates: int) -> None:
        """Moves the running mean on; its decay grows from a tenth to `averaging`, so that it doesn't lag at first."""
        decay = min(self.spec.learning.averaging, (1 + updates) / (10 + updates)) if self.spec.learning.averaging else 0
        self._mean.lerp_(self._parameters, 1 - decay)
        self._moved = True

    def _model_of_mean(self) -> DataWeightingModel:
        """A model whose parameters are the running mean itself, and move with it."""
        model = self._model.frozen_copy()
        parameters = dict(model.named_parameters())
        for name, view in self._layout.views(self._mean).items():
            parameters[name].data = view
        return model

    # ---- State ------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of parameters, buffers, running means and moments; goes with `state_metadata`."""
        tensors = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self._layout.views(self._mean).items()}
        if self._optimiser.steps:
            for kind, moments in (("exp_avg", self._optimiser.mean), ("exp_avg_sq", self._optimiser.square)):
                tensors |= {f"optimiser.{kind}.{name}": t for name, t in self._layout.views(moments).items()}
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    def state_metadata(self) -> dict[str, Any]:
        """The rest of the state as plain JSON values."""
        steps = dict.fromkeys(self._trainable, self._optimiser.steps) if self._optimiser.steps else {}
        return state_to_json(State(self._position, self._statistics, dict(self._jobs), self._agreement, steps))

    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Continues, bit for bit, where the state was taken. The metadata may have gone through JSON.

        While another thread scores, only a state whose frozen parameters and buffers are those that the weighter has:
        they are shared with the published state.

        Raises:
            InvalidArgument: the state is not one of a weighter of this spec; nothing was changed then.
        """
        state = self._checked(tensors, metadata)
        for name, tensor in self._changed(tensors).items():
            tensor.copy_(tensors[f"model.{name}"])
        self._scoring_model = self._model_of_mean()
        self._load(state, tensors)

    def restore(self, position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Puts an earlier state back as the one of `position`, the next one, and publishes it. Others may score.

        Raises:
            InvalidArgument: the state is not one of this weighter; nothing was changed then.
            ValueError: `position` is not the next one.
        """
        self._check_next(position)
        state = self._checked(tensors, metadata)
        if changed := self._changed(tensors):
            raise InvalidArgument(
                f"tensor {next(iter(changed))!r} never learns, but in the state to put back it differs"
            )
        self._load(replace(state, position=position), tensors)

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts from the parameters and buffers of another weighter; the optimiser and the position stay fresh.

        Raises:
            InvalidArgument: they don't fit this weighter's spec; nothing was changed then.
            ValueError: the weighter has applied updates, which the new parameters would not follow from.
        """
        if self._position:
            raise ValueError(
                f"the weighter is at position {self._position}; only a fresh one can take other parameters"
            )
        check_tensors(tensors, self._model.state_dict(), "this weighter's parameters")
        for name, _ in self._model.named_parameters():
            if not bool(tensors[name].isfinite().all()):
                raise InvalidArgument(f"tensor {name!r} holds numbers that are not finite; so would weights be")
        self._model.load_state_dict(dict(tensors))
        self._mean.copy_(self._parameters)
        self._scoring_model = self._model_of_mean()
        self._moved = True
        self.publish()

    def _checked(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> State:
        state = state_from_json(metadata)
        expected = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        if any(name.startswith("average.") for name in tensors):  # states of before there was one lack it
            expected |= {f"average.{name}": p for name, p in self._trainable.items()}
        known = {name: p for name, p in self._trainable.items() if name in state.optimiser_steps}
        expected |= {f"optimiser.{kind}.{n}": p for n, p in known.items() for kind in ("exp_avg", "exp_avg_sq")}
        check_tensors(tensors, expected, "this weighter's state")
        return state

    def _changed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's tensors that never learn, and are others in the state; by name, as they are now."""
        learning = {n for n, p in self._model.named_parameters(remove_duplicate=False) if p.requires_grad}
        fixed = {name: t for name, t in self._model.state_dict().items() if name not in learning}
        return {name: t for name, t in fixed.items() if not torch.equal(t.cpu(), tensors[f"model.{name}"].cpu())}

    @torch.no_grad()
    def _load(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """All that learns, and publishes it."""

        def vector(prefix: str, otherwise: str = "") -> Tensor:
            given = {n: tensors.get(f"{prefix}.{n}", tensors.get(f"{otherwise}.{n}")) for n in self._trainable}
            return self._layout.joined({n: t for n, t in given.items() if t is not None}, like=self._parameters)

        self._parameters.copy_(vector("model"))
        self._mean.copy_(vector("average", otherwise="model"))
        # Each step counts for all; states of before moments were one vector leave out what a step never reached.
        steps = max(state.optimiser_steps.values(), default=0)
        self._optimiser.restart(steps, vector("optimiser.exp_avg"), vector("optimiser.exp_avg_sq"))
        self._jobs, self._agreement = dict(state.jobs), state.agreement
        jobs = {job_id: self._job_statistics(job) for job_id, job in self._jobs.items()}
        self._position, self._statistics = state.position, replace(state.statistics, jobs=jobs)
        self._moved = True
        self.publish()


def _score_function_loss(cotangent: Tensor, logits: Tensor, penalty: float) -> Tensor:
    """sum_i c_i log w_i / B for samples that were selected by their weights, with a penalty on the logits' size.

    As c is centred, the softmax's normalisation drops out and what is left is linear in the logits z: alone it has no
    minimum, and z would grow until something saturates. With `penalty` / 2 times the variance of z it is, up to a
    constant, the squared error of z against -c / penalty: a regression of what a sample's weight is worth.
    """
    centred_logits = logits - logits.mean()
    return (cotangent * centred_logits).mean() + penalty / 2 * centred_logits.square().mean()


def _alike(sizes: Sequence[int], others: Sequence[Hashable]) -> Iterable[list[int]]:
    """Indices of batches that are equal in `others`, grouped so that padding to the largest at most doubles them."""
    groups: dict[Hashable, list[int]] = {}
    for i, (size, other) in enumerate(zip(sizes, others, strict=True)):
        groups.setdefault(((size - 1).bit_length(), other), []).append(i)
    return groups.values()


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows of [B_j, width] -> [J, B, width] and the mask [J, B] of real samples, None where all are."""
    sizes = [len(r) for r in rows]
    if len(set(sizes)) == 1:
        return torch.stack(list(rows)), None
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    real = torch.arange(padded.shape[1])[None] < torch.tensor(sizes)[:, None]
    return padded, real.to(padded.device)
