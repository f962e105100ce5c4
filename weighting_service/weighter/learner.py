"""The weighter: a state machine that scores batches and moves on by one meta-update at a time.

Its state is a function of the spec and the updates applied, in order; on one kind of hardware, bit for bit. One thread
at a time may call `apply`, `load_state` and the `state_` methods; any thread may call `score` meanwhile. Knows no log,
no snapshots and no transport.
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
from weighting_service.weighter.state import State, check_tensors, state_from_json, state_to_json
from weighting_service.weighter.trust import probe_agreement


@dataclass(frozen=True)
class Published:
    """A state that scores are computed from. Never changed: the next update publishes another one."""

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
        self._averaged = self._copies()
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
    def score(self, batches: Sequence[Inputs], options: Sequence[ScoreOptions] | None = None) -> list[Scores]:
        """Weights of each batch, all from one published state; a batch's result doesn't depend on its companions.

        A batch's logits are multiplied by its job's trust before temperature, guard and softmax. What is learned from
        a job doesn't depend on its trust.

        Args:
            batches: of one job or several, with the parts that the spec names (checked by the service).
            options: one for each batch; absent: full trust and the spec's guard for all.
        """
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

    def _least_share(self, options: ScoreOptions) -> float:
        given = options.min_effective_share
        return self.spec.head.min_effective_share if given is None else given

    # ---- Learning ---------------------------------------------------------------------------------------------------

    def apply(self, position: int, update: MetaUpdate) -> None:
        """Learns from one meta-update and publishes the state after it.

        An update that can't be learned from (a constant cotangent, anything not finite on the way) moves the position
        and counts as skipped; parameters, optimiser and running statistics stay as they were. One for trust alone
        moves its job's trust and the position, and does not count as applied.

        Raises:
            ValueError: `position` is not the next one.
        """
        if position != self.position + 1:
            raise ValueError(f"position {position} can't be applied at {self.position}, expected {self.position + 1}")
        heard = self._hear(update)
        if heard is not None and update.trust_only:
            job = replace(self._jobs.get(update.job_id, JobSignal()), trust=heard.job.trust)
            self.published = replace(self.published, position=position, statistics=self._with_job(update.job_id, job))
            return
        lesson = None if heard is None else self._learn(heard, update.estimator)
        self._optimiser.zero_grad()  # frees the gradients' memory until the next one
        if heard is None or lesson is None:
            before = self.statistics
            skipped = replace(before, updates_skipped=before.updates_skipped + 1)
            self.published = replace(self.published, position=position, statistics=skipped)
            return
        self._average(self.statistics.updates_applied)
        self._agreement = self._agreement.add(heard.agreement)
        statistics = self._with_job(update.job_id, heard.job)
        self.published = self._snapshot(
            position,
            replace(
                statistics,
                updates_applied=statistics.updates_applied + 1,
                gradient_norm=lesson.gradient_norm,
                logit_std=heard.logit_std,
                effective_share=lesson.effective_share,
                signal_correlation=self._agreement.mean,
            ),
        )

    def _hear(self, update: MetaUpdate) -> _Heard | None:
        """What there is to learn; None, and nothing changed, where there is nothing or a number isn't finite."""
        learning = self.spec.learning
        if not np.isfinite(update.cotangent).all() or (update.cotangent == update.cotangent[0]).all():
            return None
        samples = Samples.of([update.inputs], self.device)
        with torch.no_grad():
            published = self.published.model(samples)  # [B], what callers were given
        given = published.cpu().double().numpy()
        if not np.isfinite(given).all():
            return None
        cotangent = centred(update.cotangent)
        agreement = correlation(-cotangent, given)
        job = self._jobs.get(update.job_id, JobSignal()).observe(cotangent, agreement, learning.cotangent_memory)
        taught = scaled(cotangent, job.rms(learning.cotangent_memory), learning)
        logit_std, probes = float(given.std()), update.drawn_evenly
        seen = probe_agreement(taught[probes], given[probes], logit_std)
        if seen is not None:
            job = replace(job, trust=job.trust.add(seen))
        return _Heard(samples, taught, job, agreement, logit_std)

    def _learn(self, heard: _Heard, estimator: Estimator) -> _Lesson | None:
        """One optimiser step; None, and nothing changed, where a number isn't finite."""
        self._optimiser.zero_grad()
        logits = self._model(heard.samples)
        weights, effective = weights_of(self._guard(logits), floor=self.spec.head.floor)
        cotangent = torch.from_numpy(heard.cotangent).to(self.device)
        if estimator is Estimator.SCORE_FUNCTION:
            loss = _score_function_loss(cotangent, logits, self.spec.learning.logit_penalty)
        else:
            loss = (cotangent * weights).mean()  # VJP: sum_i c_i w_i / B, so that its size doesn't grow with the batch
        loss.backward()  # type: ignore[no-untyped-call]
        largest = self.spec.learning.max_gradient_norm
        norm = float(nn.utils.clip_grad_norm_(self._trainable.values(), largest, foreach=True))
        if not math.isfinite(norm) or not self._step():
            return None
        return _Lesson(norm, float(effective) / len(heard.cotangent))

    def _step(self) -> bool:
        """An optimiser step; False, and everything as before, where a parameter would not be finite after it."""
        saved = {p: {kind: t.clone() for kind, t in moments.items()} for p, moments in self._optimiser.state.items()}
        before = self._copies()
        self._optimiser.step()
        largest = nn.utils.get_total_norm(list(self._trainable.values()), math.inf, foreach=True)  # NaN if one is
        if bool(torch.isfinite(largest)):
            return True
        with torch.no_grad():
            torch._foreach_copy_(list(self._trainable.values()), list(before.values()))
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
        return torch.optim.AdamW(groups, lr=learning.learning_rate, foreach=True)

    def _with_job(self, job_id: str, job: JobSignal) -> LearningStatistics:
        """Keeps what is known about a job from now on; returns the published statistics with it."""
        self._jobs[job_id] = job
        return replace(self.statistics, jobs={**self.statistics.jobs, job_id: self._job_statistics(job)})

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
        with torch.no_grad():
            torch._foreach_lerp_(list(self._averaged.values()), list(self._trainable.values()), 1 - decay)

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._trainable.items()}

    def _snapshot(self, position: int, statistics: LearningStatistics) -> Published:
        """The running mean of the parameters as it is now."""
        model = self._model.frozen_copy()
        means = dict(model.named_parameters())
        with torch.no_grad():
            torch._foreach_copy_([means[name] for name in self._averaged], list(self._averaged.values()))
        return Published(position, model, statistics)

    # ---- State ------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of parameters, buffers, running means and moments; goes with `state_metadata`."""
        tensors = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self._averaged.items()}
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
        if any(name.startswith("average.") for name in tensors):  # states of before there was one lack it
            expected |= {f"average.{name}": t for name, t in self._averaged.items()}
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
        means = {name: tensors.get(f"average.{name}", tensors[f"model.{name}"]) for name in self._averaged}
        self._averaged = {name: t.to(self.device, copy=True) for name, t in means.items()}
        self._jobs, self._agreement = dict(state.jobs), state.agreement
        jobs = {job_id: self._job_statistics(job) for job_id, job in self._jobs.items()}
        self.published = self._snapshot(state.position, replace(state.statistics, jobs=jobs))

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
        self._averaged = self._copies()
        self.published = self._snapshot(0, self.statistics)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by parameter name; parameters that never had a gradient have none."""
        state = self._optimiser.state
        return {name: state[p] for name, p in self._trainable.items() if state.get(p)}


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
