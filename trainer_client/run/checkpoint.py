"""Checkpoints of a training loop: one safetensors file a checkpoint, written whole or not at all.

Model and optimiser tensors are the file's tensors, everything else (step, counters, the job's state) is JSON in its
metadata. Never pickle. Knows nothing of how the loop works.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)

_KEPT = 2  # the newest, and the one before it in case the newest can't be read
_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


def save(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes the checkpoint taken after `step` optimiser steps and removes all but the newest two.

    Args:
        folder: where the run's checkpoints lie; created where missing.
        state: JSON values to give back on loading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items()})
    path = folder / f"checkpoint-{step:08d}.safetensors"
    temporary = path.with_suffix(".partial")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"state": json.dumps({"step": step, **state})},
    )
    _sync(temporary)
    os.replace(temporary, path)
    _sync(folder)
    for old in _paths(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_newest(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Loads the newest readable checkpoint into model and optimiser; its state with `step`, None where there is none.

    Raises:
        InvalidArgument: there are checkpoints, but none can be read, or they are another model's.
    """
    paths = _paths(folder)
    for path in reversed(paths):
        try:
            with safe_open(path, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
                state: dict[str, Any] = json.loads(f.metadata()["state"])
        except (SafetensorError, ValueError, KeyError, TypeError) as exc:
            logger.warning("%s can't be read (%s); trying the checkpoint before it", path, exc)
            continue
        _restore_model(model, tensors, path)
        _restore_optimizer(optimizer, tensors)
        return state
    if paths:
        raise InvalidArgument(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones once (safetensors refuses shared memory)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _restore_model(model: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    targets = _model_tensors(model)
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if {n: t.shape for n, t in targets.items()} != {n: t.shape for n, t in saved.items()}:
        raise InvalidArgument(f"{path} is a checkpoint of another model: names or shapes of its tensors differ")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _paths(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
