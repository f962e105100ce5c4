"""When a weighter is taught: often in a run's first steps, then in every few. Knows neither jobs nor loops."""

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
        first: steps at the beginning in which they are `first_every` apart.
        first_every: 1: each of the first steps has one.

    Raises:
        InvalidArgument: `every` or `first_every` below 1, or `first` below 0.
    """

    every: int = 10
    first: int = 100
    first_every: int = 1

    def __post_init__(self) -> None:
        if min(self.every, self.first_every) < 1 or self.first < 0:
            raise InvalidArgument(
                f"a cadence has every {self.every}, first {self.first} and first_every {self.first_every}, "
                "expected 1, 0 and 1 or more"
            )

    def due(self, step: int) -> bool:
        """Whether optimiser step `step`, from 0, has a meta-update."""
        return step % (self.first_every if step < self.first else self.every) == 0


# By what a weighter does, and by what is left to be decided about it; the figures are in docs/method.md.
CADENCE_INSIDE = Cadence(first=0)  # for weights inside a batch
CADENCE_INSIDE_FROZEN = Cadence(every=50, first=300, first_every=10)  # for their trust alone
CADENCE_TAUGHT = Cadence(every=50, first=32)  # for a choice by a weighter that was taught before: its trust, mostly


def usual_cadence(*, chooses: bool, frozen: bool, taught_before: bool = False) -> Cadence:
    """Of a job for which none is given.

    Args:
        chooses: batches from candidates; else it weighs the samples of a batch.
        frozen: it only earns its trust.
        taught_before: so does, mostly, a job whose weighter chooses by what it learned before.
    """
    if not chooses:
        return CADENCE_INSIDE_FROZEN if frozen else CADENCE_INSIDE
    return CADENCE_TAUGHT if frozen or taught_before else Cadence()
