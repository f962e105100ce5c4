"""A whole job: data, reference, a run for each variant, and their files. Puts the parts of this package together."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from trainer_client.run.choose import AsDrawn, Chooser, MostAlike, Selected
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Progress
from trainer_client.run.device import set_up_torch
from trainer_client.run.loop import Loop
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import build_model, count_parameters
from trainer_client.run.plot import SourceHistory, plot_sources
from trainer_client.run.progress import JobProgress, preparing
from trainer_client.run.recorder import Recorder
from trainer_client.run.reference import RunReference, given_reference, trained_reference
from trainer_client.run.report import RunSummary, job_summary, write_json
from trainer_client.run.session import WeighterSession, check_service
from trainer_client.run.signals import StopOnSignal
from trainer_client.run.summarise import source_history, summarise
from trainer_client.run.target import job_profile
from trainer_client.run.task import Task, build_task
from trainer_client.run.teach import Learner, Teacher
from trainer_client.run.variants import Variant
from trainer_client.run.weigh import Even, Learned, Weigher
from trainer_client.run.workspace import Workspace, check_workspace, open_workspace
from weighting_contract.profile import Profile
from weighting_contract.reference import write_reference

logger = logging.getLogger(__name__)

_LARGE_REFERENCE = 0.5  # of the trainer's parameters; a tenth is what is aimed at


def run_job(config: RunConfig, console: Console, stop: StopOnSignal) -> dict[str, RunSummary]:
    """Runs every variant of `config` that is not finished yet and writes the job's files; summaries by label.

    Raises:
        Interrupted: a signal came during training; the run can be resumed.
        WeighbridgeError: a mistake in the settings or the data.
        OSError: a file can't be written.
    """
    device = set_up_torch(config)
    check_workspace(config)
    with preparing(console) as progress:
        job = _prepare(config, device, progress)  # mistakes are found here, before an old run is replaced
    if any(variant.learned for variant in config.variants) and not config.resume:
        check_service(config, job.reference)
    with open_workspace(config) as workspace:
        job.task.tokenizer.save(workspace.tokenizer)
        if job.reference and job.reference.files:
            write_reference(workspace.reference, job.reference.files, replace=True)
        return _run_variants(job, workspace, console, stop)


@dataclass(frozen=True)
class _Job:
    """What the runs of a job have in common."""

    config: RunConfig
    task: Task
    device: torch.device
    model: torch.nn.Module  # as every run begins
    reference: RunReference | None  # None: no run selects
    profile: Profile | None


def _prepare(config: RunConfig, device: torch.device, progress: Progress) -> _Job:
    reference = profile = None
    selects = any(variant.selects for variant in config.variants)
    if selects:
        reference = given_reference(config)
    task = build_task(config, progress, reference.tokenizer if reference else None)
    model = build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed)
    if selects:
        reference = reference or trained_reference(config, task, device, progress)
        profile = job_profile(config.profile, task, reference)
        _warn_of(reference, config, count_parameters(model))
    return _Job(config, task, device, model, reference, profile)


def _warn_of(reference: RunReference, config: RunConfig, parameters: int) -> None:
    if reference.parameters > _LARGE_REFERENCE * parameters:
        logger.warning(
            "the reference has %s parameters and the model %s: scoring will cost more than it should; "
            "a tenth of the model is plenty",
            f"{reference.parameters:,}",
            f"{parameters:,}",
        )
    if reference.seq_len < config.seq_len:
        logger.warning(
            "the reference reads %d tokens of a sample at most, and --seq-len is %d: the rest has no say",
            reference.seq_len,
            config.seq_len,
        )


def _run_variants(job: _Job, workspace: Workspace, console: Console, stop: StopOnSignal) -> dict[str, RunSummary]:
    config = job.config
    runs: dict[str, RunSummary] = {}
    with stop, JobProgress(console, config.steps * len(config.variants), config.batch_size) as bar:
        for index, variant in enumerate(config.variants):
            path = workspace.run_summary(variant.label)
            if path.exists():
                runs[variant.label] = RunSummary.read(path)
                continue
            runs[variant.label] = _Run(job, workspace, variant).finish(bar, index * config.steps, stop)
            runs[variant.label].write(path)
    write_json(workspace.summary, job_summary(runs, config.main.label))
    return runs


class _Run:
    """One variant's run."""

    def __init__(self, job: _Job, workspace: Workspace, variant: Variant) -> None:
        self._job, self._config, self._task = job, job.config, job.task
        self._workspace, self._variant = workspace, variant
        self._is_main = variant == job.config.main
        self._folder = workspace.run(variant.label)
        self._folder.mkdir(exist_ok=True)

    def finish(self, bar: JobProgress, steps_before: int, should_stop: Callable[[], bool]) -> RunSummary:
        """Trains to the last step; summary, picture and exported weighter."""
        config, label = self._config, self._variant.label
        model = copy.deepcopy(self._job.model).to(self._job.device)
        with ExitStack() as stack:
            session = None
            if self._variant.learned:
                session = stack.enter_context(
                    WeighterSession(config, self._workspace, self._variant, self._job.reference, self._job.profile)
                )
            chooser = self._chooser(session, stack)
            weigher = self._weigher(session, stack)
            learners: list[Learner] = [part for part in (chooser, weigher) if isinstance(part, Selected | Learned)]
            cadence = config.cadence(self._variant)
            held_out = self._variant.reads_profile and not config.profile
            teacher = Teacher(config, self._task, model, learners, cadence, held_out=held_out) if learners else None
            loop = Loop(config, self._task, model, chooser, weigher, teacher, self._folder)
            bar.start(label, steps_before, loop.step)
            loop.train(bar, should_stop)
            export = self._workspace.export if self._is_main else None
            weighter = session.finish(export, bar.say) if session else None
            choices = [chooser.choose(step) for step in range(config.steps)]
            history = source_history(loop, choices)
            if self._variant.learned and self._is_main:
                self._plot(history)
            return summarise(self._variant, loop, choices, history, weighter, self._job.reference)

    def _plot(self, history: SourceHistory) -> None:
        trust = None
        if self._variant.selects:
            trust = np.array([line["trust"] for line in read_metrics(self._folder / "metrics.jsonl")])
        title = f"How much each source counts ({self._variant.label}, seed {self._config.seed})"
        plot_sources(self._workspace.weights_picture, history, title, trust)

    def _chooser(self, session: WeighterSession | None, stack: ExitStack) -> Chooser:
        config, task = self._config, self._task
        if self._variant.method == "dsir":
            return MostAlike(task, config.batch_size)
        if session is None or session.selecting is None:
            return AsDrawn(task.order)
        path = self._workspace.selection_record(self._variant.label)
        recorder = stack.enter_context(Recorder(path, config.batch_size, task.candidate_order.batch_size))
        return Selected(session.selecting, recorder, config, task, config.cadence(self._variant))

    def _weigher(self, session: WeighterSession | None, stack: ExitStack) -> Weigher:
        config, variant = self._config, self._variant
        if session is None or session.weighing is None:
            return Even(config.batch_size)
        path = self._workspace.weights_record(variant.label)
        recorder = stack.enter_context(Recorder(path, config.batch_size, config.batch_size))
        return Learned(
            session.weighing,
            recorder,
            self._task,
            self._job.device,
            pretaught=variant.pretaught and not variant.selects,
            inner=variant.selects,
        )
