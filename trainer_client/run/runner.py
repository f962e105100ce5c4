"""A whole job: data, reference, a run for each variant, and their files. Puts the parts of this package together."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from trainer_client.ranks import Ranks
from trainer_client.reference.config import SMALLEST, ReferenceConfig
from trainer_client.run.afterwards import check_extras, finish_job
from trainer_client.run.choose import AsDrawn, Chooser, MostAlike, Selected
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Progress
from trainer_client.run.device import set_up_torch
from trainer_client.run.fingerprint import check_fingerprint, write_fingerprint
from trainer_client.run.loop import Loop
from trainer_client.run.methods.prepare import Methods, prepare_methods
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import build_model, count_parameters
from trainer_client.run.parallel import check_parallel
from trainer_client.run.plot import SourceHistory, plot_sources
from trainer_client.run.progress import JobProgress, preparing
from trainer_client.run.recorder import Recorder
from trainer_client.run.reference import AUTO, RunReference, cached_reference, given_reference, made_reference
from trainer_client.run.replay import ReplayedChoice, ReplayedWeights, bring_records, check_replay
from trainer_client.run.report import RunSummary, job_summary, write_json
from trainer_client.run.session import WeighterSession, check_service, columns_of
from trainer_client.run.signals import StopOnSignal
from trainer_client.run.start import Start, check_tokenizer, given_start, reads_profile
from trainer_client.run.summarise import source_history, summarise
from trainer_client.run.target import job_profile
from trainer_client.run.task import Task, build_task
from trainer_client.run.teach import Learner, Teacher
from trainer_client.run.tokenizer import Tokenizer, load_tokenizer
from trainer_client.run.tracking import WandbRun
from trainer_client.run.variants import Variant
from trainer_client.run.weigh import Even, Learned, Weigher
from trainer_client.run.workspace import Workspace, check_workspace, open_workspace
from weighting_contract.columns import COLUMNS
from weighting_contract.export import write_export
from weighting_contract.profile import Profile
from weighting_contract.reference import write_reference

logger = logging.getLogger(__name__)

_LARGE_REFERENCE = 0.5  # of the trainer's parameters; a tenth is what is aimed at


def run_job(
    config: RunConfig, console: Console, stop: StopOnSignal, ranks: Ranks | None = None
) -> dict[str, RunSummary]:
    """Runs every variant of `config` that is not finished yet and writes the job's files; summaries by label.

    Args:
        ranks: that do it together; collective, the summaries are the first one's. None: this process alone.

    Raises:
        Interrupted: a signal came during training; the run can be resumed.
        WeighbridgeError: a mistake in the settings or the data.
        OSError: a file can't be written.
    """
    ranks = ranks or Ranks.alone()
    device = ranks.together(lambda: set_up_torch(config))
    with ExitStack() as stack:
        first: list[tuple[RunJob, Workspace]] = []  # of the first rank

        def begin() -> str:
            check_parallel(config, ranks)
            first.append(_begin(config, device, console, stack))
            return first[0][0].task.tokenizer.to_json()

        tokenizer = ranks.from_first(begin)
        job = ranks.together(lambda: first[0][0] if first else _same_job(config, device, tokenizer))
        ranks.all_equal("what the samples are, so their files differ: the checksum", _checksum(job.task))
        workspace = first[0][1] if first else Workspace(Path(config.out), "", config.main.label)
        runs = _run_variants(job, workspace, console, stop, ranks)
        ranks.from_first(lambda: runs.update(finish_job(config, workspace, job.model, runs, device, console)))
        return runs


def _begin(config: RunConfig, device: torch.device, console: Console, stack: ExitStack) -> tuple[RunJob, Workspace]:
    """What the first rank does before training: everything that may be wrong, then the folder."""
    check_workspace(config)
    check_extras(config, console)
    with preparing(console) as progress:
        job = prepare(config, device, progress)  # mistakes are found here, before an old run is replaced
    if any(variant.learned for variant in config.variants) and not config.resume and not config.replay_weights:
        check_service(config, job.reference, job.start)
    workspace = stack.enter_context(open_workspace(config))
    job.task.tokenizer.save(workspace.tokenizer)
    write_fingerprint(workspace.samples, job.task)
    read_by = job.reference or job.judging
    if read_by and read_by.files:
        write_reference(workspace.reference, read_by.files, replace=True)
    if job.start:
        job = replace(job, start=replace(job.start, folder=write_export(workspace.weighter_start, job.start.files)))
    return job, workspace


def _same_job(config: RunConfig, device: torch.device, tokenizer: str) -> RunJob:
    """The job on a rank that follows: data and model, by the first one's tokenizer."""
    task = build_task(config, None, Tokenizer.from_json(tokenizer))
    model = build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed)
    return RunJob(config, task, device, model, None, None, None, Methods(config, task))


