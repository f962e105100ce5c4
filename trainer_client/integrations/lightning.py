"""Weights of a weighter in a run of Lightning's Trainer: a callback, and its `loss` in the module's `training_step`.

    weighbridge = WeighbridgeCallback("grpc://localhost:50051", read=token_losses, validation=samples)
    trainer = L.Trainer(..., callbacks=[weighbridge])

    def training_step(self, batch, batch_idx):
        return weighbridge.loss(self, batch)

Weights are relative over the micro-batches that the ranks have at the same time. Lightning hands out accumulated
micro-batches one by one, so with `accumulate_grad_batches` above 1 each has weights of mean 1 of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer_client.integrations.steps import TokenLosses, WeightedSteps, Weighting
from trainer_client.integrations.validation import ValidationDraws
from weighting_contract.errors import InvalidArgument

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import default_collate
except ImportError as exc:
    raise ImportError(
        "trainer_client.integrations.lightning needs lightning: pip install 'weighbridge[lightning]'"
    ) from exc


class WeighbridgeCallback(Callback):
    """Attaches the job for the time of `fit`, teaches before the optimiser's steps, keeps its state in checkpoints.

    Args:
        weighting: the service's URL, or a `Weighting`.
        read: (module, batch) -> TokenLosses; `TokenLosses.of(logits, labels)` makes them.
        validation: the samples to teach towards: a dataset with a length, or a list.
        collate: makes a batch of a list of them.
        take: (batch, n) -> the first n samples of a batch; None: of tensors, and of dicts, lists and tuples of these.
    """

    def __init__(
        self,
        weighting: Weighting | str,
        *,
        read: Callable[[Any, Any], TokenLosses],
        validation: Any,
        collate: Callable[[list[Any]], Any] = default_collate,
        take: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.weighting = Weighting.of(weighting)
        self._read, self._validation, self._collate, self._take = read, validation, collate, take or first_samples
        self._steps = WeightedSteps(self.weighting)
        self._draws: ValidationDraws | None = None
        self._restored: dict[str, Any] | None = None  # of a checkpoint, until the job is open
        self._batch: Any = None  # the micro-batch of the step that was weighed last

    def loss(self, module: LightningModule, batch: Any) -> Tensor:
        """The weighted mean of the batch's token losses, to be returned by `training_step`."""
        read = self._read(module, batch)
        (weights,) = self._steps.weigh([read], module.trainer.global_step)
        self._batch = batch
        module.log_dict(self._steps.metrics(), rank_zero_only=True)
        return self._steps.loss(read, weights)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) > 1:
            raise InvalidArgument(f"the module has {len(trainer.optimizers)} optimizers, expected one")
        ranks = self._steps.open().ranks
        self._draws = ValidationDraws(
            self._validation, self._collate, self.weighting.validation_batch, ranks, self.weighting.seed
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._steps.load_state_dict(self._restored)
            self._restored = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step
        if self._batch is None or not self._steps.due(step):
            return
        assert self._draws is not None  # by on_fit_start
        with trainer.precision_plugin.forward_context():
            self._steps.teach(
                pl_module,
                self._read,
                self._take(self._batch, self._steps.taught_rows),
                trainer.strategy.batch_to_device(self._draws.batch(step)),
                learning_rate=float(optimizer.param_groups[0]["lr"]),
                step=step,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._steps.close()
        self._batch = None

    def state_dict(self) -> dict[str, Any]:
        return self._steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


def first_samples(batch: Any, count: int) -> Any:
    """The first samples of a tensor, or of the tensors in a dict, list or tuple."""
    if isinstance(batch, Tensor):
        return batch[:count]
    if isinstance(batch, dict):
        return {key: first_samples(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(first_samples(value, count) for value in batch)
    raise InvalidArgument(
        f"the batch holds a {type(batch).__name__}, expected tensors; pass take=..., which returns its first samples"
    )
