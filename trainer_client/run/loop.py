"""The training loop: samples, forward, weights, weighted loss, backward, teaching, optimiser step; exact on resume.

Everything that happens in a step derives from (seed, step) and the step's records of samples and weights; there is no
other randomness, and dropout is off: a cotangent compares two evaluations of one function. Knows the chooser, the
weigher and the teacher by what they do, not what stands behind them.

Of several ranks the first one alone asks chooser and weigher and writes files; rank r of R takes the r-th of R parts of
the very batch that one process would have, and micro-batches are parts of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer_client.late_weights import late_weights
from trainer_client.loss import per_sample_loss, weighted_loss
from trainer_client.ranks import Ranks, share
from trainer_client.run import checkpoint
from trainer_client.run.choose import Choice, Chooser, LooksAhead
from trainer_client.run.config import RunConfig
from trainer_client.run.evaluate import fixed_subset, mean_loss
from trainer_client.run.metrics import Metrics, Sink
from trainer_client.run.optimiser import build_optimizer, learning_rate, optimise
from trainer_client.run.parallel import Replica, autocast
from trainer_client.run.preferences import Preferences
from trainer_client.run.progress import JobProgress
from trainer_client.run.task import Task
from trainer_client.run.teach import Teacher
from trainer_client.run.weigh import Asks, Weigher, Weights
from weighting_contract.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def _write(metrics: Metrics | None, line: dict[str, Any]) -> None:
    assert metrics is not None  # on the first rank
    metrics.write(line)


class Loop:
    """One run from its newest checkpoint (or the beginning) to the last step; collective."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        model: torch.nn.Module,
        chooser: Chooser,
        weigher: Weigher,
        teacher: Teacher | None,
        folder: Path,
        *,
        job_id: str = "",
        sink: Sink | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            model: fresh, on its device; the newest checkpoint in `folder`, if there is one, is loaded into it.
            chooser, weigher: those of all ranks but the first are never asked.
            teacher: None for a run without a weighter.
            folder: of this run's files; its name is the run's.
            job_id: of the run; a checkpoint of another job is refused. "": whatever there is.
            sink: gets the metrics of each step, too.
            ranks: that train the model together; None: this process alone.
        """
        self.config, self.task, self.model = config, task, model.eval()
        self.chooser, self.weigher, self.teacher, self.folder = chooser, weigher, teacher, folder
        self.ranks = ranks = ranks or Ranks.alone()
        self.device = next(model.parameters()).device
        self._replica = Replica(config, self.model, ranks)
        self._reads_losses: bool = ranks.from_first(lambda: weigher.reads_losses)
        self.optimizer = build_optimizer(model, config)
        self.totals = Totals()
        self._preferences = Preferences(task.train)  # of the first rank, which alone knows its chooser
        self._job_id, self._sink = job_id, sink
        self.step = 0  # optimiser steps done
        state = checkpoint.load_newest(folder / "checkpoints", model, self.optimizer, job_id, ranks)
        if state is not None:
            self._go_on(state)

    def train(self, progress: JobProgress, should_stop: Callable[[], bool]) -> None:
        """Trains up to the last step; metrics, records and checkpoints go to the folder.

        Raises:
            Interrupted: `should_stop()` was true on some rank after a step; its checkpoint is written.
            InvalidArgument: a loss is not finite; the last checkpoint stays.
        """
        config = self.config
        with self._metrics() as metrics:
            if metrics is not None:
                # What was trained after the checkpoint and is trained again took time, too.
                self.totals.wall_seconds = max(self.totals.wall_seconds, metrics.last_seconds)
            while self.step < config.steps:
                with self.totals.timed("wall_seconds"):
                    line = self._next_step()
                    last = self.step == config.steps
                    if last or self.step % config.eval_every == 0:
                        line.update(self._evaluate())
                line["seconds"] = self.totals.wall_seconds
                self.ranks.from_first(partial(_write, metrics, line))
                progress.update(line)
                stopping = not last and self.ranks.any(should_stop())
                if last or stopping or self.step % config.checkpoint_every == 0:
                    with self.totals.timed("wall_seconds"):
                        self._save()
                if stopping:
                    raise Interrupted(self.folder.name, self.step)

    def final_losses(self) -> tuple[float, float]:
        """On all validation and on all test samples."""
        with self.totals.timed("wall_seconds"):
            val, test = (self._mean_loss(split.tokens) for split in (self.task.val, self.task.test))
        return val, test

    def _metrics(self) -> AbstractContextManager[Metrics | None]:
        opened: list[Metrics] = []

        def open_files() -> None:
            path, events = self.folder / "metrics.jsonl", self.folder / "tensorboard"
            opened.append(Metrics(path, events, self.step, self._sink))

        self.ranks.from_first(open_files)
        return opened[0] if opened else nullcontext()

    def _go_on(self, state: dict[str, Any]) -> None:
        """After the step of a checkpoint."""
        self.step, self.totals = state["step"], Totals(**state["totals"])

        def load() -> None:
            self.chooser.load_state_dict(state["chooser"])
            self.weigher.load_state_dict(state["weigher"])
            for step in range(self.step):
                self._preferences.trained(self.chooser.choose(step).indices)

        self.ranks.from_first(load)
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])

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
            choice = self._choice()
        tokens = self.task.tokens(choice.indices[self._mine(choice)], self.device)  # [b, T+1]
        head = self._replica.head if self.config.accumulate == 1 else None
        if head is None:
            losses, samples, said = self._backward_of_several(choice, tokens)
        else:
            losses, samples, said = self._backward_of_one(choice, tokens, head)
        towards = None
        if self.teacher is not None and self.teacher.teaches_at(self.step):
            with self.totals.timed("meta_seconds"):
                # Before the optimiser step: the losses of the training forward are those of theta.
                towards = self._teach(choice, losses, samples)
        norm = optimise(self.model, self.optimizer, self._learning_rate())
        fallback = choice.fallback or said.fallback
        self.totals.fallback_steps += fallback
        return {
            "loss": float(samples.mean()),
            "weighted_loss": float(weighted_loss(samples, torch.from_numpy(said.values))),
            "gradient_norm": norm,
            "learning_rate": self._learning_rate(),
            "effective_sample_size": float(said.values.sum() ** 2 / (said.values**2).sum()),
            "fallback": int(fallback),
            **self._preferred(choice, said, samples, towards),
            **choice.metrics,
            **said.metrics,
        }

    def _preferred(
        self, choice: Choice, said: Weights, samples: torch.Tensor, towards: torch.Tensor | None
    ) -> dict[str, Any]:
        """The step's figures of what was preferred, whose samples are counted now; on the first rank, which writes."""
        if not self.ranks.is_first:
            return {}
        signal = None if towards is None else towards.float().cpu().numpy()
        figures = self._preferences.of_step(
            choice.indices, choice.drawn, said.values, samples.float().numpy(), choice.quarters, signal
        )
        self._preferences.trained(choice.indices)
        return figures

    def _choice(self) -> Choice:
        """The step's samples, as the first rank's chooser has them."""
        return Choice(**self.ranks.from_first(lambda: vars(self.chooser.choose(self.step))))

    def _mine(self, choice: Choice) -> slice:
        """This rank's rows of the batch."""
        return self.ranks.my_rows(len(choice.indices))

    def _ask(self, choice: Choice, losses: torch.Tensor | None) -> Callable[[], Weights]:
        """Asks for the weights of the whole batch; what it returns gives them as the first rank's weigher has them.

        Once they are there, later steps' choices are sent for: those may take their time.

        losses: [b, T] of this rank's rows; None where they are not read.
        """
        whole = None if losses is None else self._gathered_if_read(losses)

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            tokens = self.task.tokens(choice.indices, self.device)
            return tokens.new_zeros((len(tokens), 0), dtype=torch.float32) if whole is None else whole, tokens

        def ask() -> None:
            if isinstance(self.weigher, Asks):
                self.weigher.ask(self.step, *read())

        def weigh() -> dict[str, Any]:
            said = vars(self.weigher.weigh(self.step, *read()))
            if isinstance(self.chooser, LooksAhead):
                self.chooser.look_ahead(self.step)
            return said

        self.ranks.from_first(ask)
        return lambda: Weights(**self.ranks.from_first(weigh))

    def _gathered_if_read(self, losses: torch.Tensor) -> torch.Tensor | None:
        """[B, T] on the first rank, if the weights depend on it."""
        return self.ranks.gather_rows(losses) if self._reads_losses else None

    def _losses_ahead(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self._replica.losses(part) for part in self._micro_batches(tokens)])

    def _micro_batches(self, rows: torch.Tensor) -> list[torch.Tensor]:
        parts = self.config.accumulate
        return [rows[share(len(rows), parts, part)] for part in range(parts)]

    def _backward_of_one(
        self, choice: Choice, tokens: torch.Tensor, head: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor, Weights]:
        """Fills the gradients with that of L = (1/B) sum_i w_i l_i over the whole batch.

        One forward pass serves weights and gradients. The weights are waited for in the backward pass, as late as they
        are needed: on their way while it goes through the loss and half of the output layer.

        Args:
            tokens: [b, T+1] of this rank's rows.
            head: the model's output layer.

        Returns:
            Token losses of this rank's rows, [b, T] detached; mean losses of the whole batch, [B] on the CPU; weights.
        """
        said: list[Weights] = []

        def weights() -> torch.Tensor:
            with self.totals.timed("score_seconds"):
                said.append(answer())
            return torch.from_numpy(said[0].values[self._mine(choice)])

        with late_weights(head, weights):
            losses = self._replica.losses(tokens)
        known = losses.detach()
        # Looked at before the backward pass only where it has to wait for them anyway: a GPU goes on meanwhile.
        samples = self._samples(known) if self._reads_losses else None
        self.optimizer.zero_grad(set_to_none=True)
        loss = per_sample_loss(losses).mean() * self._factor(tokens, choice)
        with self.totals.timed("score_seconds"):
            answer = self._ask(choice, known)
        loss.backward()  # type: ignore[no-untyped-call]
        return known, self._samples(known) if samples is None else samples, said[0]

    def _backward_of_several(self, choice: Choice, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Weights]:
        """The same of several micro-batches: weights that depend on losses need those of all before the first one."""
        known = self._losses_ahead(tokens) if self._reads_losses else None
        samples = None if known is None else self._samples(known)
        with self.totals.timed("score_seconds"):
            said = self._ask(choice, known)()
        weights = torch.from_numpy(said.values[self._mine(choice)]).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        micro_batches = self._micro_batches(tokens)
        for index, (part, its_weights) in enumerate(zip(micro_batches, self._micro_batches(weights), strict=True)):
            with self._replica.micro_batch(last=index == len(micro_batches) - 1):
                losses = self._replica.losses(part)
                loss = weighted_loss(per_sample_loss(losses), its_weights) * self._factor(part, choice)
                loss.backward()  # type: ignore[no-untyped-call]
            found.append(losses.detach())
        trained = torch.cat(found)
        return trained, self._samples(trained) if samples is None else samples, said

    def _factor(self, rows: torch.Tensor, choice: Choice) -> float:
        """That makes the mean over some rows their share in L: gradients are averaged over ranks, and added up here."""
        return len(rows) * self.ranks.world / len(choice.indices)

    def _samples(self, losses: torch.Tensor) -> torch.Tensor:
        """[B] mean token losses of the whole batch, on the CPU. Raises InvalidArgument where one is not finite."""
        samples = self.ranks.all_rows(per_sample_loss(losses).cpu())
        wrong = (~samples.isfinite()).nonzero()
        if len(wrong):
            row, ranks = int(wrong[0]), self.ranks
            where = next(r for r in range(ranks.world) if row < share(len(samples), ranks.world, r).stop)
            on_rank = f" on rank {where}" if ranks.world > 1 else ""
            raise ranks.told(
                InvalidArgument(
                    f"the loss of sample {row} of step {self.step + 1} is {float(samples[row])}{on_rank}, expected a "
                    "finite number: the training has diverged; go on from the last checkpoint with --resume, or start "
                    "again with a lower --lr"
                )
            )
        return samples

    def _teach(self, choice: Choice, losses: torch.Tensor, samples: torch.Tensor) -> torch.Tensor | None:
        """The cotangent [n] of the first samples; None: degenerate."""
        assert self.teacher is not None
        count = self.config.meta_batch
        whole = self.ranks.gather_rows(losses)
        tokens = self.task.tokens(choice.indices[:count], self.device)
        first = None if whole is None else whole[:count]
        base = samples[:count].to(self.device)
        return self.teacher.teach(self.step, tokens, first, base, choice.probes, self._learning_rate())

    def _learning_rate(self) -> float:
        return learning_rate(self.config, self.step)

    def _evaluate(self) -> dict[str, float]:
        """Validation and test loss on the fixed samples of the curves."""
        splits = (("val", self.task.val), ("test", self.task.test))
        samples = self.config.eval_samples
        return {f"{name}_loss": self._mean_loss(fixed_subset(split.tokens, samples)) for name, split in splits}

    def _mean_loss(self, tokens: np.ndarray) -> float:
        with autocast(self.config, self.device):
            return mean_loss(self.model, tokens, self.config.batch_size, self.device, self.ranks)

    def _save(self) -> None:
        if self.teacher is not None:
            self.teacher.flush(self.step)  # a resumed run can't compute those updates again
        tensors = checkpoint.whole_tensors(self.model, self.optimizer)

        def write() -> None:
            checkpoint.write(self.folder / "checkpoints", self.step, tensors, self._state())

        self.ranks.from_first(write)

    def _state(self) -> dict[str, Any]:
        state = {
            "job_id": self._job_id,
            "totals": asdict(self.totals),
            "chooser": self.chooser.state_dict(),
            "weigher": self.weigher.state_dict(),
        }
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        return state
