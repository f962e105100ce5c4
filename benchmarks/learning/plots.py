"""Pictures of a matrix, one file a corpus. Results in, PNGs out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.learning.figures import UNIFORM
from benchmarks.learning.results import Result, Results

_OURS = "dwm"


def plot_losses(results: Results, corpus: str, path: Path) -> None:
    """Test loss over steps and over compute, mean over seeds; learned weights as full lines, the others dashed."""
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, over_compute = figure.subplots(1, 2, sharey=True)
    uniform = results.of(corpus, UNIFORM)
    spent = np.mean([run.flops_a_step * run.steps for run in uniform]) if uniform else 1.0
    for (method, runs), colour in zip(_methods(results, corpus), _colours(len(results.methods)), strict=False):
        steps = [point[0] for point in runs[0].curve]
        losses = np.mean([[point[2] for point in run.curve] for run in runs], axis=0)
        line = "-" if method.startswith(_OURS) else (0, (4, 2))
        over_steps.plot(steps, losses, color=colour, linestyle=line, label=f"{method}  {losses[-1]:.2f}")
        over_compute.plot(np.mean([run.spent_at for run in runs], axis=0) / spent, losses, color=colour, linestyle=line)
    over_steps.set_ylabel("test loss, nats a token")
    over_steps.set_xlabel("optimiser step")
    over_compute.set_xlabel("compute, everything included (a uniform run = 1)")
    over_compute.axvline(1, color="#999999", linewidth=0.8)
    over_steps.set_title(corpus, loc="left", fontweight="bold")
    figure.legend(*over_steps.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    _finish(figure, (over_steps, over_compute), path)


def plot_choices(results: Results, corpus: str, path: Path) -> None:
    """What was trained on, by source, and effective sample size and trust over steps; of the first seed of each DWM."""
    chosen = [(method, runs[0]) for method, runs in _methods(results, corpus) if method.startswith(_OURS)]
    if not chosen:
        return
    figure = Figure(figsize=(3.1 * len(chosen) + 0.8, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(chosen), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (top, bottom), (method, run) in zip(axes.T, chosen, strict=True):
        for (source, shares), colour in zip(run.series.shares.items(), _colours(8), strict=False):
            top.plot(run.series.steps, shares, color=colour, label=source)
        top.set_title(method, fontsize=9)
        bottom.plot(run.series.steps, run.series.effective_share, color="#333333", label="effective samples / B")
        if run.series.trust:
            bottom.plot(run.series.steps, run.series.trust, color="#D55E00", label="trust")
        bottom.set_ylim(0, 1.05)
        top.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("share of what was trained on")
    axes[0][-1].legend(frameon=False, fontsize=7)
    axes[1][-1].legend(frameon=False, fontsize=7)
    figure.supxlabel("optimiser step", fontsize=9)
    _finish(figure, axes.ravel(), path)


def _methods(results: Results, corpus: str) -> list[tuple[str, list[Result]]]:
    found = [(method, results.of(corpus, method)) for method in results.methods]
    return [(method, runs) for method, runs in found if runs]


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    return [colormaps["tab20"](i % 20) for i in range(max(count, 1))]


def _finish(figure: Figure, axes: tuple[Axes, ...] | np.ndarray, path: Path) -> None:
    for ax in axes:
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    figure.savefig(path)
