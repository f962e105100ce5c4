"""The device that a command trains on, and torch set to compute the same thing twice. Knows settings only."""

from __future__ import annotations

import os

import torch

from trainer_client.run.config import RunConfig
from weighting_contract.errors import InvalidArgument
from weighting_contract.memory import keep_freed_memory


def set_up_torch(config: RunConfig) -> torch.device:
    """The device of `config`, torch set to compute the same thing twice. Raises InvalidArgument for a wrong one."""
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise InvalidArgument(f"--device is {config.device!r}, expected cpu, cuda, cuda:N or auto") from exc
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"--device is {config.device!r}, expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        device = _of_this_rank(config, device)
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise InvalidArgument(f"--device is {config.device!r}, but torch sees {found} CUDA devices")
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products differ from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written, and filling memory takes a kernel for each tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def _of_this_rank(config: RunConfig, device: torch.device) -> torch.device:
    """Each rank of torchrun on a machine has a device of its own."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return torch.device("cuda", device.index or 0)
    if device.index is not None:
        raise InvalidArgument(
            f"--device is {config.device!r}, but each rank needs a device of its own: say cuda or auto"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
