"""When a weighter is taught: in each of a run's first steps, then in every few. Knows neither jobs nor loops."""

from __future__ import annotations

from dataclasses import dataclass

from weighting_contract.errors import InvalidArgument


@dataclass(frozen=True)
class Cadence:
    """The steps of a run that have a meta-update.

    Many at first: trust and a fresh weighter are decided early, where most is to be gained, and a run's first steps are
    few. Only these steps need probes, which are drawn evenly and so cost what selecting gains once a model is warm.

    Args:
        every: steps between two meta-updates.
        first: steps at the beginning that have one each; fewer where a weighter was taught before (TAUGHT_FIRST).

    Raises:
        InvalidArgument: `every` below 1 or `first` below 0.
    """

    every: int = 10
    first: int = 100

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 0:
            raise InvalidArgument(
                f"a cadence has every {self.every} and first {self.first}, expected 1 or more and 0 or more"
            )

    def due(self, step: int) -> bool:
        """Whether optimiser step `step`, from 0, has a meta-update."""
        return step < self.first or step % self.every == 0


CADENCE_INSIDE = Cadence(first=0)  # for weights inside a batch, which are in no hurry
TAUGHT_FIRST = 48  # `first` where a weighter was taught before: trust needs no more, and more would move it
