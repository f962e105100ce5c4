"""The ranks that share out a batch: sums, means and norms over all of them, and errors that all of them raise.

Knows tensors and process groups, nothing of models. With no group there is one rank, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer_client.hypergradient.errors import DegenerateCotangent
from trainer_client.hypergradient.shards import is_sharded, replicas
from weighting_contract.errors import FailedPrecondition, InvalidArgument, WeighbridgeError

T = TypeVar("T")

_KINDS: tuple[type[WeighbridgeError], ...] = (FailedPrecondition, InvalidArgument, DegenerateCotangent)


class Shares:
    """Collective unless it says otherwise: all ranks call the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """
        Args:
            device: one that the group's backend can send from.
        """
        self._group, self._device = group, device
        self.world = 1 if group is None else dist.get_world_size(group)

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once it is done on all.

        Raises:
            Exception: what this rank's work raised, or an error of ours that names the first rank whose work failed. An
                interrupt is passed on at once: the others learn of it when this process ends.
        """
        if self._group is None:
            return work()
        try:
            result = work()
        except Exception as exc:
            self._raise_if_any_failed(exc)
            raise
        self._raise_if_any_failed(None)
        return result

    def total(self, count: int) -> int:
        """The sum over all ranks."""
        if self._group is None:
            return count
        sent = torch.tensor(count, dtype=torch.int64, device=self._device)
        dist.all_reduce(sent, group=self._group)
        return int(sent)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Puts the mean over all ranks into contiguous tensors."""
        if self._group is None:
            return
        tensors = list(tensors)
        for under_way in [dist.all_reduce(t, group=self._group, async_op=True) for t in tensors]:
            under_way.wait()
        for t in tensors:
            t.div_(self.world)

    def extremes(self, values: Tensor) -> tuple[float, float, bool]:
        """(smallest, largest, whether all are finite) of all ranks' values."""
        found = torch.stack([-values.min(), values.max(), (~values.isfinite()).any().to(values)]).double()
        if self._group is not None:
            found = torch.where(found.isfinite(), found, 0.0).to(self._device)  # the flag says enough
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        lowest, largest, broken = found.tolist()
        return -lowest, largest, not broken

    def norm(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
        """Euclidean norm of all values together, `values` being this rank's part of something like the parameters.

        Squares are summed in float32, or float64 for float64.
        """
        whole = [_norm(values[name]) for name, p in parameters.items() if not is_sharded(p)]
        result = torch.linalg.vector_norm(torch.stack([n.to(whole[0]) for n in whole])) if whole else None
        parts = [
            _norm(values[name]).double().square() / replicas(p, self.world)
            for name, p in parameters.items()
            if is_sharded(p)
        ]
        if parts:
            squares = torch.stack(parts).sum()
            dist.all_reduce(squares, group=self._group)
            result = (squares if result is None else squares + result.to(squares).square()).sqrt()
        assert result is not None, "a step has parameters"
        return float(result)

    def _raise_if_any_failed(self, error: Exception | None) -> None:
        """Nothing if none has; else an error on every rank that has none of its own."""
        assert self._group is not None
        rank = dist.get_rank(self._group)
        first = torch.tensor(self.world if error is None else rank, dtype=torch.int64, device=self._device)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self._group)
        if int(first) == self.world:
            return
        kind = _KINDS.index(type(error)) if type(error) in _KINDS else 0
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        kind, text = self._told_by(int(first), kind, text)
        if error is None:
            raise _KINDS[kind](f"rank {int(first)} could not compute its part of the cotangent: {text}")

    def _told_by(self, rank: int, kind: int, text: str) -> tuple[int, str]:
        """Kind and text that one rank has, on every rank."""
        assert self._group is not None
        source = dist.get_global_rank(self._group, rank)
        payload = torch.tensor([kind, *text.encode()], dtype=torch.uint8, device=self._device)
        size = torch.tensor(len(payload), dtype=torch.int64, device=self._device)
        dist.broadcast(size, source, group=self._group)
        if dist.get_rank(self._group) != rank:
            payload = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        dist.broadcast(payload, source, group=self._group)
        kind, *letters = payload.tolist()
        return kind, bytes(letters).decode()


def _norm(values: Tensor) -> Tensor:
    wide = None if values.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(values.detach(), dtype=wide)  # type: ignore[no-any-return]
