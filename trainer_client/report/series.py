"""Curves of a run's metrics: noisy ones as means over the last steps, few enough points to draw. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer_client.run.smoothing import moving_mean, moving_ratio

POINTS = 160  # of a curve, at most
_DIGITS = 5  # significant ones
_LEAST_SAMPLES = 4

Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """A curve; None where there is nothing to say."""

    x: list[float]
    y: list[float | None]


def window_of(steps: int) -> int:
    """Steps that means are over, in runs of so many steps."""
    return min(steps, max(5, steps // 15))


def groups(runs: Sequence[Lines], by: str) -> list[str]:
    """The groups of "source", "length", "loss" or "seen" in runs: by their order of size, or by their own order."""
    drawn: dict[str, float] = {}
    for lines in runs:
        for line in lines:
            for name, (share, _) in line["preference"].get(by, {}).items():
                drawn[name] = drawn.get(name, 0.0) + share
    if by == "source":
        return sorted(drawn, key=lambda name: -drawn[name])
    return sorted(drawn, key=_place)


def shares(lines: Lines, by: str, name: str, window: int, factor: float = 1.0) -> Series:
    """A group's share of what was trained on, times `factor`."""
    _, trained = _pair(lines, by, name)
    return _series(lines, factor * moving_mean(trained, window))


def relative_weight(lines: Lines, by: str, name: str, window: int, batch_size: int) -> Series:
    """A group's share of what was trained on over its share of what was drawn, both summed over the window.

    Nothing where the group had less than a few samples of the window's batches, had they been even.
    """
    drawn, trained = (np.nan_to_num(values) for values in _pair(lines, by, name))
    return _series(lines, moving_ratio(trained, drawn, window, _LEAST_SAMPLES / batch_size))


def mean(lines: Lines, name: str, window: int, factor: float = 1.0) -> Series:
    """A number of each line, times `factor`; absent ones are left out of the mean."""
    values = np.array([line.get(name, np.nan) for line in lines], np.float64)
    return _series(lines, factor * moving_mean(values, window))


def cotangent(lines: Lines, name: str, window: int) -> Series:
    """A source's mean cotangent in the steps that were taught; nothing before a few of them were."""
    values = np.array([line.get("cotangent", {}).get(name, np.nan) for line in lines], np.float64)
    usual = float(np.isfinite(values).mean()) * window  # taught steps in a window
    return _series(lines, moving_mean(values, window, least=max(0.5, usual / 4)))


def empty(series: Series) -> bool:
    """Whether a curve has no point."""
    return all(value is None for value in series.y)


def even(lines: Lines) -> bool:
    """Whether a run has trained evenly on what it drew, in every step."""
    return all(
        abs(trained - drawn) < 1e-4 for line in lines for drawn, trained in line["preference"]["source"].values()
    )


def _pair(lines: Lines, by: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """[S] of each step the share of the drawn and of the trained; not a number where the step says nothing."""
    pairs = [
        line["preference"][by].get(name, (0.0, 0.0)) if by in line["preference"] else (np.nan,) * 2 for line in lines
    ]
    array = np.array(pairs, np.float64)
    return array[:, 0], array[:, 1]


def _series(lines: Lines, values: np.ndarray) -> Series:
    """At most POINTS of them, evenly spread, the last one included."""
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(POINTS, len(lines))).round().astype(int))
    return Series(
        [float(lines[i]["step"]) for i in chosen],
        [float(f"{values[i]:.{_DIGITS}g}") if np.isfinite(values[i]) else None for i in chosen],
    )


def _place(name: str) -> float:
    """Of a group among the others: names begin with, or say, the numbers that they stand for."""
    digits = "".join(character if character.isdigit() else " " for character in name).split()
    return float(digits[0]) - name.startswith("under")
