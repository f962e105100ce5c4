"""report.md: figures, goals and pictures of a matrix, in plain words."""

from __future__ import annotations

from pathlib import Path

from benchmarks.learning.figures import Figures
from benchmarks.learning.goals import Goal
from benchmarks.learning.plots import plot_choices, plot_losses
from benchmarks.learning.results import NOISE, Results

_WORDS = (
    "Losses are test losses in nats a token, means over seeds. *Gap closed* is (uniform - method) / (uniform - "
    "oracle) at equal steps, the oracle being full batches of the target's source. *Compute* counts everything but "
    "the training of references: 1 is a uniform run. *At equal compute*: the test loss, on the samples of the "
    "curves, once as much was spent as in a uniform run. *To uniform's end*: the compute at which a method has the "
    "loss that uniform ends with. Where DWM selects, a part of the first 100 batches is drawn evenly "
    "(`--select-warmup`); the other methods are as published, but for `dsir-warm`, which shows what that alone does "
    "for `dsir`, and counts for no goal.\n"
)


def write_report(results: Results, figures: list[Figures], goals: list[Goal], folder: Path) -> Path:
    """report.md and its pictures in `folder`; where the report is."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        head("Learned weights against the alternatives", "python -m benchmarks.learning", results),
        _WORDS,
        goals_section(goals),
    ]
    for corpus in results.corpora:
        plot_losses(results, corpus, folder / f"{corpus}-loss.png")
        plot_choices(results, corpus, folder / f"{corpus}-choices.png")
        parts.append(_corpus(corpus, [f for f in figures if f.corpus == corpus]))
        for kind in ("loss", "choices"):
            if (folder / f"{corpus}-{kind}.png").exists():
                parts.append(f"![{corpus}, {kind}]({corpus}-{kind}.png)\n")
    parts.append(_rates(results))
    path = folder / "report.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def head(title: str, command: str, results: Results) -> str:
    """What was measured, by which command, when and on what."""
    commits = sorted({run.commit or results.commit for run in results.runs} or {results.commit})
    return (
        f"# {title}\n\n"
        f"`{command}`, {results.date}, commit {' and '.join(commits)}, {len(results.runs)} runs.\n\n"
        f"```\n{results.hardware}\n```\n"
    )


def goals_section(goals: list[Goal]) -> str:
    rows = [
        f"| {g.what} | {g.value:.3f} | {'at least' if g.at_least else 'at most'} {g.bound:.3f} "
        f"| {'reached' if g.reached else '**missed**'} |"
        for g in goals
    ]
    reached = sum(g.reached for g in goals)
    return "\n".join(
        [
            f"## Goals: {reached} of {len(goals)} reached\n",
            "| figure | measured | goal | |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _corpus(corpus: str, figures: list[Figures]) -> str:
    rows = []
    for f in sorted(figures, key=lambda f: f.test_loss):
        gap = "" if f.gap_closed is None else f"{100 * f.gap_closed:.0f} %"
        to_uniform = "never" if f.compute_to_uniform == float("inf") else f"{f.compute_to_uniform:.2f}"
        rows.append(
            f"| {f.method} | {f.test_loss:.3f} ± {f.spread / 2:.3f} | {gap} | {f.compute:.2f} "
            f"| {f.loss_at_compute:.3f} | {to_uniform} | {100 * f.teaching_seconds:.1f} % | {f.seeds} |"
        )
    head = "| method | test loss | gap closed | compute | at equal compute | to uniform's end | teaching time | seeds |"
    return "\n".join([f"## {corpus}\n", head, "|---|---|---|---|---|---|---|---|", *rows, ""])


def _rates(results: Results) -> str:
    if not results.rates:
        return ""
    rates = sorted({rate for by_rate in results.rates.values() for rate in by_rate}, key=float)
    rows = [
        f"| {method} | " + " | ".join(_rate(by_rate, rate, results.chosen[method]) for rate in rates) + " |"
        for method, by_rate in results.rates.items()
    ]
    head = "| method | " + " | ".join(rates) + " |"
    words = (
        "Validation loss by learning rate, with a seed that no other run has. Taken was the smallest rate within "
        f"{NOISE} of the best: what is less is a run's noise.\n"
    )
    return "\n".join(["## Learning rates\n", words, head, "|---" * (len(rates) + 1) + "|", *rows, ""])


def _rate(by_rate: dict[str, float], rate: str, chosen: float) -> str:
    if rate not in by_rate:
        return ""
    return f"**{by_rate[rate]:.3f}**" if float(rate) == chosen else f"{by_rate[rate]:.3f}"
