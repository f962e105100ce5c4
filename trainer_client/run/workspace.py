"""The --out folder of a job: refuses, replaces or continues what is there, and knows where everything lies.

Knows nothing of training.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer_client.run.config import RunConfig
from trainer_client.run.report import write_json
from trainer_client.run.variants import MAIN_LABELS, METHODS, Variant
from weighting_contract.errors import FailedPrecondition, InvalidArgument

_SETTINGS, _LOCK = "config.json", ".lock"
_RESULTS = (
    *dict.fromkeys((*MAIN_LABELS, *METHODS)),  # runs of earlier versions were called after their methods
    *("summary.json", "weights.png", "weighter-export", "weighters", "weighter-start", "reference"),
    *("tokenizer.json", "samples.json"),
)


@dataclass(frozen=True)
class Workspace:
    """Paths of a job's files, and the id that it has at the weighting service, the same after a resume."""

    root: Path
    job_id: str  # of the main run
    main_label: str

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def weights_picture(self) -> Path:
        return self.root / "weights.png"

    @property
    def export(self) -> Path:
        return self.root / "weighter-export"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def samples(self) -> Path:
        """What tells the samples of the job from others."""
        return self.root / "samples.json"

    @property
    def exported_model(self) -> Path:
        """The main run's model, for transformers."""
        return self.root / self.main_label / "model"

    @property
    def reference(self) -> Path:
        """A copy of the reference that was trained or given for the job."""
        return self.root / "reference"

    @property
    def weighter_start(self) -> Path:
        """A copy of the exported weighter that the main run's started from."""
        return self.root / "weighter-start"

    @property
    def weighters(self) -> Path:
        """State of an embedded service."""
        return self.root / "weighters"

    def job(self, variant: Variant) -> str:
        """Id of a run's job at the weighting service."""
        return self.job_id if variant.label == self.main_label else f"{self.job_id}-{variant.label}"

    def run(self, label: str) -> Path:
        """The folder of one run."""
        return self.root / label

    def run_summary(self, label: str) -> Path:
        return self.root / label / "summary.json"

    def selection_record(self, label: str) -> Path:
        return self.root / label / "selection.record"

    def weights_record(self, label: str) -> Path:
        return self.root / label / "weights.record"


def check_workspace(config: RunConfig) -> None:
    """Raises what `open_workspace` would raise now; changes nothing, so that other mistakes can be looked for next."""
    root = Path(config.out)
    if root.exists() and not root.is_dir():
        raise InvalidArgument(f"--out {root} is a file, expected a folder or nothing")
    if (root / _LOCK).exists():
        with _locked(root):
            pass
    _check_contents(config)


@contextmanager
def open_workspace(config: RunConfig) -> Iterator[Workspace]:
    """The folder of a `config` that is known to be right, ready to be written to, and nobody else's inside the block.

    Raises:
        FailedPrecondition: another run uses it, or it holds a run, and neither --resume nor --overwrite was given.
        InvalidArgument: it is a file, or what it holds can't be continued.
        OSError: it can't be written.
    """
    check_workspace(config)
    root = Path(config.out)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        _check_contents(config)  # again: it may have been used since
        if config.resume:
            job_id = _saved_job_id(root)
        else:
            if (root / _SETTINGS).exists():
                _remove_run(root)
            job_id = re.sub(r"[^A-Za-z0-9]+", "-", f"run-{root.resolve().name[:64]}-") + uuid.uuid4().hex[:12]
        write_json(root / _SETTINGS, {"job_id": job_id, "config": config.to_dict()})
        yield Workspace(root, job_id, config.main.label)


def _check_contents(config: RunConfig) -> None:
    root = Path(config.out)
    if config.resume:
        _saved_job_id(root)
    elif (root / _SETTINGS).exists() and not config.overwrite:
        raise FailedPrecondition(
            f"--out {root} already holds a run: add --resume to continue it, --overwrite to replace it, "
            "or name another folder"
        )


def _saved_job_id(root: Path) -> str:
    settings = root / _SETTINGS
    try:
        job_id = json.loads(settings.read_text(encoding="utf-8"))["job_id"]
    except (ValueError, KeyError, TypeError) as exc:
        raise InvalidArgument(f"{settings} is not the settings of a run: {exc}") from exc
    if not isinstance(job_id, str):
        raise InvalidArgument(f"{settings} is damaged: job_id is {job_id!r}, expected a string")
    return job_id


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """No other run uses the folder inside the block. The system frees it when the process ends, however it ends."""
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace") or "unknown"
            raise FailedPrecondition(
                f"--out {root} is in use by another run (process {owner}): wait for it, or name another folder"
            ) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _remove_run(root: Path) -> None:
    """Only what a run writes: the folder may hold other things of the user's."""
    for name in (*_RESULTS, _SETTINGS):  # the settings last: without them nobody would look for the rest
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