def _checksum(task: Task) -> str:
    digest = hashlib.sha256()
    for split in (task.train, task.val, task.test):
        digest.update(np.ascontiguousarray(split.tokens).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RunJob:
    """What the runs of a job have in common."""

    config: RunConfig
    task: Task
    device: torch.device
    model: PreTrainedModel  # as every run begins
    reference: RunReference | None  # of runs that select; None: there are none, or it is not made yet
    judging: RunReference | None  # of judges that read and tune a model, likewise
    profile: Profile | None
    methods: Methods  # of its judged runs
    start: Start | None = None  # of the main run's weighter, where it is an export

    def reference_of(self, variant: Variant) -> RunReference | None:
        """What a run of the job reads samples by; None where it needs none."""
        if variant.selects:
            return self.reference
        return self.judging if variant.reads_reference else None


def prepare(config: RunConfig, device: torch.device, progress: Progress, *, make_reference: bool = True) -> RunJob:
    """Data, model and reference of a job; writes nothing but caches.

    Args:
        make_reference: False leaves the reference out where it is neither given nor in the cache.

    Raises:
        InvalidArgument: a mistake in the settings or the data.
    """
    given = reference = judging = profile = None
    start = given_start(config)
    reading = [variant for variant in config.variants if variant.reads_reference and not config.replay_weights]
    if reading:
        given = given_reference(config)
    task = build_task(config, progress, given.tokenizer if given else _replayed_tokenizer(config))
    _check_samples(config, task)
    check_tokenizer(start, given.tokenizer_checksum if given else task.tokenizer.checksum)
    model = build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed)

    def made(recipe: ReferenceConfig | None = None) -> RunReference | None:
        if make_reference:
            return made_reference(config, task, device, progress, recipe=recipe)
        return cached_reference(config, task, recipe=recipe)

    if any(variant.selects for variant in reading):
        reference = given or made()
    if not all(variant.selects for variant in reading):
        tunable = given is not None and (given.parameters or config.reference != AUTO)
        judging = given if tunable else made(ReferenceConfig(size=SMALLEST))
    if reference is not None:
        profile = job_profile(config.profile, task, reference)
        _warn_of(reference, config, count_parameters(model))
    methods = prepare_methods(config, task, device, judging if make_reference else None, progress)
    return RunJob(config, task, device, model, reference, judging, profile, methods, start)


def _replayed_tokenizer(config: RunConfig) -> Tokenizer | None:
    """That of the run whose records are replayed: there a reference may have brought it."""
    if not config.replay_weights or config.tokenizer:
        return None
    return load_tokenizer((Path(config.out) if config.resume else Path(config.replay_weights)) / "tokenizer.json")


def _check_samples(config: RunConfig, task: Task) -> None:
    if config.resume:
        samples = Path(config.out) / "samples.json"
        if samples.exists():  # else the run ended before it had begun
            check_fingerprint(samples, task, f"the run in {config.out}")
    elif config.replay_weights:
        check_replay(config, task)


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


def _run_variants(
    job: RunJob, workspace: Workspace, console: Console, stop: StopOnSignal, ranks: Ranks
) -> dict[str, RunSummary]:
    config = job.config
    runs: dict[str, RunSummary] = {}
    with stop, JobProgress(console, config.steps * len(config.variants), config.batch_size) as bar:
        for index, variant in enumerate(config.variants):
            path = workspace.run_summary(variant.label)
            if not ranks.from_first(path.exists):
                _Run(job, workspace, variant, ranks).finish(bar, index * config.steps, stop)
            if ranks.is_first:
                runs[variant.label] = RunSummary.read(path)
    ranks.from_first(lambda: write_json(workspace.summary, job_summary(runs, config.main.label)))
    return runs


@dataclass
class _Attached:
    """What a run asks and reports to; on all ranks but the first nobody."""

    chooser: Chooser
    weigher: Weigher
    session: WeighterSession | None = None
    tracked: WandbRun | None = None

    @property
    def learners(self) -> list[Learner]:
        return [part for part in (self.chooser, self.weigher) if isinstance(part, Selected | Learned)]


