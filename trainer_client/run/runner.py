"""A whole job: data, one run a method, and the files that they leave. Puts the parts of this package together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from trainer_client.run.config import RunConfig
from trainer_client.run.evaluate import mean_loss
from trainer_client.run.loop import Loop
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import build_model
from trainer_client.run.plot import plot_weights
from trainer_client.run.progress import JobProgress, preparing
from trainer_client.run.recorder import Recorder, read_records
from trainer_client.run.report import RunSummary, job_summary, mean_effective_size, weights_by_source, write_json
from trainer_client.run.session import WeighterSession, check_weighter
from trainer_client.run.signals import StopOnSignal
from trainer_client.run.task import Task, build_task
from trainer_client.run.teach import Teacher
from trainer_client.run.weigh import LearnedWeigher, UniformWeigher
from trainer_client.run.workspace import Workspace, check_workspace, open_workspace
from weighting_contract.errors import InvalidArgument


def run_job(config: RunConfig, console: Console, stop: StopOnSignal) -> dict[str, RunSummary]:
    """Runs every method of `config` that is not finished yet and writes the job's files; summaries by method.

    Raises:
        Interrupted: a signal came during training; the run can be resumed.
        WeighbridgeError: a mistake in the settings or the data.
        OSError: a file can't be written.
    """
    device = set_up_torch(config)
    check_workspace(config)
    with preparing(console) as progress:
        task = build_task(config, progress)
    _build_model(config, task)  # mistakes are found here, before an old run is replaced
    if "dwm" in config.methods and not config.resume:
        check_weighter(config)
    with open_workspace(config) as workspace:
        task.tokenizer.save(workspace.tokenizer)
        return _run_methods(config, workspace, task, device, console, stop)


def _run_methods(
    config: RunConfig, workspace: Workspace, task: Task, device: torch.device, console: Console, stop: StopOnSignal
) -> dict[str, RunSummary]:
    runs: dict[str, RunSummary] = {}
    with stop, JobProgress(console, config.steps * len(config.methods), config.batch_size) as bar:
        for index, method in enumerate(config.methods):
            path = workspace.run_summary(method)
            if path.exists():
                runs[method] = RunSummary.read(path)
                continue
            run = _Run(config, workspace, task, method, device)
            runs[method] = run.finish(bar, index * config.steps, stop)
            runs[method].write(path)
    write_json(workspace.summary, job_summary(runs, config.method))
    return runs


def set_up_torch(config: RunConfig) -> torch.device:
    """The device of `config`, torch set to compute the same thing twice. Raises InvalidArgument for a wrong one."""
    if config.threads:
        torch.set_num_threads(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise InvalidArgument(f"--device is {config.device!r}, expected cpu, cuda, cuda:N or auto") from exc
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"--device is {config.device!r}, expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise InvalidArgument(f"--device is {config.device!r}, but torch sees {found} CUDA devices")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products differ from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def _build_model(config: RunConfig, task: Task) -> torch.nn.Module:
    return build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed)


class _Run:
    """One method's run."""

    def __init__(self, config: RunConfig, workspace: Workspace, task: Task, method: str, device: torch.device) -> None:
        self._config, self._workspace, self._task, self._method = config, workspace, task, method
        self._folder = workspace.run(method)
        self._folder.mkdir(exist_ok=True)
        self._device = device

    def finish(self, bar: JobProgress, steps_before: int, should_stop: Callable[[], bool]) -> RunSummary:
        """Trains to the last step; summary, picture and exported weighter."""
        config, task = self._config, self._task
        model = _build_model(config, task).to(self._device)
        if self._method == "uniform":
            loop = Loop(config, task, model, UniformWeigher(), None, self._folder)
            bar.start(self._method, steps_before, loop.step)
            loop.train(bar, should_stop)
            return self._summary(loop, model, None)
        with ExitStack() as stack:
            session = stack.enter_context(WeighterSession(config, self._workspace))
            recorder = stack.enter_context(Recorder(self._workspace.record(self._method), config.batch_size))
            weigher = LearnedWeigher(session.job, recorder, task.unigram_nll.to(self._device))
            loop = Loop(config, task, model, weigher, Teacher(session.job, config, task, model), self._folder)
            bar.start(self._method, steps_before, loop.step)
            loop.train(bar, should_stop)
            weighter = session.finish(self._workspace.export, bar.say)
        return self._summary(loop, model, weighter)

    def _summary(self, loop: Loop, model: torch.nn.Module, weighter: dict[str, Any] | None) -> RunSummary:
        config, task, totals = self._config, self._task, loop.totals
        with totals.timed("wall_seconds"):
            val_loss, test_loss = (
                mean_loss(model, split.tokens, config.batch_size, self._device) for split in (task.val, task.test)
            )
        weights = self._weights()
        sources = task.sources(config.steps)
        if weighter is not None:
            title = f"How much each source counts ({self._method}, seed {config.seed})"
            plot_weights(self._workspace.weights_picture, weights, sources, list(task.train.sources), title)
        counts = loop.teacher.counts if loop.teacher else None
        return RunSummary(
            method=self._method,
            seed=config.seed,
            steps=config.steps,
            tokens_seen=config.steps * config.batch_size * config.seq_len,
            val_loss=val_loss,
            test_loss=test_loss,
            **asdict(totals),
            meta_updates=counts.sent if counts else 0,
            meta_updates_skipped=counts.degenerate if counts else 0,
            effective_sample_size=mean_effective_size(weights),
            weights_by_source=weights_by_source(weights, sources, task.train.sources),
            weighter=weighter,
            test_curve=_test_curve(self._folder / "metrics.jsonl"),
        )

    def _weights(self) -> np.ndarray:
        """[steps, B] as they were used."""
        if self._method == "uniform":
            return np.ones((self._config.steps, self._config.batch_size), np.float32)
        records = read_records(self._workspace.record(self._method), self._config.batch_size)
        return np.stack([record.weights for record in records[: self._config.steps]])


def _test_curve(path: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["seconds"], line["test_loss"]) for line in read_metrics(path) if "test_loss" in line]
