"""The training loop: samples, forward, weights, weighted loss, backward, teaching, optimiser step; exact on resume.

Everything that happens in a step derives from (seed, step) and the step's records of samples and weights; there is no
other randomness, and dropout is off: a cotangent compares two evaluations of one function. Knows the chooser, the
weigher and the teacher by what they do, not what stands behind them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_client.loss import per_sample_loss, weighted_loss
from trainer_client.run import checkpoint
from trainer_client.run.choose import Chooser
from trainer_client.run.config import RunConfig
from trainer_client.run.evaluate import fixed_subset, mean_loss
from trainer_client.run.forward import token_losses
from trainer_client.run.metrics import Metrics
from trainer_client.run.progress import JobProgress
from trainer_client.run.task import Task
from trainer_client.run.teach import Teacher
from trainer_client.run.weigh import Weigher

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_GRADIENT_NORM = 1.0
_FINAL_LR_SHARE = 0.1


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint of everything up to `step` is written."""

    def __init__(self, label: str, step: int) -> None:
        super().__init__(f"the {label} run stopped after step {step}")


@dataclass
class Totals:
    """What a run has spent and counted so far; part of every checkpoint."""

    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    meta_seconds: float = 0.0
    fallback_steps: int = 0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes to the field `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


def learning_rate(config: RunConfig, step: int) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then constant, or a cosine to a tenth at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.lr * (_FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with torch's defaults (betas .9 and .999, weight decay .01), better here than .95 and .1 for both methods.

    The learning rate is set at every step.
    """
    return torch.optim.AdamW(model.parameters(), lr=config.lr)


def optimise(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> float:
    """An optimiser step at this learning rate, the gradient clipped to a norm of 1; its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(norm)


class Loop:
    """One run from its newest checkpoint (or the beginning) to the last step."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        model: torch.nn.Module,
        chooser: Chooser,
        weigher: Weigher,
        teacher: Teacher | None,
        folder: Path,
    ) -> None:
        """
        Args:
            model: fresh, on its device; the newest checkpoint in `folder`, if there is one, is loaded into it.
            teacher: None for a run without a weighter.
            folder: of this run's files; its name is the run's.
        """
        self.config, self.task, self.model = config, task, model.eval()
        self.chooser, self.weigher, self.teacher, self.folder = chooser, weigher, teacher, folder
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, config)
        self.totals = Totals()
        self.step = 0  # optimiser steps done
        state = checkpoint.load_newest(folder / "checkpoints", model, self.optimizer)
        if state is not None:
            self.step, self.totals = state["step"], Totals(**state["totals"])
            chooser.load_state_dict(state["chooser"])
            weigher.load_state_dict(state["weigher"])
            if teacher is not None:
                teacher.load_state_dict(state["teacher"])

    def train(self, progress: JobProgress, should_stop: Callable[[], bool]) -> None:
        """Trains up to the last step; metrics, records and checkpoints go to the folder.

        Raises:
            Interrupted: `should_stop()` was true after a step; its checkpoint is written.
        """
        config = self.config
        events = self.folder / "tensorboard"
        with Metrics(self.folder / "metrics.jsonl", events, self.step) as metrics:
            # What was trained after the checkpoint and is trained again took time, too.
            self.totals.wall_seconds = max(self.totals.wall_seconds, metrics.last_seconds)
            while self.step < config.steps:
                with self.totals.timed("wall_seconds"):
                    line = self._next_step()
                    last = self.step == config.steps
                    if last or self.step % config.eval_every == 0:
                        line.update(self._evaluate())
                line["seconds"] = self.totals.wall_seconds
                metrics.write(line)
                progress.update(line)
                stopping = not last and should_stop()
                if last or stopping or self.step % config.checkpoint_every == 0:
                    with self.totals.timed("wall_seconds"):
                        self._save()
                if stopping:
                    raise Interrupted(self.folder.name, self.step)

    def _next_step(self) -> dict[str, Any]:
        """Trains one step; its metrics."""
        with self.totals.timed("train_seconds"):
            if self.teacher is not None and self.teacher.pauses_before(self.step):
                with self.totals.timed("meta_seconds"):
                    self.teacher.teach_in_pause(self.step, self._learning_rate())
            line = self._train_step()
        self.step += 1
        return {"step": self.step, **line}

    def _train_step(self) -> dict[str, Any]:
        with self.totals.timed("score_seconds"):
            choice = self.chooser.choose(self.step)
        tokens = self.task.tokens(choice.indices, self.device)  # [B, T+1]
        losses = token_losses(self.model, tokens)  # [B, T]
        with self.totals.timed("score_seconds"):
            said = self.weigher.weigh(self.step, losses.detach(), tokens)
        fallback = choice.fallback or said.fallback
        self.totals.fallback_steps += fallback
        samples = per_sample_loss(losses)  # [B]
        loss = weighted_loss(samples, torch.from_numpy(said.values).to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.teacher is not None and self.teacher.teaches_at(self.step):
            with self.totals.timed("meta_seconds"):
                # Before the optimiser step: the losses of the training forward are those of theta.
                self.teacher.teach(self.step, tokens, losses.detach(), choice.probes, self._learning_rate())
        norm = optimise(self.model, self.optimizer, self._learning_rate())
        return {
            "loss": float(samples.detach().mean()),
            "weighted_loss": float(loss.detach()),
            "gradient_norm": norm,
            "learning_rate": self._learning_rate(),
            "effective_sample_size": float(said.values.sum() ** 2 / (said.values**2).sum()),
            "fallback": int(fallback),
            "mean_weight": self.task.mean_by_source(choice.indices, said.values),
            **choice.metrics,
            **said.metrics,
        }

    def _learning_rate(self) -> float:
        return learning_rate(self.config, self.step)

    def _evaluate(self) -> dict[str, float]:
        """Validation and test loss on the fixed samples of the curves."""
        return {
            f"{name}_loss": mean_loss(
                self.model, fixed_subset(split.tokens, self.config.eval_samples), self.config.batch_size, self.device
            )
            for name, split in (("val", self.task.val), ("test", self.task.test))
        }

    def _save(self) -> None:
        if self.teacher is not None:
            self.teacher.flush(self.step)  # a resumed run can't compute those updates again
        state = {
            "totals": asdict(self.totals),
            "chooser": self.chooser.state_dict(),
            "weigher": self.weigher.state_dict(),
        }
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        checkpoint.save(self.folder / "checkpoints", self.step, self.model, self.optimizer, state)