class _Run:
    """One variant's run."""

    def __init__(self, job: RunJob, workspace: Workspace, variant: Variant, ranks: Ranks) -> None:
        self._job, self._config, self._task = job, job.config, job.task
        self._workspace, self._variant, self._ranks = workspace, variant, ranks
        self._is_main = variant == job.config.main
        self._folder = workspace.run(variant.label)

    def finish(self, bar: JobProgress, steps_before: int, should_stop: Callable[[], bool]) -> None:
        """Trains to the last step; summary, picture and exported weighter."""
        config, ranks = self._config, self._ranks
        model = copy.deepcopy(self._job.model).to(self._job.device)  # type: ignore[arg-type]
        with ExitStack() as stack:
            attached = _Attached(AsDrawn(self._task.order), Even(config.batch_size))

            def attach() -> tuple[bool, bool]:
                nonlocal attached
                attached = self._attach(model, bar.say, stack)
                held_out = reads_profile(self._variant, self._job.start) and not config.profile
                return bool(attached.learners), held_out

            teacher = None
            taught, held_out = ranks.from_first(attach)
            if taught:
                teacher = Teacher(
                    config,
                    self._task,
                    model,
                    attached.learners,
                    config.cadence(self._variant),
                    held_out=held_out,
                    ranks=ranks,
                )
            loop = Loop(
                config,
                self._task,
                model,
                attached.chooser,
                attached.weigher,
                teacher,
                self._folder,
                job_id=self._workspace.job(self._variant),
                sink=attached.tracked.log if attached.tracked else None,
                ranks=ranks,
            )
            bar.start(self._variant.label, steps_before, loop.step)
            loop.train(bar, should_stop)
            losses = loop.final_losses()
            ranks.from_first(lambda: self._conclude(loop, attached, losses, bar.say))

    def _attach(self, model: torch.nn.Module, say: Callable[[str], None], stack: ExitStack) -> _Attached:
        """Opens the jobs and the records of the run."""
        config = self._config
        self._folder.mkdir(exist_ok=True)
        session = None
        if config.replay_weights:
            bring_records(config, self._workspace, self._variant, self._task)
        elif self._variant.learned:
            session = stack.enter_context(
                WeighterSession(
                    config, self._workspace, self._variant, self._job.reference, self._job.profile, self._job.start
                )
            )
        chooser = self._chooser(session, model, stack)
        weigher = self._weigher(session, model, stack)
        return _Attached(chooser, weigher, session, stack.enter_context(self._wandb(say)) if config.wandb else None)

    def _conclude(
        self, loop: Loop, attached: _Attached, losses: tuple[float, float], say: Callable[[str], None]
    ) -> None:
        """Writes what there is to say of a run that is trained."""
        export = self._workspace.export if self._is_main else None
        weighter = attached.session.finish(export, say) if attached.session else None
        choices = [attached.chooser.choose(step) for step in range(self._config.steps)]
        history = source_history(loop, choices)
        if self._variant.learned and self._is_main:
            self._plot(history)
        reference = self._job.reference_of(self._variant)
        summary = summarise(self._variant, loop, choices, history, weighter, reference, losses)
        if attached.tracked is not None:
            attached.tracked.summarise(asdict(summary))
        summary.write(self._workspace.run_summary(self._variant.label))

    def _wandb(self, say: Callable[[str], None]) -> WandbRun:
        label = self._variant.label
        return WandbRun(
            self._config.wandb,
            self._workspace.job(self._variant),
            name=f"{self._workspace.root.resolve().name} {label}",
            group=self._workspace.job_id,
            settings={**self._config.to_dict(), "label": label},
            folder=self._folder,
            say=say,
        )

    def _plot(self, history: SourceHistory) -> None:
        trust = None
        if self._variant.selects:
            trust = np.array([line["trust"] for line in read_metrics(self._folder / "metrics.jsonl")])
        title = f"How much each source counts ({self._variant.label}, seed {self._config.seed})"
        plot_sources(self._workspace.weights_picture, history, title, trust)

    def _chooser(self, session: WeighterSession | None, model: torch.nn.Module, stack: ExitStack) -> Chooser:
        config, task = self._config, self._task
        if self._variant.method == "dsir":
            return MostAlike(task, config.batch_size, config.warm_up_of("dsir"))
        path = self._workspace.selection_record(self._variant.label)
        if config.replay_weights and self._variant.records_choice:
            return ReplayedChoice(path, config, task)

        def open_record() -> Recorder:
            return stack.enter_context(Recorder(path, config.batch_size, task.candidate_order.batch_size))

        if self._variant.judged and self._variant.mode == "select":
            return self._job.methods.chooser(self._variant, model, open_record)
        if session is None or session.selecting is None:
            return AsDrawn(task.order)
        columns = self._job.start.columns if self._variant.from_export and self._job.start else COLUMNS
        return Selected(session.selecting, open_record(), config, task, config.cadence(self._variant), columns)

    def _weigher(self, session: WeighterSession | None, model: torch.nn.Module, stack: ExitStack) -> Weigher:
        config, variant = self._config, self._variant
        path = self._workspace.weights_record(variant.label)
        if config.replay_weights and variant.records_weights:
            return ReplayedWeights(path, config, inner=variant.selects)

        def open_record() -> Recorder:
            return stack.enter_context(Recorder(path, config.batch_size, config.batch_size))

        if variant.judged and variant.mode == "weight":
            return self._job.methods.weigher(variant, model, open_record)
        if session is None or session.weighing is None:
            return Even(config.batch_size)
        return Learned(
            session.weighing,
            open_record(),
            self._task,
            columns=columns_of(variant, self._job.start),
            taught_before=variant.weighter_from != "none" and not variant.selects,
            inner=variant.selects,
        )
