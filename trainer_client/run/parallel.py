"""How a model is trained by several ranks, and what its forward passes compute in: DDP, FSDP2, autocast, and so on.

Knows models and ranks; nothing of weights or of the service.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer_client.flags import flag
from trainer_client.late_weights import is_plain
from trainer_client.ranks import Ranks
from trainer_client.run.config import RunConfig
from trainer_client.run.forward import token_losses
from trainer_client.run.methods.names import JUDGED
from weighting_contract.errors import FailedPrecondition, InvalidArgument

# Ranks wait for the first one while it prepares, evaluates or exports. Who waits for a dead one does not wait for this.
_PATIENCE = timedelta(hours=6)
_FAREWELL = timedelta(seconds=10)
_OF_A_RANK = ("out", "device", "threads")  # settings that may differ


def join() -> Ranks:
    """All ranks that torchrun has started, or this process alone. Collective."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks.alone()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    return Ranks.current()


def leave(ranks: Ranks) -> bool:
    """Waits for all ranks, so that torchrun ends none that still has something to say.

    Returns:
        False where another one is gone, or stuck: the interpreter, when it takes down what is left of the group, may
        wait for that one, or abort this process.
    """
    if ranks.group is None:
        return True
    try:
        ranks.wait_for_all(_FAREWELL)
    except RuntimeError:
        return False
    dist.destroy_process_group()
    return True


def check_same_settings(config: RunConfig, ranks: Ranks) -> None:
    """Raises InvalidArgument, as `Ranks.agree` does, where ranks were started with different flags."""
    mine = {name: value for name, value in config.to_dict().items() if name not in _OF_A_RANK}
    settings = ranks.everyone(mine)
    for rank, theirs in enumerate(settings):
        for name, value in settings[0].items():
            if theirs[name] != value:
                raise ranks.told(
                    InvalidArgument(
                        f"{flag(name)} is {value} on rank 0 and {theirs[name]} on rank {rank}: start all ranks with "
                        "the same flags"
                    )
                )


def check_parallel(config: RunConfig, ranks: Ranks) -> None:
    """Raises WeighbridgeError where the settings don't fit the ranks."""
    if config.parallel != "auto" and ranks.group is None:
        raise FailedPrecondition(
            f"--parallel is {config.parallel}, but this is one process: start it with "
            "torchrun --nproc-per-node N -m trainer_client.run"
        )
    least = ranks.world * config.accumulate
    if config.batch_size < least:
        raise InvalidArgument(
            f"--batch-size is {config.batch_size}, expected {least} or more: it is the batch of all {ranks.world} "
            f"ranks in all {config.accumulate} micro-batches (--accumulate)"
        )
    learned = any(variant.learned for variant in config.variants)
    if learned and config.meta_batch < ranks.world:
        raise InvalidArgument(
            f"--meta-batch is {config.meta_batch}, expected {ranks.world} or more: each rank takes its part of it"
        )
    _check_hypergradient(config, ranks)
    if way(config, ranks) == "fsdp2":
        for variant in config.variants:
            if variant.judged and variant.mode in JUDGED[variant.method].reads_trainer:
                raise InvalidArgument(
                    f"--parallel fsdp2 does not go with the run {variant.label!r}: its method reads the model on one "
                    "rank, which has only a part of it; take --parallel ddp"
                )


def _check_hypergradient(config: RunConfig, ranks: Ranks) -> None:
    if config.hypergradient == "finite_difference" or not any(variant.learned for variant in config.variants):
        return
    obstacles = {
        "--parallel fsdp2": way(config, ranks) == "fsdp2",
        "--compile": config.compile,
        "--recompute": config.recompute,
        "several ranks": ranks.group is not None and config.hypergradient == "exact",
    }
    if found := [name for name, there in obstacles.items() if there]:
        raise InvalidArgument(
            f"--hypergradient is {config.hypergradient}, which does not go with {found[0]}: leave it at "
            "finite_difference"
        )


def way(config: RunConfig, ranks: Ranks) -> str:
    """none, ddp or fsdp2."""
    if config.parallel == "auto":
        return "ddp" if ranks.world > 1 else "none"
    return config.parallel


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """What forward passes compute in. Around them alone: a backward pass follows by itself."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


class Replica:
    """A model as this rank trains it. The model itself is changed in place, where it has to be; its names stay."""

    def __init__(self, config: RunConfig, model: nn.Module, ranks: Ranks) -> None:
        """
        Args:
            model: the same on all ranks, on its device; `fully_shard`ed afterwards with FSDP2.
        """
        self._config, self._model = config, model
        self._device = next(model.parameters()).device
        blocks = _blocks(model)
        for block in blocks:
            if config.recompute:
                block.forward = _recomputed(block.forward)
            if config.compile:
                block.forward = torch.compile(block.forward)
        chosen = way(config, ranks)
        if chosen == "fsdp2":
            _shard(model, blocks, ranks, self._device)
        self._ddp = _replicated(model, ranks, self._device) if chosen == "ddp" else None

    def losses(self, tokens: Tensor) -> Tensor:
        """[b, T] token losses of this rank's rows [b, T+1]; where gradients are on, a backward pass follows."""
        model = self._ddp if self._ddp is not None and torch.is_grad_enabled() else self._model
        with autocast(self._config, self._device):
            return token_losses(model, tokens)

    @property
    def head(self) -> nn.Linear | None:
        """The model's output layer, if it is one for `late_weights`."""
        find = getattr(self._model, "get_output_embeddings", None)
        head = find() if find else None
        return head if is_plain(head) else None

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of each micro-batch: gradients are averaged over the ranks with the last."""
        return self._ddp.no_sync() if self._ddp is not None and not last else nullcontext()


def _blocks(model: nn.Module) -> list[Any]:
    """The layers of a transformer: the members of its longest list of modules, else the model as a whole."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[]) or [model]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)  # dropout is off


def _shard(model: nn.Module, blocks: list[Any], ranks: Ranks, device: torch.device) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    assert ranks.group is not None  # by `check_parallel`
    mesh = DeviceMesh.from_group(ranks.group, device.type)
    for module in dict.fromkeys((*blocks, model)):
        # Sharded again after every pass: whatever looks at the parameters between two passes sees what is trained.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _replicated(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.parallel.DistributedDataParallel:
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=ranks.group,
    )
