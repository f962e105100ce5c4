"""Every way into a real service, fuzzed in short; `make fuzz` does the same for longer.

FUZZ_INPUTS is the number of inputs over all surfaces, FUZZ_SEED their seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import Campaign, warmed_up
from tests.fuzz.target import Target

INPUTS = int(os.environ.get("FUZZ_INPUTS", "400"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SURFACES = ("messages", "bytes", "openapi", "json")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    target = Target(tmp_path_factory.mktemp("fuzzed"))
    yield warmed_up(target, SEED)
    assert target.close() == 0


@pytest.mark.parametrize("name", SURFACES)
def test_no_input_harms_the_service(campaign: Campaign, name: str) -> None:
    before = campaign.sent
    campaign.run(name, INPUTS // len(SURFACES))
    assert not campaign.failures, campaign.report()
    assert campaign.sent > before
    assert campaign.codes[name, "OK"] + campaign.codes[name, "200"] > 0  # else nothing was reached


def test_memory_is_back_to_where_it_was(campaign: Campaign) -> None:
    campaign.check_memory()
    assert not campaign.failures, campaign.report()
