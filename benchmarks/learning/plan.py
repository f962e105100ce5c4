"""What is run: a YAML file of methods, corpora and seeds, and the commands that it stands for.

Knows flags of `python -m trainer_client.run`, nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml


@dataclass(frozen=True)
class Run:
    """One `python -m trainer_client.run`."""

    corpus: str
    method: str  # of the plan
    seed: int
    rate: float | None  # learning rate; None: that of all
    tuning: bool = False  # its validation loss decides about the rate, nothing else of it is used

    @property
    def folder(self) -> Path:
        """Under the folder of all runs."""
        name = f"seed-{self.seed}" if self.rate is None else f"seed-{self.seed}-lr-{self.rate:g}"
        return Path("tuning" if self.tuning else "runs") / self.corpus / self.method / name


@dataclass(frozen=True)
class Plan:
    """A matrix of runs.

    Attributes:
        methods: by name, the flags that make them, such as {"method": "dwm", "weighter-from": "none"}.
        corpora: names in `corpora.py`.
        seeds: of the runs that count.
        rates: learning rates that each method is tried with, on `tuning_corpora`, with `tuning_seed`.
        flags: of all runs.
    """

    methods: dict[str, dict[str, Any]]
    corpora: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    tuning_corpora: tuple[str, ...]
    tuning_seed: int
    flags: dict[str, Any]

    def checked(self) -> Self:
        """This plan. Raises ValueError where parts of it contradict."""
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seed {self.tuning_seed} tunes the learning rates, so no run that counts may have it")
        if not (self.methods and self.corpora and self.seeds and self.rates):
            raise ValueError("methods, corpora, seeds and rates.grid each need an entry")
        return self

    def tuning(self) -> list[Run]:
        """The runs that decide about learning rates; none where there is only one."""
        if len(self.rates) == 1:
            return []
        return [
            Run(corpus, method, self.tuning_seed, rate, tuning=True)
            for corpus in self.tuning_corpora
            for method in self.methods
            for rate in self.rates
        ]

    def runs(self, rates: Mapping[str, float] | None = None) -> list[Run]:
        """Those that count; a corpus's come together, so that a matrix that is stopped has whole rows.

        Args:
            rates: learning rate of each method; None: they have one that is known without.
        """
        return [
            Run(corpus, method, seed, (rates or {}).get(method))
            for corpus in self.corpora
            for seed in self.seeds
            for method in self.methods
        ]

    def command(self, run: Run, rate: float, data: tuple[str, ...], out: Path) -> list[str]:
        """Its flags; `data` names the corpus's files, and is empty for the built-in one."""
        given = {**self.flags, **self.methods[run.method], "seed": run.seed, "lr": rate, "out": str(out / run.folder)}
        return [*data, *_flags(given), "--overwrite"]


def load_plan(path: Path) -> Plan:
    """The plan of a YAML file. Raises SystemExit with a sentence where it is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        tuning = values["rates"]
        return Plan(
            methods={str(name): dict(flags or {}) for name, flags in values["methods"].items()},
            corpora=tuple(values["corpora"]),
            seeds=tuple(values["seeds"]),
            rates=tuple(map(float, tuning["grid"])),
            tuning_corpora=tuple(tuning["corpora"]),
            tuning_seed=int(tuning["seed"]),
            flags=dict(values.get("flags") or {}),
        ).checked()
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise SystemExit(
            f"{path} is not a plan of learning runs ({type(exc).__name__}: {exc}); benchmarks/learning/full.yaml is one"
        ) from exc


def _flags(given: dict[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)
