"""Teaches the weighter that comes with the package, and the tiny reference beside it; `make pretaught` runs it.

    python -m benchmarks.pretaught [--steps 600] [--out weighting_service/pretaught]

The pool is the sources of pip, with a quarter of token-shuffled noise (`benchmarks/mixtures.py`). Four small models are
pretrained on it side by side, two towards its docstrings and two towards its code, and all teach one weighter: what
serves only one of the targets, or is one model's luck, does not last. Neither target is in the built-in corpus. Their
steps take turns, and each waits until the lesson before it is learned, so equal commands give equal files on one
machine; what other seeds gave: docs/method.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.mixtures import pip_mixtures
from trainer_client import Client, connect
from trainer_client.cadence import Cadence
from trainer_client.hypergradient import cotangent
from trainer_client.loss import per_sample_loss
from trainer_client.reference.config import ReferenceConfig
from trainer_client.reference.train import make_reference
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Progress
from trainer_client.run.forward import sample_losses, token_losses
from trainer_client.run.models import build_model
from trainer_client.run.optimiser import build_optimizer, learning_rate, optimise
from trainer_client.run.progress import preparing
from trainer_client.run.session import SELECT_SPEC
from trainer_client.run.task import Task, build_task
from trainer_client.select import Selector
from weighting_contract.export import CARD, TENSORS, build_export, check_export, write_export
from weighting_contract.profile import make_profile
from weighting_contract.reference import check_reference, read_counts, write_reference

NAME, REFERENCE = "taught", "pool"
SEEDS = (0, 1)  # of the models of a target; with one alone, what the weighter is worth hangs on the seed
CPU = torch.device("cpu")
TAUGHT, VALIDATION = 16, 8  # samples behind a cotangent: more than in a run, as it is taught once for all
TAUGHT_EVERY, TAUGHT_FIRST = 4, 48
TAUGHT_AS = replace(SELECT_SPEC, learning=replace(SELECT_SPEC.learning, settle_after=0))  # it has several teachers
# Once it knows something, small steps lose less of it (docs/method.md).
USED_AS = replace(TAUGHT_AS, learning=replace(TAUGHT_AS.learning, learning_rate=3e-5))


class Teacher:
    """A small model that is pretrained by selection towards one target, and teaches the shared weighter."""

    def __init__(self, client: Client, task: Task, config: RunConfig, reference: dict[str, bytes]) -> None:
        self._task, self._config, self._cadence = task, config, Cadence(TAUGHT_EVERY, TAUGHT_FIRST)
        self._model = build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed).eval()
        self._optimizer = build_optimizer(self._model, config)
        info = check_reference(reference, "the reference")
        self._job = client.open_job(
            weighter=NAME,
            reference=REFERENCE,
            reference_checksum=info.checksum,
            tokenizer_checksum=info.tokenizer_checksum,
            # Of all validation documents, cotangents too, unlike in a run: pip has few, and taught towards a quarter of
            # them the weighter served other corpora less well (docs/method.md).
            profile=make_profile(task.val.tokens, read_counts(reference).ngrams),
        )
        self._selector = Selector(self._job, keep=config.batch_size, seed=config.seed)
        self.kept: list[float] = []  # share of real text, not noise, of each step's batch

    def step(self, step: int) -> int:
        """One optimiser step; the position of this teacher's newest lesson, in the log by now."""
        task = self._task
        due = self._cadence.due(step)
        drawn = task.candidate_order.indices(step)
        self._selector.submit(step, task.train.tokens[drawn], probes=None if due else 0)
        selection = self._selector.result(step)
        tokens = task.tokens(drawn[selection.kept], CPU)
        self.kept.append(1 - task.share_by_source(drawn[selection.kept])["noise"])
        losses = token_losses(self._model, tokens)
        self._optimizer.zero_grad(set_to_none=True)
        per_sample_loss(losses).mean().backward()
        rate = learning_rate(self._config, step)
        if due:
            towards = task.validation_draw(step, VALIDATION, CPU)
            known = per_sample_loss(losses.detach())[:TAUGHT]
            taught = cotangent(
                self._model,
                sample_losses,
                tokens[:TAUGHT],
                towards,
                learning_rate=rate,
                two_sided=False,
                base_losses=known,
            )
            self._selector.teach(step, taught, selection)
        optimise(self._model, self._optimizer, rate)
        return self._delivered(step) if due else 0

    def _delivered(self, step: int) -> int:
        """Position of the lesson of `step`, once it is in the log."""
        while self._job.last_step < step:
            self._job.flush()
            time.sleep(0.001)
        return self._job.last_position

    def close(self) -> None:
        self._job.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("weighting_service/pretaught"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, preparing(Console(), "teaching", every=50) as progress:
        tasks = load_tasks(Path(work), given.steps, progress)
        reference = train_reference(tasks[0], progress)
        weighter = teach(tasks, reference, progress)
    write_reference(given.out / "reference", reference, replace=True)
    write_export(given.out / "weighter", weighter)
    print(f"{given.out} holds the weighter and its reference; now: make learning")
    return 0


def load_tasks(work: Path, steps: int, progress: Progress) -> list[tuple[RunConfig, Task]]:
    """The data of each model: one pool and one tokenizer for all."""
    tasks: list[tuple[RunConfig, Task]] = []
    for target, mixture in pip_mixtures().items():
        paths = {name: str(path) for name, path in mixture.write(work / target).items()}
        for seed in SEEDS:
            config = RunConfig(
                data=(paths["pool"],), val=(paths["val"],), test=(paths["test"],), steps=steps, seed=seed, out=work.name
            ).check()
            tasks.append((config, build_task(config, progress, tasks[0][1].tokenizer if tasks else None)))
    return tasks


def train_reference(task: tuple[RunConfig, Task], progress: Progress) -> dict[str, bytes]:
    config, data = task
    return make_reference(
        data.train,
        data.tokenizer,
        ReferenceConfig(size="tiny"),
        trained_on=f"the sources of pip and noise: {len(data.train):,} samples of {config.seq_len} tokens",
        command="make pretaught",
        device="cpu",
        progress=progress,
    ).files


def teach(tasks: list[tuple[RunConfig, Task]], reference: dict[str, bytes], progress: Progress) -> dict[str, bytes]:
    """The files of the weighter after the last step, with the spec that it is to be used with."""
    steps = tasks[0][0].steps
    with connect("embedded") as client, tempfile.TemporaryDirectory() as export:
        client.put_reference(REFERENCE, reference)
        client.create_weighter(NAME, TAUGHT_AS)
        teachers = [Teacher(client, task, config, reference) for config, task in tasks]
        for step in range(steps):
            for teacher in teachers:
                position = teacher.step(step)
                while client.get_weighter(NAME).applied_position < position:
                    time.sleep(0.001)
            shares = ", ".join(f"{np.mean(teacher.kept[-50:]):.2f}" for teacher in teachers)
            progress(step + 1, steps, f"teaching; real text among the kept: {shares}")
        for teacher in teachers:
            teacher.close()
        folder = client.export_weighter(NAME, export)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    position = check_export(files, NAME).position
    return build_export(USED_AS, files[TENSORS], files[CARD].decode(), position=position)


if __name__ == "__main__":
    sys.exit(main())
