"""The names and labels of metrics are a promise: docs/operations.md has all of them, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from weighting_service.metrics import Metrics

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def promised() -> dict[str, set[str]]:
    """Labels by name, from the rows of the section on metrics."""
    table = OPERATIONS.partition("\n## Metrics")[2].partition("\n## ")[0]
    found = {}
    for names, labels in re.findall(r"^\| (`weighbridge_[^|]*) \| ([^|]*)\| ", table, re.MULTILINE):
        for name in re.findall(r"`(weighbridge_\w+)`", names):
            found[name] = set(re.findall(r"\w+", labels))
    return found


def test_every_metric_is_documented_with_its_labels() -> None:
    offered = {}
    for metric in Metrics().registry._collector_to_names:
        name = metric._name + ("_total" if metric._type == "counter" else "")
        offered[name] = set(metric._labelnames)
    assert promised() == offered


def test_alarms_are_of_metrics_that_there_are() -> None:
    assert set(re.findall(r"`(weighbridge_\w+)", OPERATIONS)) <= promised().keys()
