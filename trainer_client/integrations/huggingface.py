"""Weights of a weighter in any run of `transformers.Trainer`: two lines change.

    from trainer_client.integrations.huggingface import WeighbridgeTrainer

    trainer = WeighbridgeTrainer(model, args, train_dataset=..., eval_dataset=..., weighbridge="grpc://localhost:50051")

A Trainer of one's own becomes one by `class Mine(WeightedTraining, SFTTrainer)`. The loss is the Trainer's own, the
mean over the tokens of all ranks and accumulation steps, with each sample's tokens times its weight: with uniform
weights, as when the service is away, the run is the one that it was without.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_client.integrations.steps import TokenLosses, WeightedSteps, Weighting
from trainer_client.integrations.validation import ValidationDraws, evaluating
from trainer_client.packed import Documents, documents_of
from weighting_contract.errors import FailedPrecondition, InvalidArgument

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import Trainer
except ImportError as exc:
    raise ImportError(
        "trainer_client.integrations.huggingface needs transformers and accelerate: "
        "pip install 'weighbridge[huggingface]'"
    ) from exc

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # so that it can stand before any Trainer class

_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
STATE_FILE = "weighbridge.safetensors"  # in each checkpoint's folder


class WeightedTraining(_Base):
    """Put before a `Trainer` class: its `train` minimises the weighted loss and teaches the weighter.

    Weights are relative over the whole batch of an optimiser step: all ranks and all accumulation steps. With
    `gradient_accumulation_steps` above 1 a forward pass without gradients comes first. The weighter is taught towards
    `eval_dataset`. Its state is kept in the checkpoints, and `resume_from_checkpoint` goes on as the same job.

    Args:
        weighbridge: the service's URL, or a `Weighting`.
        weighbridge_eval_dataset: the samples to teach towards, in place of `eval_dataset`.
        others: of the Trainer.

    Raises:
        InvalidArgument: settings of the Trainer that weights can't be combined with.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole batch

    def __init__(
        self, *args: Any, weighbridge: Weighting | str, weighbridge_eval_dataset: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weighting = Weighting.of(weighbridge)
        self._towards = self.eval_dataset if weighbridge_eval_dataset is None else weighbridge_eval_dataset
        self._check_supported()
        self._steps: WeightedSteps | None = None
        self._draws: ValidationDraws | None = None
        self._micro_batches: list[dict[str, Any]] = []  # of this optimiser step
        self._weights: list[Tensor] | None = None  # of the micro-batches; None: to be asked for after the forward pass
        self._current: int | None = None  # the micro-batch that is being trained on

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._steps = WeightedSteps(self.weighting).open()
        try:
            self._draws = self._validation_draws()
            return super().train(*args, **kwargs)
        finally:
            self._steps.close()
            self._micro_batches = []

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches, self._weights, self._current = samples, None, None
        self._next = 0
        if len(samples) > 1:
            self._weights = self._weigh_ahead(samples)
        return samples, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._current, self._next = self._next, self._next + 1
        try:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._current = None
        if self._next == len(self._micro_batches) and self._running().due(self.state.global_step):
            self._teach(model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._current is None:  # evaluation
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        outputs, read = self._forward(model, inputs)
        if self._weights is None:
            self._weights = self._running().weigh([read], self.state.global_step)
        loss = self._running().loss(read, self._weights[self._current])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps is not None:
            logs = {**logs, **self._steps.metrics()}
        super().log(logs, *args, **kwargs)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the Trainer's own files: it may push the folder to a hub once these are there.
        state = self._running().state_dict()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {} if state["counts"] is None else {"counts": state["counts"]}
            save_file(tensors, folder / STATE_FILE, metadata={"job": json.dumps(state["job"])})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            steps = self._running()
            state = steps.ranks.from_first(lambda: _read_state(Path(checkpoint)))
            if state is not None:
                steps.load_state_dict(state)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _running(self) -> WeightedSteps:
        if self._steps is None:
            raise FailedPrecondition("there is no weighted step outside of train()")
        return self._steps

    def _read(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLosses:
        return self._forward(model, inputs)[1]

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, TokenLosses]:
        """The model's outputs for its inputs less the labels, and the token losses of the labels [b, T]."""
        inputs, labels = _pop_labels(inputs)
        if self.weighting.fused:
            outputs, read = self._fused_forward(model, inputs, labels)
        else:
            outputs = model(**inputs)
            read = TokenLosses.of(_logits(outputs), labels)
        return outputs, read.by_document(_documents(inputs)) if self.weighting.packed else read

    def _fused_forward(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Any, TokenLosses]:
        """The head makes losses [b, T] in place of logits: within the model's forward FSDP has its weight whole."""
        head = _plain_head(self.accelerator.unwrap_model(model))
        made: list[TokenLosses] = []

        def losses(hidden: Tensor) -> Tensor:
            made.append(TokenLosses.of_hidden(hidden, head.weight, labels, bias=head.bias))
            return made[0].losses

        vars(head)["forward"] = losses
        try:
            outputs = model(**inputs)
        finally:
            del vars(head)["forward"]
        # DDP and autocast work on what the model returns: the graph has to begin there.
        return outputs, replace(made[0], losses=_logits(outputs))

    def _weigh_ahead(self, samples: list[dict[str, Any]]) -> list[Tensor]:
        """The weights of all micro-batches, by a forward pass without gradients and without dropout."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with evaluating(model), torch.no_grad():
            read = [self._read(model, self._prepare_inputs(inputs)) for inputs in samples]
        return self._running().weigh(read, self.state.global_step)

    def _teach(self, model: nn.Module) -> None:
        steps, step = self._running(), self.state.global_step
        first = self._prepare_inputs(self._micro_batches[0])
        if not self.weighting.packed:
            first = _first_rows(first, steps.taught_rows)
        assert self._draws is not None  # by train
        with self.accelerator.autocast():  # seen from outside, it decides how far the parameters are moved
            steps.teach(
                self.accelerator.unwrap_model(model),
                self._read,
                first,
                self._prepare_inputs(self._draws.batch(step)),
                learning_rate=self._get_learning_rate(),
                step=step,
            )

    def _validation_draws(self) -> ValidationDraws:
        dataset = self._towards
        if isinstance(dataset, dict):
            raise InvalidArgument(
                f"eval_dataset holds several ({', '.join(dataset)}); say which one the weighter is taught towards: "
                "weighbridge_eval_dataset=..."
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="Validation")
        weighting = self.weighting
        return ValidationDraws(dataset, collate, weighting.validation_batch, self._running().ranks, weighting.seed)

    def _check_supported(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        wrong = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
            "DataParallel (several GPUs in one process; start one process a GPU with torchrun)": self.args.n_gpu > 1,
            "DeepSpeed": self.is_deepspeed_enabled,
            "tensor, context or sequence parallelism": parallel is not None
            and any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")),
        }
        if found := [name for name, given in wrong.items() if given]:
            raise InvalidArgument(
                f"{found[0]} can't be combined with weights, which multiply the token losses of whole samples; "
                "leave it out"
            )
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise InvalidArgument(
                "this transformers has no Trainer.loss_is_scaled_for_ga, so the loss of accumulated steps would be "
                "scaled twice; expected a newer one, such as 5.23"
            )


class WeighbridgeTrainer(WeightedTraining, Trainer):
    """`transformers.Trainer` with `weighbridge=` as one more argument."""


def _pop_labels(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The inputs less the labels; and these at the places of the logits, [b, T], -100 where there is none."""
    inputs = dict(inputs)
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None:
        return inputs, shifted
    if labels is None:
        raise InvalidArgument(
            f"the batches hold {', '.join(inputs)}, expected labels, too: a collator for causal language models makes "
            "them, or the dataset has a column of that name"
        )
    return inputs, nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def _documents(inputs: dict[str, Any]) -> Documents:
    if inputs.get("position_ids") is None:
        raise InvalidArgument(
            f"the batches hold {', '.join(inputs)}, expected position_ids, which say where packed documents begin; "
            "take a collator that makes them, such as DataCollatorWithFlattening, or leave packed=True out"
        )
    return documents_of(position_ids=inputs["position_ids"], mask=inputs.get("attention_mask"))


def _plain_head(model: nn.Module) -> nn.Linear:
    """The module that makes the logits, where these are its output as it is."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config
    changed = [name for name in _LOGIT_SETTINGS if getattr(config, name, None) not in (None, 1, 1.0)]
    if not isinstance(head, nn.Linear) or "forward" in vars(head) or changed:
        raise InvalidArgument(
            f"{type(model).__name__}'s logits are not those of a plain linear layer"
            + (f" (its config has {changed[0]})" if changed else "")
            + ", so fused losses can't be made of its hidden states; leave fused=True out"
        )
    return head


def _first_rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    rows = len(inputs["labels"] if "labels" in inputs else inputs["shift_labels"])
    return {
        name: value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What `_save_checkpoint` wrote; None where the checkpoint is of a run that had no weights yet."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        logger.warning("%s is missing: a checkpoint of a run without weights, which goes on with a new job", path)
        return None
    with safe_open(path, "numpy") as file:
        counts = file.get_tensor("counts") if "counts" in set(file.keys()) else None
        return {"job": json.loads(file.metadata()["job"]), "counts": counts}
