"""Sends a number of inputs to each surface of a target, and says what came back and what should not have.

Everything follows from the seed and the code, but for when the service does what it does in the background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.surfaces import Surface, surfaces
from tests.fuzz.target import Target

WARM_UP = 40  # inputs of each surface
LOOK_EVERY = 250  # inputs, between two looks at the target
KEPT_FAILURES = 20
SHOWN = 600  # characters of an input
GROWTH_MB = 20.0  # that memory may be from where it was


@dataclass
class Campaign:
    """The books of one run."""

    target: Target
    seed: int
    surfaces: dict[str, Surface]
    sent: int = 0
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by surface and code
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)  # by operation and code
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)  # first input of each kind
    resident_mb: float = 0.0  # before it began

    def run(self, name: str, inputs: int, on_input: Callable[[], None] = lambda: None) -> None:
        """Sends `inputs` inputs to the surface of that name; failures are collected, not raised."""
        surface = self.surfaces[name]

        @hypothesis.seed(self.seed + self.sent)  # other inputs in every run
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(surface.inputs)
        def send(value: Any) -> None:
            self._send(surface, value)
            on_input()

        send()
        self._look(surface.name)

    def check_memory(self) -> float:
        """Memory of the target now, MiB; that it has grown counts as a failure."""
        now = self.target.resident_mb()
        if now > self.resident_mb + GROWTH_MB:
            self._failed("", "memory", "", f"{self.resident_mb:.1f} MiB before, {now:.1f} MiB after")
        return now

    def report(self) -> str:
        """The failures, one a paragraph; empty: none."""
        return "\n\n".join(f"{' '.join(filter(None, kind))}\n  {text}" for kind, text in self.failures.items())

    def _send(self, surface: Surface, value: Any) -> None:
        answer = surface.send(value)
        self.sent += 1
        self.codes[surface.name, answer.code] += 1
        self.operations[answer.operation, answer.code] += 1
        if answer.wrong:
            shown = surface.show(value)
            cut = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(shown)} characters)"
            text = f"{answer.details}\n  input {self.sent}, {surface.name}: {cut}"
            self._failed(answer.operation, answer.code, answer.wrong, text)
        if answer.destructive:
            self.target.repair()
        if self.sent % LOOK_EVERY == 0:
            self._look(surface.name)
            self.target.repair()

    def _look(self, surface: str) -> None:
        """What must be true of the target whatever it was sent."""
        if changes := self.target.changes():
            self._failed(surface, "changes", "", f"{changes}, after {self.sent} inputs")
        for record in self.target.complaints():
            self._failed("", "log", record.rstrip().rpartition("\n")[2][-200:], record)

    def _failed(self, operation: str, code: str, wrong: str, text: str) -> None:
        if len(self.failures) < KEPT_FAILURES:
            self.failures.setdefault((operation, code, wrong), text)


def warmed_up(target: Target, seed: int) -> Campaign:
    """A campaign against a target that has done a bit of everything, so that what is made once is there already."""
    campaign = Campaign(target, seed, surfaces(target))
    for name in campaign.surfaces:
        campaign.run(name, WARM_UP)
    campaign.resident_mb = target.resident_mb()
    return campaign
