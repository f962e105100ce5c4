"""From settings to judges: what the judged runs of a job share is made once, each run's chooser and weigher of it.

The only place that knows which method needs what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from trainer_client.run.choose import Chooser
from trainer_client.run.compute import scoring_flops
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Progress
from trainer_client.run.methods.judge import Cost, Judge, Sharpness
from trainer_client.run.methods.judged import JudgedChooser, JudgedWeigher, LabelledBatches, Passes
from trainer_client.run.methods.judges import (
    AlignmentJudge,
    LossJudge,
    RandomJudge,
    ReducibleLossJudge,
    SimilarityJudge,
    StaticJudge,
)
from trainer_client.run.methods.models import SmallModel, pool_losses, pool_model, tuned_model
from trainer_client.run.methods.names import JUDGED
from trainer_client.run.methods.sources import target_samples
from trainer_client.run.parallel import autocast
from trainer_client.run.recorder import Recorder
from trainer_client.run.reference import RunReference
from trainer_client.run.task import Task
from trainer_client.run.variants import Variant
from weighting_contract.spec import HeadSpec

WEIGHT_MIN_SHARE = HeadSpec().min_effective_share  # inside a batch
_ALIGNED_TO = 8  # validation samples of a step: more than a cotangent takes, as nothing learns from several of them

OpenRecord = Callable[[], Recorder]


def prepare_methods(
    config: RunConfig, task: Task, device: torch.device, reference: RunReference | None, progress: Progress | None
) -> Methods:
    """What the judged runs of a job need besides their trainers.

    Args:
        reference: that judges read and tune; None leaves out what is made of it, as nothing is to be trained.

    Raises:
        InvalidArgument: settings that do not fit the data, or a reference whose parameters are not here.
    """
    names = {variant.method for variant in config.variants if variant.judged}
    methods = Methods(config, task)
    if "oracle" in names:
        methods.labelled = target_samples(task, config.oracle_source)
    if reference is None or not any(JUDGED[name].reads_reference for name in names):
        return methods
    drawn = _drawn(config, task)
    tuned = tuned_model(task, reference, device, progress)
    tuned_losses = _losses(tuned, task, drawn, device, progress)
    if "rho" in names:
        methods.rho = ReducibleLossJudge(tuned_losses, _cost(task, reference, tuned))
    if "difference" in names:
        pool = pool_model(reference)
        gained = _losses(pool, task, drawn, device, progress) - tuned_losses
        methods.difference = StaticJudge(gained, _cost(task, reference, pool, tuned))
    return methods


def _drawn(config: RunConfig, task: Task) -> np.ndarray:
    """[n] int64: the training samples that the small models read, each once: those that come in some step."""
    reading = [v for v in config.variants if v.judged and JUDGED[v.method].reads_reference]
    order = task.candidate_order if any(v.draws_candidates for v in reading) else task.order
    return order.drawn(config.steps)


def _losses(
    small: SmallModel, task: Task, drawn: np.ndarray, device: torch.device, progress: Progress | None
) -> np.ndarray:
    """[N] of all training samples, NaN for those that are not drawn."""
    losses = np.full(len(task.train), np.nan, np.float32)
    losses[drawn] = pool_losses(small, task.train.tokens[drawn], device, progress, "a small model reads the pool")
    return losses


def _cost(task: Task, reference: RunReference, *readers: SmallModel) -> Cost:
    """Of each reader's pass over a sample, and of having trained the reference and its tuned copy."""
    labels = task.train.tokens.shape[1] - 1
    a_sample = sum(scoring_flops(r.parameters, min(labels, r.seq_len)) for r in readers)
    return Cost(per_new_sample=a_sample, training=reference.trained_flops + readers[-1].trained_flops)


@dataclass
class Methods:
    """Makes the choosers and weighers of a job's judged runs."""

    config: RunConfig
    task: Task
    labelled: np.ndarray | None = None  # [N] bool, the training samples of the target's sources
    rho: Judge | None = None
    difference: Judge | None = None

    def chooser(self, variant: Variant, model: torch.nn.Module, open_record: OpenRecord) -> Chooser:
        """Gives a judged run that selects its batches; `model` is its trainer."""
        if variant.method == "oracle":
            assert self.labelled is not None
            return LabelledBatches(self.task, self.labelled, self.config.batch_size)
        judge, temperature = self._judge(variant.method, model), self._temperature(variant.method)
        sharpness = Sharpness(temperature, self.config.select_min_share)
        keep, warm_up = self.config.batch_size, self.config.warm_up_of(variant.method)
        return JudgedChooser(judge, sharpness, self.task, model, open_record(), keep, self._passes(model), warm_up)

    def weigher(self, variant: Variant, model: torch.nn.Module, open_record: OpenRecord) -> JudgedWeigher:
        """Gives a judged run that weighs the weights of its batches; `model` is its trainer."""
        judge, temperature = self._judge(variant.method, model), self._temperature(variant.method)
        sharpness = Sharpness(temperature, WEIGHT_MIN_SHARE)
        return JudgedWeigher(judge, sharpness, self.task, open_record(), self._passes(model))

    def _passes(self, model: torch.nn.Module) -> Passes:
        return partial(autocast, self.config, next(model.parameters()).device)

    def _temperature(self, method: str) -> float:
        """0 for a label, which is no matter of degree, and for a static selection, which goes by rank.

        Chance among the candidates made the difference of two models worse (tiny model, 300 steps: test loss 5.37, by
        rank 4.97).
        """
        return 0.0 if method in ("oracle", "difference") else self.config.judge_temperature

    def _judge(self, method: str, model: torch.nn.Module) -> Judge:
        config, task = self.config, self.task
        if method == "random":
            return RandomJudge(config.seed)
        if method == "oracle":
            assert self.labelled is not None
            return StaticJudge(self.labelled)
        if method == "loss":
            return LossJudge()
        if method == "similarity":
            return SimilarityJudge(model, task, config.batch_size)
        if method == "alignment":
            return AlignmentJudge(model, task, _ALIGNED_TO)
        prepared = {"rho": self.rho, "difference": self.difference}[method]
        assert prepared is not None
        return prepared
