"""The --out folder of a job: refuses, replaces or continues what is there, and knows where everything lies.

Knows nothing of training.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from trainer_client.run.config import METHODS, RunConfig
from trainer_client.run.report import write_json
from weighting_contract.errors import FailedPrecondition, InvalidArgument

_OURS = (*METHODS, "config.json", "summary.json", "weights.png", "weighter-export", "tokenizer.json")


@dataclass(frozen=True)
class Workspace:
    """Paths of a job's files, and the id that it has at the weighting service, the same after a resume."""

    root: Path
    job_id: str

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
    def weighter_state(self) -> Path:
        """Of an embedded weighter."""
        return self.root / "dwm" / "weighter"

    def run(self, method: str) -> Path:
        """The folder of one method's run."""
        return self.root / method

    def run_summary(self, method: str) -> Path:
        return self.root / method / "summary.json"

    def record(self, method: str) -> Path:
        return self.root / method / "weights.record"


def open_workspace(config: RunConfig) -> Workspace:
    """The folder of `config`, ready to be written to.

    Raises:
        FailedPrecondition: it holds a run, and neither --resume nor --overwrite was given.
        InvalidArgument: it is a file, or what it holds can't be continued.
        OSError: it can't be written.
    """
    root = Path(config.out)
    settings = root / "config.json"
    if root.exists() and not root.is_dir():
        raise InvalidArgument(f"--out {root} is a file, expected a folder or nothing")
    if config.resume:
        job_id = _saved_job_id(settings)
        write_json(settings, {"job_id": job_id, "config": config.to_dict()})
        return Workspace(root, job_id)
    if settings.exists():
        if not config.overwrite:
            raise FailedPrecondition(
                f"--out {root} already holds a run: add --resume to continue it, --overwrite to replace it, "
                "or name another folder"
            )
        _remove_run(root)
    root.mkdir(parents=True, exist_ok=True)
    job_id = re.sub(r"[^A-Za-z0-9]+", "-", f"run-{root.resolve().name[:64]}-") + uuid.uuid4().hex[:12]
    write_json(settings, {"job_id": job_id, "config": config.to_dict()})
    return Workspace(root, job_id)


def _saved_job_id(settings: Path) -> str:
    try:
        return str(json.loads(settings.read_text(encoding="utf-8"))["job_id"])
    except (ValueError, KeyError, TypeError) as exc:
        raise InvalidArgument(f"{settings} is not the settings of a run: {exc}") from exc


def _remove_run(root: Path) -> None:
    """Only what a run writes: the folder may hold other things of the user's."""
    for name in _OURS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
