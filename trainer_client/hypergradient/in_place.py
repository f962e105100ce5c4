"""Changes to a model that are taken back: parameters moved in their own memory, eval mode, scratch buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Values that a piece of a parameter has at most: what a move needs of memory besides the direction's own. Of 4 Mi and
# more, a piece takes long enough that starting the next one costs nothing.
PIECE = 1 << 22


class Perturbation:
    """Parameters at theta + distance v, in their own memory; v's memory holds theta meanwhile.

    So parameters keep their identity and their place: torch.compile does not compile again, FSDP2's shards stay where
    it gathers them from. And theta comes back by copy, since adding and subtracting would not give the same bits.

    `restore` belongs into a `finally` of which the `try` begins right behind the constructor.
    """

    def __init__(self, parameters: Mapping[str, Tensor], direction: dict[str, Tensor]) -> None:
        """
        Args:
            parameters: this rank's parts of them, plain tensors that share memory with the model.
            direction: v, the same shapes. Taken over: it is no direction any more once the parameters have moved.
        """
        own_memory(direction, parameters)
        self._pieces: list[tuple[Tensor, Tensor]] = []  # (of a parameter, of v), a few values each
        for name, parameter in parameters.items():
            self._pieces += _pieces(parameter, direction[name])
        self._saved = 0  # so many pieces have their theta in v's memory

    def move(self, distance: float) -> None:
        """To theta + distance v; once only."""
        for values, direction in self._pieces:
            moved = torch.add(values, direction, alpha=distance)
            direction.copy_(values)
            self._saved += 1  # from here on, not sooner or later: an interrupt may come between any two lines
            values.copy_(moved)

    def mirror(self) -> None:
        """From theta + d to theta - d, as far as d went in the parameters' precision."""
        for values, saved in self._pieces:
            values.copy_(torch.mul(saved, 2).sub_(values))

    def restore(self) -> None:
        """To theta; does nothing where nothing has moved."""
        try:
            self._copy_back()
        except BaseException:  # a second interrupt
            self._copy_back()
            raise

    def _copy_back(self) -> None:
        for values, saved in reversed(self._pieces[: self._saved]):
            values.copy_(saved)


def own_memory(tensors: dict[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Sees to it that each tensor may be written on: contiguous, of the other's dtype, in memory that no other uses.

    Gradients may be one tensor for two parameters, or one value that is expanded to a shape.
    """
    foreign = {t.untyped_storage().data_ptr() for t in like.values()}
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().to(like[name]).contiguous()
    end = 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        tensor = tensors[name]
        if tensor.data_ptr() < end or tensor.untyped_storage().data_ptr() in foreign:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of two tensors of one shape, in pieces of at most PIECE values each where memory is contiguous."""
    if not a.numel():
        return
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
    if not a.ndim:
        yield a, b
        return
    rows = max(1, PIECE * len(a) // a.numel())
    yield from zip(torch.split(a, rows), torch.split(b, rows), strict=True)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode and buffers to write on; afterwards each submodule has its own mode and the buffers that it had.

    The flag is set directly: `eval()` of some modules does more than that, such as merging adapters into parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}  # modules may share one
        for module, name, buffer in buffers:
            module._buffers[name] = copies[id(buffer)]
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, mode in modes:
            module.training = mode


@contextmanager
def gradients_aside(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Lets a backward pass write into empty `.grad`s; afterwards they are the very ones that were there."""
    held = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        yield
    finally:
        for name, p in parameters.items():
            p.grad = held[name]
