"""Checkpoints of a training loop: one safetensors file a checkpoint, written whole or not at all.

Model and optimiser tensors are the file's tensors, everything else (step, counters, the job's state) is JSON in its
metadata. Never pickle. Knows nothing of how the loop works.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer_client.ranks import Ranks
from weighting_contract.errors import InvalidArgument
from weighting_contract.folder import sync

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
    return write(folder, step, whole_tensors(model, optimizer), state)


def whole_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of model and optimiser, on the CPU. Collective where the model is sharded."""
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items()})
    return {name: _whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Writes what `whole_tensors` gave, as `save` does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:08d}.safetensors"
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"state": json.dumps({"step": step, **state})})
    sync(temporary)
    os.replace(temporary, path)
    sync(folder)
    for old in _paths(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_newest(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    job_id: str = "",
    ranks: Ranks | None = None,
) -> dict[str, Any] | None:
    """Loads the newest readable checkpoint into model and optimiser; its state with `step`, None where there is none.

    Args:
        job_id: what `job_id` in its state must be; "": whatever.
        ranks: the first of them reads, all load; collective. None: one process.

    Raises:
        InvalidArgument: there are checkpoints, but none can be read, or they are another job's or another model's.
    """
    ranks = ranks or Ranks.alone()
    tensors: dict[str, torch.Tensor] = {}  # on the first rank

    def read() -> dict[str, Any] | None:
        found = _newest(folder)
        if found is None:
            return None
        path, read, state = found
        if job_id and state.get("job_id") != job_id:
            raise InvalidArgument(
                f"{path} is a checkpoint of another job ({state.get('job_id')!r}, expected {job_id!r}): put the run's "
                "own back, or start a new run in another --out"
            )
        _check_of_model(read, model, path)
        tensors.update(read)
        return {"state": state, "names": list(read)}

    found = ranks.from_first(read)
    if found is None:
        return None

    def shared(name: str) -> torch.Tensor:  # one after the other: no rank needs room for all
        return ranks.from_first(lambda: tensors[name])

    _restore_model(model, shared)
    _restore_optimizer(optimizer, found["names"], shared)
    state: dict[str, Any] = found["state"]
    return state


def load_model(folder: Path, model: torch.nn.Module) -> int:
    """Loads the model of the newest readable checkpoint; the optimiser steps that it had.

    Raises:
        InvalidArgument: there is no checkpoint, none can be read, or it is another model's.
    """
    found = _newest(folder)
    if found is None:
        raise InvalidArgument(f"there is no checkpoint in {folder}")
    path, tensors, state = found
    _check_of_model(tensors, model, path)
    _restore_model(model, tensors.__getitem__)
    return int(state["step"])


def _newest(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Path, tensors and state of the newest readable checkpoint, None where there is none."""
    paths = _paths(folder)
    for path in reversed(paths):
        try:
            with safe_open(path, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
                state: dict[str, Any] = json.loads(f.metadata()["state"])
        except (SafetensorError, ValueError, KeyError, TypeError) as exc:
            logger.warning("%s can't be read (%s); trying the checkpoint before it", path, exc)
            continue
        return path, tensors, state
    if paths:
        raise InvalidArgument(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones once (safetensors refuses shared memory)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_of_model(tensors: dict[str, torch.Tensor], model: torch.nn.Module, path: Path) -> None:
    saved = {name.removeprefix("model."): t.shape for name, t in tensors.items() if name.startswith("model.")}
    if {name: t.shape for name, t in _model_tensors(model).items()} != saved:
        raise InvalidArgument(f"{path} is a checkpoint of another model: names or shapes of its tensors differ")


def _restore_model(model: torch.nn.Module, saved: Callable[[str], torch.Tensor]) -> None:
    with torch.no_grad():
        for name, target in _model_tensors(model).items():
            target.copy_(_as_parts(saved(f"model.{name}"), target))


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], saved: Callable[[str], torch.Tensor]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name in names:
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = _as_parts(saved(name), parameters[int(index)])
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which FSDP2 gives each rank a part."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _as_parts(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """Shared out as another tensor is; numbers, such as the optimiser's step, stay whole."""
    if not hasattr(like, "full_tensor") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.to(like.device_mesh.device_type)
    parts: torch.Tensor = distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
    return parts


def _paths(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name))
