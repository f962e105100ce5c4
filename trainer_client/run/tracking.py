"""A run's metrics on Weights & Biases, beside TensorBoard: optional, and never in the way of training.

Whatever goes wrong is said once and costs the tracking, not the run. Knows nothing of training. The package `wandb` is
imported only where it was asked for; its own environment variables (WANDB_MODE=offline, WANDB_DIR, ...) apply.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)

_LOGIN_S = 30.0


def check_wandb() -> None:
    """Raises InvalidArgument where the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InvalidArgument(
            "--wandb needs the package wandb, which is not installed: pip install 'weighbridge[wandb]', or leave the "
            "flag out"
        )


class WandbRun:
    """One run of a project; a context manager. A resumed run goes on under its id."""

    def __init__(
        self,
        project: str,
        run_id: str,
        *,
        name: str,
        group: str,
        settings: dict[str, Any],
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        """Begins the run, or goes on with it; where that fails, there is a warning and nothing is tracked.

        Args:
            run_id: of the run, the same after a resume.
            group: of the runs that are compared with each other.
            settings: JSON values, shown as the run's config.
            folder: of its local files, where WANDB_DIR does not say otherwise.
            say: tells the user where the run can be seen.
        """
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=name,
                group=group,
                config=settings,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                # The terminal is the progress bar's; where nobody has logged in, nobody is waited for long.
                settings=wandb.Settings(silent=True, console="off", login_timeout=_LOGIN_S),
            )
            self._run.define_metric("*", step_metric="step")
            if not self._run.offline:
                say(f"W&B: {self._run.url}")
        except Exception as exc:  # no network, nobody logged in, a full disk: the package raises many kinds
            self._give_up(exc)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """The scalars of an optimiser step, counted from 1."""
        self._attempt(lambda run: run.log({"step": step, **scalars}, step=step))

    def summarise(self, values: dict[str, Any]) -> None:
        """What the run has come to; JSON values."""
        self._attempt(lambda run: run.summary.update(values))

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._attempt(lambda run: run.finish(exit_code=0 if kind is None else 1))
        self._run = None

    def _attempt(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as exc:  # as above
            self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        self._run = None
        reason = " ".join(str(exc).split()) or type(exc).__name__
        logger.warning("nothing more goes to W&B, training goes on: %s", reason)
