"""results.json: every run's figures, and what they were measured on. Knows summaries and metrics of runs, no goal."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.learning.execute import made_at
from benchmarks.learning.plan import Plan, Run
from benchmarks.machine import commit, describe
from trainer_client.run.metrics import read_metrics
from trainer_client.run.report import RunSummary, flops_at_points, loss_after, write_json
from weighting_contract.errors import InvalidArgument

VERSION = 1
POINTS = 24  # of a series, each the mean over as many steps as fall on it
NOISE = 0.03  # nats: what a run may differ by from its own repetition (docs/method.md)


@dataclass(frozen=True)
class Series:
    """How a run went, in `POINTS` points; a series that the run does not have is empty."""

    steps: list[float]
    shares: dict[str, list[float]]  # of each source in what was trained on
    effective_share: list[float]  # effective sample size / B
    trust: list[float]


@dataclass(frozen=True)
class Result:
    """One run. Losses are nats a token, FLOPs as of `trainer_client.run.compute`."""

    corpus: str
    method: str
    seed: int
    rate: float
    steps: int
    val_loss: float
    test_loss: float
    compute: dict[str, float]
    seconds: dict[str, float]  # wall, train, score, meta
    curve: list[tuple[int, float, float]]  # step, seconds, test loss on fixed samples
    trust: float | None
    series: Series
    spent: list[float] = field(default_factory=list)  # FLOPs at each point of the curve; none: all steps cost the same
    commit: str = ""  # that it was begun at; none: that of the whole file

    @property
    def flops_a_step(self) -> float:
        """Everything but the training of a reference, which is spent once a pool; the mean over the steps."""
        return sum(self.compute[f"{part}_flops"] for part in ("training", "teaching", "scoring")) / self.steps

    def loss_after(self, flops: float) -> float:
        """Test loss on the curve's samples once so much was spent; linear between evaluations, constant beyond."""
        return loss_after(flops, self.spent_at, self.curve)

    def flops_to(self, loss: float) -> float:
        """What was spent when the curve first had this test loss; infinite where it never had."""
        before: tuple[float, float] | None = None
        for spent, (_, _, at) in zip(self.spent_at, self.curve, strict=True):
            if at <= loss:
                if before is None:
                    return spent
                share = (before[1] - loss) / (before[1] - at)
                return before[0] + share * (spent - before[0])
            before = (spent, at)
        return float("inf")

    @property
    def spent_at(self) -> list[float]:
        """FLOPs at each point of the curve, everything included but the training of a reference."""
        return self.spent or [step * self.flops_a_step for step, _, _ in self.curve]


