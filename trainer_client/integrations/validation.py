"""Which validation samples a step is taught towards. Knows datasets by index, and ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trainer_client.ranks import Ranks
from weighting_contract.errors import InvalidArgument


class ValidationDraws:
    """Batches of a few validation samples, decided by seed and step alone: a resumed run draws the same ones.

    Args:
        dataset: anything with a length and an index.
        collate: makes a batch of a list of samples.
        size: samples over all ranks, each of which gets an equal share; rounded up to that.
        seed: of the draws, together with the step.

    Raises:
        InvalidArgument: a dataset without a length, or an empty one.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], size: int, ranks: Ranks, seed: int = 0
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
            raise InvalidArgument(
                f"the validation samples that the weighter is taught towards are a {type(dataset).__name__}, expected "
                "a dataset with a length of 1 or more and an index, such as a list of the samples"
            )
        self._dataset, self._collate, self._ranks, self._seed = dataset, collate, ranks, seed
        self._size = -(-size // ranks.world) * ranks.world

    def batch(self, step: int) -> Any:
        """This rank's samples for a step."""
        rng = random.Random(f"{self._seed} {step}")
        places = range(len(self._dataset))
        chosen = rng.sample(places, self._size) if self._size <= len(places) else rng.choices(places, k=self._size)
        return self._collate([self._dataset[place] for place in chosen[self._ranks.my_rows(self._size)]])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without dropout; afterwards each submodule has the mode that it had.

    The flag is set directly: `eval()` of some modules does more than that, such as merging adapters into parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
