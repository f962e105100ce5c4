"""What learns of a model as one vector, and AdamW on it: a few tensor operations a step, however many the parameters.

Knows tensors and names; nothing of losses, jobs or positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from weighting_contract.spec import LearningSpec

ALIGNMENT = 16  # elements: every part begins on a cache line, so that no kernel has to start in the middle of one
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
LEAST_RATE = 0.1  # of the spec's learning rate


class Layout:
    """Where named tensors lie in one vector: matrices first, then vectors and scalars; zeros fill the gaps.

    Args:
        tensors: of one dtype on one device, by name; their shapes count, not their values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        matrices = [name for name, t in tensors.items() if t.ndim >= 2]
        others = [name for name, t in tensors.items() if t.ndim < 2]  # biases, and the scales of norms
        self._shapes = {name: tensors[name].shape for name in (*matrices, *others)}
        sizes = {name: _aligned(shape.numel()) for name, shape in self._shapes.items()}
        self._sizes = list(sizes.values())
        self.size = sum(self._sizes)
        self.matrices = sum(sizes[name] for name in matrices)  # elements at the start that matrices take

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors inside `vector` [size], by name; they share its memory."""
        parts = torch.split(vector, self._sizes)
        return {
            name: part[: shape.numel()].view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def joined(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """[size] of the dtype and device of `like`: a copy of `tensors`; those that are left out are zeros."""
        parts = []
        for (name, shape), size in zip(self._shapes.items(), self._sizes, strict=True):
            given = tensors.get(name)
            if given is not None:
                parts.append(given.detach().to(like).reshape(-1))
            if gap := size - (0 if given is None else shape.numel()):
                parts.append(like.new_zeros(gap))
        return torch.cat(parts)


class AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on one vector, whose first `decayed` elements decay.

    m' = b1 m + (1 - b1) g          v' = b2 v + (1 - b2) g^2
    phi' = (1 - lr wd) phi - lr (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps),    lr = `learning_rate_at(spec, t)`
    """

    def __init__(self, parameters: Tensor, learning: LearningSpec, decayed: int) -> None:
        self._parameters = parameters
        self._learning = learning
        self._decayed = decayed
        self.restart()

    def restart(self, steps: int = 0, mean: Tensor | None = None, square: Tensor | None = None) -> None:
        """Goes on from these moments [size], after that many steps; with none from the start."""
        self.steps = steps
        self.mean = torch.zeros_like(self._parameters) if mean is None else mean
        self.square = torch.zeros_like(self._parameters) if square is None else square

    @torch.no_grad()
    def step(self, gradient: Tensor) -> bool:
        """Moves the parameters [size] in place; False, and nothing changed, where one would not be finite then."""
        learning, steps = self._learning, self.steps + 1
        rate = learning_rate_at(learning, steps)
        mean = torch.lerp(self.mean, gradient, 1 - BETA_1)
        square = (self.square * BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        spread = square.sqrt().div_(math.sqrt(1 - BETA_2**steps)).add_(EPSILON)
        moved = self._parameters.clone()
        moved[: self._decayed].mul_(1 - rate * learning.weight_decay)
        moved.addcdiv_(mean, spread, value=-rate / (1 - BETA_1**steps))
        if not bool(torch.isfinite(moved).all()):
            return False
        self._parameters.copy_(moved)
        self.steps, self.mean, self.square = steps, mean, square
        return True


def learning_rate_at(learning: LearningSpec, step: int) -> float:
    """Of the step-th step, from 1: the spec's, from `settle_after` on in proportion to 1 / step, down to a tenth."""
    if not learning.settle_after:
        return learning.learning_rate
    return learning.learning_rate * max(LEAST_RATE, min(1.0, learning.settle_after / step))


def clipped(gradient: Tensor, largest_norm: float) -> float:
    """Scales a gradient [size] in place to a norm of at most `largest_norm`; returns what its norm was."""
    norm = float(torch.linalg.vector_norm(gradient))
    if norm > largest_norm:  # not finite: left as it is, for the caller to refuse
        gradient.mul_(largest_norm / norm)
    return norm


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