@dataclass(frozen=True)
class Results:
    """All of a matrix.

    Attributes:
        methods: flags by name, as in the plan.
        flags: of all runs.
        rates: validation loss by method and learning rate, mean over the corpora that tuned it.
        chosen: learning rate by method.
    """

    commit: str
    hardware: str
    date: str
    methods: dict[str, dict[str, Any]]
    rates: dict[str, dict[str, float]]
    chosen: dict[str, float]
    runs: list[Result] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Self:
        """Where nothing is known yet."""
        return cls("", "", "", {}, {}, {})

    def of(self, corpus: str, method: str) -> list[Result]:
        """By seed."""
        return sorted((r for r in self.runs if (r.corpus, r.method) == (corpus, method)), key=lambda r: r.seed)

    def without(self, methods: Collection[str]) -> Self:
        """All but these methods. Raises SystemExit where one of them is none of these."""
        if missing := sorted(set(methods) - set(self.methods)):
            raise SystemExit(f"there is no method {missing[0]!r} in the results, which have {', '.join(self.methods)}")
        return replace(
            self,
            methods={name: flags for name, flags in self.methods.items() if name not in methods},
            runs=[run for run in self.runs if run.method not in methods],
        )

    def same(self, plan: Plan, method: str) -> bool:
        """Whether `plan` means by a method what was run here."""
        return self.flags == plan.flags and self.methods.get(method) == plan.methods[method]

    def known(self, plan: Plan, run: Run) -> Result | None:
        """What is known of a run of `plan`: of the same flags and learning rate."""
        if not self.same(plan, run.method):
            return None
        found = [r for r in self.of(run.corpus, run.method) if (r.seed, r.rate) == (run.seed, run.rate)]
        return replace(found[0], commit=found[0].commit or self.commit) if found else None

    @property
    def corpora(self) -> list[str]:
        return list(dict.fromkeys(run.corpus for run in self.runs))

    def write(self, path: Path) -> None:
        write_json(path, {"version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SystemExit with a sentence where the file is another version's, or none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("version")
        except (OSError, ValueError, KeyError, AttributeError) as exc:
            raise SystemExit(f"{path} holds no results of benchmarks.learning: {exc}") from exc
        if version != VERSION:
            raise SystemExit(
                f"{path} is of version {version}, this program reads version {VERSION}: run the commit that wrote it "
                f"({values.get('commit', 'not known')}), or run the matrix anew"
            )
        runs = [
            Result(**{**run, "curve": [tuple(point) for point in run["curve"]], "series": Series(**run["series"])})
            for run in values.pop("runs")
        ]
        return cls(**values, runs=runs)


def collect(
    plan: Plan,
    out: Path,
    rates: dict[str, dict[str, float]],
    chosen: dict[str, float],
    known: Results,
) -> Results:
    """The figures of all runs of `plan` that are finished in `out`, or known from before."""
    found = (_result(out, run) or known.known(plan, run) for run in plan.runs(chosen))
    runs = [result for result in found if result is not None]
    return Results(commit(), describe(), time.strftime("%Y-%m-%d"), plan.methods, rates, chosen, runs, plan.flags)


def validation_losses(plan: Plan, out: Path, known: Results) -> dict[str, dict[str, float]]:
    """By method and learning rate, the mean over the corpora that tune; a rate that a corpus lacks is left out."""
    losses: dict[str, dict[str, list[float]]] = {}
    for run in plan.tuning():
        if (summary := _summary(out / run.folder)) is not None:
            losses.setdefault(run.method, {}).setdefault(f"{run.rate:g}", []).append(summary.val_loss)
    corpora = len(plan.tuning_corpora)
    return {
        method: {
            **known_losses(plan, method, known),
            **{rate: float(np.mean(of)) for rate, of in losses.get(method, {}).items() if len(of) == corpora},
        }
        for method in plan.methods
    }


def known_losses(plan: Plan, method: str, known: Results) -> dict[str, float]:
    """Validation losses by learning rate that an earlier tuning of the same method gave, of the plan's rates."""
    losses = known.rates.get(method, {}) if known.same(plan, method) else {}
    return {rate: loss for rate, loss in losses.items() if float(rate) in plan.rates}


def best_rates(plan: Plan, losses: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each method's learning rate: the least within `NOISE` of the best one; the only one where nothing was tuned.

    What lies within a run's noise does not tell rates apart, and of two that are as good the smaller one is the safer
    on other data.

    Raises SystemExit where a method has none that was tried to its end.
    """
    chosen = {}
    for method in plan.methods:
        if len(plan.rates) == 1:
            chosen[method] = plan.rates[0]
        elif not losses.get(method):
            raise SystemExit(f"no tuning run of {method!r} is finished: its learning rate is not known")
        else:
            bound = min(losses[method].values()) + NOISE
            chosen[method] = min(float(rate) for rate, loss in losses[method].items() if loss <= bound)
    return chosen


def _result(out: Path, run: Run) -> Result | None:
    folder = out / run.folder
    summary = _summary(folder)
    if summary is None:
        return None
    rate = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    return Result(
        corpus=run.corpus,
        method=run.method,
        seed=run.seed,
        rate=rate["lr"],
        steps=summary.steps,
        val_loss=summary.val_loss,
        test_loss=summary.test_loss,
        compute=summary.compute,
        seconds={name: getattr(summary, f"{name}_seconds") for name in ("wall", "train", "score", "meta")},
        curve=summary.test_curve,
        spent=flops_at_points(summary),
        trust=summary.trust,
        series=_series(read_metrics(folder / summary.label / "metrics.jsonl"), rate["batch_size"]),
        commit=made_at(out, run),
    )


def _summary(folder: Path) -> RunSummary | None:
    paths = list(folder.glob("*/summary.json"))
    try:
        return RunSummary.read(paths[0]) if len(paths) == 1 else None
    except InvalidArgument as exc:
        raise SystemExit(f"{exc.message}; remove {folder} to have it run again") from exc


def _series(lines: list[dict[str, Any]], batch_size: int) -> Series:
    parts = [list(part) for part in np.array_split(np.arange(len(lines)), min(POINTS, len(lines)))]

    def means(values: list[float | None]) -> list[float]:
        if all(v is None for v in values):
            return []
        array = np.array([np.nan if v is None else v for v in values], np.float64)
        return [round(float(np.nanmean(array[part])), 5) if np.isfinite(array[part]).any() else 0.0 for part in parts]

    shares = [line["trained_share"] for line in lines]
    return Series(
        steps=means([line["step"] for line in lines]),
        shares={name: means([share.get(name, 0.0) for share in shares]) for name in _names(shares)},
        effective_share=[v / batch_size for v in means([line["effective_sample_size"] for line in lines])],
        trust=means([line.get("trust") for line in lines]),
    )


def _names(shares: Iterable[dict[str, float]]) -> list[str]:
    return sorted({name for share in shares for name in share})
