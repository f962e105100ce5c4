"""A run's time with its weighter: connect, open the job, and at the end deliver, report, export and close.

Knows the client, not what the weights are used for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer_client.client import connect
from trainer_client.features import FEATURE_NAMES
from trainer_client.run.config import RunConfig
from trainer_client.run.workspace import Workspace
from weighting_contract.errors import DeadlineExceeded, ResourceExhausted, Unavailable, WeighbridgeError
from weighting_contract.spec import FeatureSpec, WeighterSpec

_PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)  # may be over soon; all else is a mistake in the settings
_FINISH_S = 10.0  # at most, for what is outstanding at the end
_POLL_S = 0.05
_SPEC = WeighterSpec(features=FeatureSpec(names=FEATURE_NAMES))


def check_weighter(config: RunConfig) -> None:
    """Raises WeighbridgeError where the weighter of a new run can't be had; makes it where it is missing.

    A service that is away is only a mistake with `on_failure="raise"`. An embedded weighter without a folder of its own
    is a fresh one.
    """
    with connect(config.weighter) as client:
        try:
            client.create_weighter(config.weighter_name, _SPEC)
        except _PASSING:
            if config.on_failure == "raise":
                raise


class WeighterSession:
    """An open job on the weighter of a run; a context manager."""

    def __init__(self, config: RunConfig, workspace: Workspace) -> None:
        """Raises WeighbridgeError where the job is refused; a service that is away only costs uniform weights."""
        self._config = config
        self._client = connect(
            _url(config, workspace), on_failure="raise" if config.on_failure == "raise" else "uniform"
        )
        try:
            self.job = self._client.open_job(
                workspace.job_id,
                weighter=config.weighter_name,
                spec=_SPEC,
            )
            if self.job.failure is not None and not isinstance(self.job.failure, _PASSING):
                raise self.job.failure
        except BaseException:
            self._client.close()
            raise

    def finish(self, export: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Delivers what is outstanding, exports the weighter and closes the job; what the summary says about it."""
        name = self._config.weighter_name
        about: dict[str, Any] = {"name": name, "url": self._config.weighter, "version": None, "applied_updates": None}
        deadline = time.monotonic() + _FINISH_S
        try:
            if not self.job.away:
                self.job.flush(_FINISH_S)
            view = self._client.get_weighter(name)
            while view.applied_position < self.job.last_position and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                view = self._client.get_weighter(name)
            about.update(version=view.applied_position, applied_updates=view.learning.updates_applied)
            self._client.export_weighter(name, export)
        except WeighbridgeError as exc:
            say(f"the weighter {name!r} could not be exported: {exc}")
        self.job.close()  # before it is counted: what can't be delivered any more is dropped
        about["client"] = self.job.counters.to_dict()  # of this process: a resumed run has had others
        return about

    def __enter__(self) -> WeighterSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.job.close()
        finally:
            self._client.close()


def _url(config: RunConfig, workspace: Workspace) -> str:
    """An embedded weighter without a folder of its own lives in the run's."""
    if config.weighter != "embedded":
        return config.weighter
    return f"embedded://{workspace.weighter_state.resolve()}"
