"""What FSDP2 (`torch.distributed.fsdp.fully_shard`) makes of a model, as far as a cotangent must know it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to; none where there are no ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Frees whole parameters that a pass has left, so that the next one gathers what the shards then hold."""
    for module in sharded_modules(model):
        module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part as a plain tensor on the same memory; autograd and version counters do not see it written."""
    return getattr(tensor, "to_local", lambda: tensor)().data


def replicas(tensor: Tensor, world: int) -> int:
    """How many of `world` ranks hold the same part of a sharded parameter."""
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):  # type: ignore[attr-defined]
        parts *= 1 if placement.is_replicate() else size
    return world // parts
