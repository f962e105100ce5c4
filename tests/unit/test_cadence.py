"""Which steps are taught in."""

from __future__ import annotations

import pytest

from trainer_client.cadence import Cadence
from weighting_contract.errors import InvalidArgument


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        (Cadence(every=4, first=0), [0, 4, 8]),
        (Cadence(every=4, first=3), [0, 1, 2, 4, 8]),
        (Cadence(every=5, first=5, first_every=2), [0, 2, 4, 5, 10]),
        (Cadence(every=1), [*range(11)]),
    ],
)
def test_steps_that_are_taught_in(cadence: Cadence, steps: list[int]) -> None:
    assert [step for step in range(11) if cadence.due(step)] == steps


@pytest.mark.parametrize("given", [{"every": 0}, {"first": -1}, {"first_every": 0}])
def test_cadences_that_can_not_be_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"{next(iter(given))} {next(iter(given.values()))}.*expected 1, 0 and 1"
    ):
        Cadence(**given)
