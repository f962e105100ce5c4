"""Short runs of a tiny model in the Trainers of others, in this process or, as a script, under torch.distributed.run.

    python -m tests.integration.trainer_runs huggingface|lightning FOLDER URL WEIGHTER

writes what each rank had to FOLDER/rank-R.safetensors: "weights" [steps, b], "loss" [steps], and the parameters.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler

from trainer_client.cadence import Cadence
from trainer_client.integrations.steps import TokenLosses, Weighting
from trainer_client.settings import Timeouts

VOCABULARY, TOKENS, SAMPLES, BATCH, STEPS = 32, 12, 96, 8, 6


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def samples(seed: int, count: int = SAMPLES, noise: bool = True) -> list[dict[str, torch.Tensor]]:
    """Half of them count upwards, the others are noise; some end early, padded."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(count):
        start = int(torch.randint(VOCABULARY, (1,), generator=generator))
        ids = (torch.arange(TOKENS) + start) % VOCABULARY
        if noise and place % 2:
            ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        labels = ids.clone()
        labels[TOKENS - place % 3 :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def weighting(url: str, weighter: str, **others: Any) -> Weighting:
    """Taught with the whole batch in every step, so that it does not depend on how a batch is split."""
    patient = {"timeouts": Timeouts(score_s=30)}
    given = {"cadence": Cadence(1), "meta_batch": BATCH, "validation_batch": 4, "connection": patient, **others}
    return Weighting(url, weighter=weighter, **given)


def huggingface(
    folder: Path,
    by: Weighting | str,
    *,
    batch: int = BATCH,
    steps: int = STEPS,
    resume: bool = False,
    collator: Any = None,
    **given: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run of `transformers.Trainer`; the trainer, and what this rank had."""
    from transformers import TrainerCallback, TrainingArguments

    from trainer_client.integrations.huggingface import WeighbridgeTrainer

    seen: dict[str, list[Any]] = {"weights": [], "loss": []}

    class InOrder(WeighbridgeTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen["weights"].append(trainer._steps.scores.weights.clone())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                seen["loss"].append(logs["loss"])

    arguments = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**arguments, **given},
    )
    trainer = InOrder(
        tiny_llama(),
        args,
        train_dataset=samples(1),
        eval_dataset=samples(2, 16, noise=False),
        data_collator=collator,
        callbacks=[Watch()],
        weighbridge=by,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {
        "weights": torch.stack(seen["weights"]),
        "loss": torch.tensor(seen["loss"]),
        **{f"model.{name}": p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def read(module: Any, batch: dict[str, torch.Tensor]) -> TokenLosses:
    return TokenLosses.of(module.model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])


def lightning(
    folder: Path, by: Weighting | str, *, batch: int = BATCH, steps: int = STEPS, resume: str | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run of Lightning's Trainer; its callback, and what this rank had."""
    import lightning as L
    from torch.utils.data import DataLoader

    from trainer_client.integrations.lightning import WeighbridgeCallback

    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    weighbridge = WeighbridgeCallback(by, read=read, validation=samples(2, 16, noise=False))
    seen: list[torch.Tensor] = []

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = weighbridge.loss(self, batch)
            seen.append(weighbridge._steps.scores.weights.clone())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    class InTurn(torch.utils.data.Sampler[int]):
        """As the Trainer above: of each step's samples, rank r has the r-th part."""

        def __iter__(self) -> Any:
            whole = batch * trainer.world_size
            first = trainer.global_rank * batch
            return (start + first + i for start in range(0, epoch, whole) for i in range(batch))

        def __len__(self) -> int:
            return epoch // trainer.world_size

    epoch = BATCH  # samples: where a loader has no state, Lightning begins it anew when it goes on
    module = Model()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp" if torch.distributed.is_torchelastic_launched() else "auto",
        max_steps=steps,
        callbacks=[weighbridge],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(samples(1, epoch), batch, sampler=InTurn()), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return weighbridge, {
        "weights": torch.stack(seen),
        **{name: p.detach().clone() for name, p in module.named_parameters()},
    }


def main() -> None:
    kind, folder, url, weighter = sys.argv[1:]
    run = {"huggingface": huggingface, "lightning": lightning}[kind]
    _, had = run(Path(folder), weighting(url, weighter), batch=BATCH // int(os.environ["WORLD_SIZE"]))
    save_file(had, Path(folder) / f"rank-{torch.distributed.get_rank()}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
