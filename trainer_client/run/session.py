"""A run's time with its weighters: connect, open the jobs, and at the end deliver, report, export and close.

Knows the client, not what samples and weights are used for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer_client.client import Client, connect
from trainer_client.features import FEATURE_NAMES
from trainer_client.job import Job
from trainer_client.run.config import RunConfig
from trainer_client.run.deliver import deliver
from trainer_client.run.reference import RunReference
from trainer_client.run.start import Start
from trainer_client.run.variants import Variant
from trainer_client.run.weigh import LEAST_SHARE
from trainer_client.run.workspace import Workspace
from trainer_client.settings import Timeouts
from trainer_client.transports import is_embedded
from weighting_contract.columns import COLUMNS
from weighting_contract.errors import DeadlineExceeded, NotFound, ResourceExhausted, Unavailable, WeighbridgeError
from weighting_contract.export import PRETAUGHT
from weighting_contract.profile import Profile
from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec

SELECT_SPEC = WeighterSpec(  # reads a reference's statistics; candidates may be told apart sharply
    features=FeatureSpec(names=COLUMNS),
    head=HeadSpec(temperature=0.5, min_effective_share=0.1),
    learning=LearningSpec(learning_rate=3e-3, settle_after=48),
)
WEIGHT_SPEC = WeighterSpec(  # reads the trainer's; every weight above the others costs gradient noise
    features=FeatureSpec(names=COLUMNS),
    head=HeadSpec(temperature=0.5, min_effective_share=LEAST_SHARE),
    learning=LearningSpec(learning_rate=3e-3, settle_after=48),
)
INNER_SPEC = WeighterSpec(features=FeatureSpec(names=FEATURE_NAMES))  # the target had its say when they were selected

PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)  # may be over soon; all else is a mistake in the settings
_FINISH_S = 10.0  # at most, for what is outstanding at the end
_POLL_S = 0.05


def check_service(config: RunConfig, reference: RunReference | None, start: Start | None) -> None:
    """Raises WeighbridgeError where the weighters of a new job can't be had; makes them where they are missing.

    A service that is away is only a mistake with `on_failure="raise"`. One without room for them is, unless the run is
    resumed: that does not pass by itself. An embedded one without a folder of its own is a fresh one.
    """
    with connect(config.weighter, **config.credentials, timeouts=_timeouts(config)) as client:
        try:
            for variant in config.variants:
                for name, begun in weighter_names(variant, start):
                    client.create_weighter(name, **begun)
            if reference and reference.files and not _hosted(client, reference):
                client.put_reference(reference.name, reference.files)
        except PASSING as exc:
            if config.on_failure == "raise" or (isinstance(exc, ResourceExhausted) and not config.resume):
                raise


def _hosted(client: Client, reference: RunReference) -> bool:
    """Whether the service has it already: its files may be large."""
    try:
        return client.get_reference(reference.name).checksum == reference.checksum
    except NotFound:
        return False


class WeighterSession:
    """The open jobs of a run; a context manager.

    Attributes:
        selecting: the job that chooses batches from candidates; None where the run doesn't.
        weighing: the job that weighs the samples of a batch; None where the run doesn't.
    """

    def __init__(
        self,
        config: RunConfig,
        workspace: Workspace,
        variant: Variant,
        reference: RunReference | None,
        profile: Profile | None,
        start: Start | None,
    ) -> None:
        """Raises WeighbridgeError where a job is refused; a service that is away only costs the weighter's word."""
        self._config, self._variant, self._start = config, variant, start
        older: Any = config.on_older_service
        self._client: Client = connect(
            _url(config, workspace),
            **config.credentials,
            timeouts=_timeouts(config),
            on_failure="raise" if config.on_failure == "raise" else "uniform",
            on_older_service=older,
        )
        self.selecting: Job | None = None
        self.weighing: Job | None = None
        try:
            job_id = workspace.job(variant)
            if variant.selects and reference is not None:
                self.selecting = self._open_selecting(job_id, reference, profile)
            if variant.weighs:
                self.weighing = self._open_weighing(job_id)
        except BaseException:
            self._client.close()
            raise

    def finish(self, export: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
        """Delivers what is outstanding, exports the weighter and closes the jobs; what the summary says about it."""
        main = self.selecting or self.weighing
        assert main is not None
        about = self._finish(main, self._variant.weighter, export, say)
        if self.weighing is not None and self.weighing is not main:
            inner = export / "inner" if export else None
            about["inner"] = self._finish(self.weighing, self._variant.inner_weighter, inner, say)
        return about

    def __enter__(self) -> WeighterSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._client.close()  # closes the jobs first

    def _open_selecting(self, job_id: str, reference: RunReference, profile: Profile | None) -> Job:
        return self._open(
            job_id,
            self._variant.weighter,
            **start_of(self._variant, self._start),
            reference=reference.name,
            reference_checksum=reference.checksum,
            reference_files=reference.files,
            tokenizer_checksum=reference.tokenizer_checksum,
            profile=profile,
        )

    def _open_weighing(self, job_id: str) -> Job:
        if self._variant.selects:
            return self._open(f"{job_id}-inner", self._variant.inner_weighter, spec=INNER_SPEC)
        begun: dict[str, Any] = start_of(self._variant, self._start)
        if self._variant.from_export and self._start:
            begun["tokenizer_checksum"] = self._start.tokenizer_checksum  # the run's own: it was checked
        names = columns_of(self._variant, self._start)
        return self._open(job_id, self._variant.weighter, **begun, feature_names=names)

    def _open(self, job_id: str, weighter: str, **arguments: Any) -> Job:
        role: Any = self._variant.role
        job = self._client.open_job(job_id, weighter=weighter, role=role, **arguments)
        if job.failure is not None and not isinstance(job.failure, PASSING):
            raise job.failure
        return job

    def _finish(self, job: Job, weighter: str, export: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
        about: dict[str, Any] = {"name": weighter, "url": self._config.weighter, "version": None}
        about["applied_updates"] = None
        deadline = time.monotonic() + _FINISH_S
        try:
            deliver(job)
            view = self._client.get_weighter(weighter)
            while view.applied_position < job.last_position and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                view = self._client.get_weighter(weighter)
            about.update(version=view.applied_position, applied_updates=view.learning.updates_applied)
            about["initial"] = view.initial
            if job.job_id in view.learning.jobs:
                about["trust_t"] = view.learning.jobs[job.job_id].trust_t
            if export is not None:
                self._client.export_weighter(weighter, export)
        except WeighbridgeError as exc:
            say(f"the weighter {weighter!r} could not be exported: {exc}")
        job.close()  # before it is counted: what can't be delivered any more is dropped
        about["client"] = job.counters.to_dict()  # of this process: a resumed run has had others
        return about


def weighter_names(variant: Variant, start: Start | None) -> list[tuple[str, dict[str, Any]]]:
    """The weighters of a run, each with what makes it where it is missing; none for a run without any."""
    if not variant.learned:
        return []
    named = [(variant.weighter, start_of(variant, start))]
    return named + [(variant.inner_weighter, {"spec": INNER_SPEC})] * (variant.mode == "both")


def start_of(variant: Variant, start: Start | None) -> dict[str, Any]:
    """What makes the weighter of a run where it is missing."""
    if variant.pretaught:
        return {"initial": PRETAUGHT}
    if variant.from_export and start:
        return {"initial": start.folder}
    return {"spec": SELECT_SPEC if variant.selects else WEIGHT_SPEC}


def columns_of(variant: Variant, start: Start | None) -> tuple[str, ...]:
    """What the trainer gives the weighter of a run that weighs, of each sample."""
    if variant.selects:
        return FEATURE_NAMES  # of the second weighter
    return start.columns if variant.from_export and start else COLUMNS


def _timeouts(config: RunConfig) -> Timeouts | None:
    """None: the defaults of the service in question."""
    if not config.deadline:
        return None
    usual = Timeouts.embedded() if is_embedded(config.weighter) else Timeouts()
    return replace(usual, score_s=config.deadline, admin_s=max(usual.admin_s, config.deadline))


def _url(config: RunConfig, workspace: Workspace) -> str:
    """An embedded service without a folder of its own keeps its state in the job's."""
    if config.weighter != "embedded":
        return config.weighter
    return f"embedded://{workspace.weighters.resolve()}"
