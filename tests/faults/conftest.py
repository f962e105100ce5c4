"""A service for all tests of faults, and the table of what became of each call under each fault, printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.conftest import Address, ServiceProcess
from tests.faults.proxy import FAULTS, Fault


@dataclass(frozen=True)
class Outcome:
    """What became of a training loop."""

    uniform: int  # steps without the weighter while the fault was there
    later: int  # meta-updates that were delivered when it was over
    slowest: float  # step, or call, in deadlines
    dropped: int = 0  # meta-updates that were given up

    def __str__(self) -> str:
        words = [f"{self.uniform}u"] if self.uniform else ["ok"]
        words += [f"{self.later}l"] if self.later else []
        words += [f"{self.dropped}x"] if self.dropped else []
        return f"{' '.join(words)} {self.slowest:.1f}"


@dataclass
class FaultTable:
    """Outcomes by transport and call, and fault."""

    rows: dict[tuple[str, str], dict[Fault, Outcome]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        names = {row: f"{row[0]} {row[1]}" for row in self.rows}
        first = max(map(len, names.values()))
        lines = [" ".join([" " * first, *(f"{fault:>13}" for fault in FAULTS)])]
        for row, cells in self.rows.items():
            shown = (str(cells.get(fault, "")) for fault in FAULTS)
            lines.append(" ".join([names[row].ljust(first), *(f"{cell:>13}" for cell in shown)]))
        return [
            *lines,
            "The fault begins at the call and lasts for the rest of the loop. Nu: N steps with uniform weights, ok: "
            "none; Nl: N meta-updates",
            "delivered when it was over; Nx: given up, as the job was closed; the number: slowest step or call, in "
            "deadlines.",
        ]


TABLE = pytest.StashKey[FaultTable]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = FaultTable()


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> FaultTable:
    return request.config.stash[TABLE]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A process of its own: it is the trainer that these tests look at."""
    running = ServiceProcess(tmp_path_factory.mktemp("service") / "state")
    yield running.address
    running.kill()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(TABLE, FaultTable())
    if table.rows:
        terminalreporter.section("faults x calls")
        for line in table.lines():
            terminalreporter.write_line(line)
