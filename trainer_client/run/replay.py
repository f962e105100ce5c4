"""Training again with the samples and weights that an earlier run had on record: no service is asked anything.

The records are copied into the new run first, so that it is as complete as the one it repeats: it can be resumed, and
replayed in turn. Knows records, not who wrote them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer_client.run.choose import Choice
from trainer_client.run.config import RunConfig
from trainer_client.run.fingerprint import check_fingerprint
from trainer_client.run.recorder import Record, read_records
from trainer_client.run.task import Task
from trainer_client.run.variants import Variant
from trainer_client.run.weigh import Weights
from trainer_client.run.workspace import Workspace
from weighting_contract.errors import InvalidArgument


def check_replay(config: RunConfig, task: Task) -> None:
    """Raises InvalidArgument where the run of --replay-weights has not the records that `config` needs."""
    root = Path(config.replay_weights)
    check_fingerprint(root / "samples.json", task, f"the run in {root}", ("train",))
    for variant in config.variants:
        for name, candidates in _record_files(variant, config, task).items():
            path = root / variant.label / name
            if not path.is_file():
                raise InvalidArgument(
                    f"--replay-weights {root} has no records of a run called {variant.label} ({path} is missing)"
                )
            _whole(read_records(path, config.batch_size, candidates), config.steps, path)


def bring_records(config: RunConfig, workspace: Workspace, variant: Variant, task: Task) -> None:
    """Copies the records that a run needs into its folder, where they are not there yet."""
    for name in _record_files(variant, config, task):
        path = workspace.run(variant.label) / name
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            shutil.copyfile(Path(config.replay_weights) / variant.label / name, partial)
            partial.replace(path)


class ReplayedChoice:
    """The samples that each step had before; a chooser."""

    def __init__(self, path: Path, config: RunConfig, task: Task) -> None:
        self._task = task
        records = read_records(path, config.batch_size, task.candidate_order.batch_size)
        self._records = _whole(records, config.steps, path)

    def choose(self, step: int) -> Choice:
        record = self._records[step]
        drawn = self._task.candidate_order.indices(step)
        kept = drawn[record.kept]
        metrics = {
            "selected": int(not record.fallback),
            "position": record.position,
            "trust": record.trust,
        }
        return Choice(kept, drawn, record.probes, record.fallback, quarters=record.quarters, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ReplayedWeights:
    """The weights that each step's samples had before; a weigher."""

    reads_losses = False

    def __init__(self, path: Path, config: RunConfig, *, inner: bool) -> None:
        """
        Args:
            inner: they belong to samples that were selected; their metrics are called `inner_...` then.
        """
        records = read_records(path, config.batch_size, config.batch_size)
        self._records = _whole(records, config.steps, path)
        self._prefix = "inner_" if inner else ""

    def weigh(self, step: int, losses: torch.Tensor, tokens: torch.Tensor) -> Weights:
        record = self._records[step]
        metrics = {self._prefix + "position": record.position, self._prefix + "trust": record.trust}
        return Weights(record.weights, record.fallback, metrics)

    def recorded(self, steps: int) -> np.ndarray:
        return np.stack([record.weights for record in self._records[:steps]])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _record_files(variant: Variant, config: RunConfig, task: Task) -> dict[str, int]:
    """The records of a run, and how many samples each step's batch is chosen from."""
    files = {}
    if variant.records_choice:
        files["selection.record"] = task.candidate_order.batch_size
    if variant.records_weights:
        files["weights.record"] = config.batch_size
    return files


def _whole(records: list[Record], steps: int, path: Path) -> list[Record]:
    """The records of the first `steps` steps, in order."""
    found = [record.step for record in records[:steps]]
    if found != list(range(steps)):
        missing = next(step for step in range(steps) if step >= len(found) or found[step] != step)
        raise InvalidArgument(
            f"{path} ends too early: it has no record of step {missing + 1}, but --steps is {steps}; replay at most "
            f"{missing} steps"
        )
    return records[:steps]
