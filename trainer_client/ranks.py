"""The processes of one data parallel run: the first one asks, all get its answer, and a mistake is told once.

Knows torch.distributed and plain values; nothing of weighters or models. What is sent is JSON with raw arrays beside
it, always through CPU memory: small things next to gradients. With one process everything is trivial.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from weighting_contract import errors
from weighting_contract.errors import InvalidArgument, WeighbridgeError

T = TypeVar("T")


class Elsewhere(WeighbridgeError):
    """This rank stops because of a mistake that another one tells: say nothing more about it."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Ranks:
    """The ranks of a process group. Its methods are collective: all ranks call the same ones in the same order.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        group: for tensors on the training device, such as the `group` of `cotangent`; None: one process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None, messages: dist.ProcessGroup | None) -> None:
        """Made by `current` or `alone`; `messages` is a group of the same ranks that sends CPU tensors."""
        self.group, self._messages = group, messages
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def alone(cls) -> Self:
        """One process."""
        return cls(None, None)

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> Self:
        """Of torch.distributed's default group, or of the one given; `alone` where there is none.

        Collective where the group can't send CPU tensors (nccl): a second one over gloo is made beside it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        given = group if group is not None else dist.group.WORLD
        assert given is not None
        if "gloo" in dist.get_backend_config(given):
            return cls(given, given)
        members = dist.get_process_group_ranks(given)
        return cls(given, dist.new_group(members, backend="gloo", use_local_synchronization=True))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, on all of them.

        Args:
            work: done by the first rank alone. Returns None, numbers, strings, bytes, numpy arrays, CPU tensors, or
                lists, tuples and dicts of these.

        Raises:
            BaseException: on the first rank what `work` raised; on the others `Elsewhere`.
        """
        if self.world == 1:
            return work()
        if not self.is_first:
            answer = _unpacked(self._broadcast(b""))
            if isinstance(answer, _Failure):
                raise Elsewhere(answer.message, answer.code)
            result: T = answer
            return result
        try:
            result = work()
            packed = _packed(result)
        except BaseException as exc:
            self._broadcast(_packed(_Failure.of(exc)))
            raise
        self._broadcast(packed)
        return result

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, done by every rank; a mistake of one is one of all, as of `agree`."""
        error: WeighbridgeError | None = None
        try:
            result = work()
        except WeighbridgeError as exc:
            error = exc
        except OSError as exc:
            error = InvalidArgument(str(exc))
            error.__cause__ = exc
        self.agree(error)
        return result

    def agree(self, error: WeighbridgeError | None) -> None:
        """Goes on only where no rank has an error.

        Raises:
            WeighbridgeError: on the first rank, the error of the lowest one that has any, with that rank named if it is
                another; on all others `Elsewhere`.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return
        for rank, found in enumerate(self.everyone(None if error is None else [error.code, error.message])):
            if found is not None:
                code, message = found
                told = message if rank == 0 else f"rank {rank}: {message}"
                raise self.told(error if error is not None and rank == 0 else _error(code, told))

    def told(self, error: WeighbridgeError) -> WeighbridgeError:
        """An error that all ranks have, to be raised: itself on the first one, `Elsewhere` on the others."""
        return error if self.is_first else Elsewhere(error.message, error.code)

    def all_equal(self, name: str, value: Any) -> None:
        """Raises InvalidArgument as `agree` does where ranks have different values, a number or another JSON value."""
        found = self.everyone(value)
        if other := [rank for rank, theirs in enumerate(found) if theirs != found[0]]:
            raise self.told(
                InvalidArgument(
                    f"the ranks disagree on {name}: it is {found[0]} on rank 0 and {found[other[0]]} on rank "
                    f"{other[0]}, expected the same on all"
                )
            )

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.world == 1:
            return flag
        sent = torch.tensor(int(flag))
        dist.all_reduce(sent, dist.ReduceOp.MAX, group=self._messages)
        return bool(sent)

    def wait_for_all(self, timeout: timedelta) -> None:
        """Returns once all ranks are here. Raises RuntimeError where one does not come in time."""
        if self.world > 1:
            dist.monitored_barrier(self._messages, timeout)

    def everyone(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; of the kinds that `from_first` sends."""
        if self.world == 1:
            return [value]
        packed = _packed(value)
        mine = torch.tensor([len(packed)])
        sizes = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(sizes, mine, group=self._messages)
        longest = max(int(size) for size in sizes)
        padded = _to_bytes(packed.ljust(longest, b"\0"))
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded, group=self._messages)
        return [_unpacked(part.numpy().tobytes()[: int(size)]) for part, size in zip(found, sizes, strict=True)]

    def my_rows(self, count: int) -> slice:
        """The contiguous share of `count` rows that this rank has; shares differ by one row at most."""
        return share(count, self.world, self.rank)

    def all_rows(self, rows: Tensor) -> Tensor:
        """[b, ...] of every rank, which may differ in b, as [B, ...] on all of them; detached, on the same device.

        Raises:
            InvalidArgument: as of `agree`, for rows of different dtypes or shapes.
        """
        found = self._gathered(rows, everywhere=True)
        assert found is not None
        return found

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """As `all_rows`, on the first rank; None on the others."""
        return self._gathered(rows, everywhere=False)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _gathered(self, rows: Tensor, *, everywhere: bool) -> Tensor | None:
        rows = rows.detach()
        if self.world == 1:
            return rows
        kinds = self.everyone([str(rows.dtype), list(rows.shape[1:]), len(rows)])
        if other := [rank for rank, kind in enumerate(kinds) if kind[:2] != kinds[0][:2]]:
            first, differing = kinds[0], kinds[other[0]]
            raise self.told(
                InvalidArgument(
                    f"the ranks disagree on what a row is: {first[0]} of {first[1]} on rank 0 and {differing[0]} of "
                    f"{differing[1]} on rank {other[0]}"
                )
            )
        counts = [kind[2] for kind in kinds]
        # As bytes: gloo does not send every dtype.
        width = rows.element_size() * (rows[0].numel() if len(rows) else int(np.prod(rows.shape[1:], dtype=np.int64)))
        padded = torch.zeros(max(counts) * width, dtype=torch.uint8)
        flat = rows.cpu().contiguous().view(-1)
        if flat.numel():
            padded[: len(rows) * width] = flat.view(torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.world)] if everywhere or self.is_first else None
        if everywhere:
            assert found is not None
            dist.all_gather(found, padded, group=self._messages)
        else:
            dist.gather(padded, found, dst=self._first(), group=self._messages)
        if found is None:
            return None
        parts = [part[: count * width] for part, count in zip(found, counts, strict=True)]
        whole = torch.cat(parts).view(rows.dtype).view(sum(counts), *rows.shape[1:])
        return whole.to(rows.device)

    def _broadcast(self, payload: bytes) -> bytes:
        size = torch.tensor([len(payload)])
        dist.broadcast(size, self._first(), group=self._messages)
        sent = _to_bytes(payload) if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(sent, self._first(), group=self._messages)
        return sent.numpy().tobytes()

    def _first(self) -> int:
        """The first rank as the default group counts."""
        assert self._messages is not None
        return dist.get_global_rank(self._messages, 0)


def share(count: int, parts: int, part: int) -> slice:
    """The contiguous `part`-th of `parts` shares of so many rows."""
    return slice(part * count // parts, (part + 1) * count // parts)


# ---- Values as bytes: the length of the JSON, the JSON, the arrays that it refers to --------------------------------


class _Failure:
    """In place of an answer: why there is none."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message

    @classmethod
    def of(cls, exc: BaseException) -> Self:
        if isinstance(exc, WeighbridgeError):
            return cls(exc.code, exc.message)
        return cls(WeighbridgeError.code, f"{type(exc).__name__}: {exc}")


def _error(code: str, message: str) -> WeighbridgeError:
    """An error of the kind that another rank raised."""
    kinds = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    kind: type[WeighbridgeError] = kinds.get(code, WeighbridgeError)
    return kind(message)


def _to_bytes(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]


def _packed(value: Any) -> bytes:
    blobs: list[bytes] = []
    text = json.dumps(_plain(value, blobs)).encode()
    return b"".join([struct.pack("<q", len(text)), text, *blobs])


def _unpacked(payload: bytes) -> Any:
    (length,) = struct.unpack_from("<q", payload)
    return _value(json.loads(payload[8 : 8 + length]), memoryview(payload)[8 + length :])


def _plain(value: Any, blobs: list[bytes]) -> Any:
    """JSON for a value; what JSON can't hold goes to the blobs, everything that is an object says of what kind."""

    def blob(content: bytes) -> list[int]:
        start = sum(map(len, blobs))
        blobs.append(content)
        return [start, start + len(content)]

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_plain(item, blobs) for item in value]
    if isinstance(value, tuple):
        return {"kind": "tuple", "items": [_plain(item, blobs) for item in value]}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[_plain(k, blobs), _plain(v, blobs)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"kind": "bytes", "at": blob(value)}
    if isinstance(value, _Failure):
        return {"kind": "failure", "code": value.code, "message": value.message}
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return {"kind": kind, "dtype": array.dtype.str, "shape": array.shape, "at": blob(array.tobytes())}
    raise TypeError(f"a {type(value).__name__} can't be sent to other ranks")


def _value(plain: Any, blobs: memoryview) -> Any:
    if isinstance(plain, list):
        return [_value(item, blobs) for item in plain]
    if not isinstance(plain, dict):
        return plain
    kind = plain["kind"]
    if kind == "failure":
        return _Failure(plain["code"], plain["message"])
    if kind == "tuple":
        return tuple(_value(plain["items"], blobs))
    if kind == "dict":
        pairs: Sequence[Any] = plain["items"]
        return {_value(k, blobs): _value(v, blobs) for k, v in pairs}
    start, end = plain["at"]
    content = bytes(blobs[start:end])
    if kind == "bytes":
        return content
    array = np.frombuffer(content, np.dtype(plain["dtype"])).reshape(plain["shape"]).copy()
    return torch.from_numpy(array) if kind == "tensor" else array
