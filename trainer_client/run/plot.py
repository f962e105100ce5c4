"""weights.png: how much each source counts over the steps of a run, and how concentrated the weights are.

Arrays in, a picture out; knows nothing of runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito: distinguishable with any colour vision. Without their yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _FAINT = "#333333", "#DDDDDD"


def plot_weights(path: Path, weights: np.ndarray, sources: np.ndarray, names: list[str], title: str) -> None:
    """Writes the picture.

    Args:
        path: the PNG to write.
        weights: [S, B], the weights of each step, mean 1 in a row.
        sources: [S, B], indices into `names`.
        names: of the sources.
        title: of the picture.
    """
    steps = np.arange(1, len(weights) + 1)
    window = max(1, len(weights) // 15)
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    means = {name: smoothed_mean(weights, sources == i, window) for i, name in enumerate(names) if (sources == i).any()}
    for colour, name in zip(_COLOURS * len(means), sorted(means, key=lambda n: -means[n][-1]), strict=False):
        top.plot(steps, means[name], color=colour, linewidth=2, label=f"{name}  {means[name][-1]:.2f}")
    top.axhline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    top.set_ylim(bottom=0)
    top.set_ylabel("mean weight")
    top.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    top.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, title="source, at the end", alignment="left")
    share = 100 * weights.sum(1) ** 2 / (weights**2).sum(1) / weights.shape[1]
    bottom.plot(steps, share, color=_FAINT, linewidth=0.8)
    bottom.plot(steps, smoothed_mean(share[:, None], np.ones((len(share), 1), bool), window), color=_INK, linewidth=1.6)
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("effective\nsamples, %")
    bottom.set_xlabel(f"optimiser step (averages over {window} steps; dashed: uniform)")
    for axes in (top, bottom):
        axes.set_xlim(1, max(2, len(weights)))
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    figure.savefig(path)


def smoothed_mean(values: np.ndarray, chosen: np.ndarray, window: int) -> np.ndarray:
    """[S] mean of the chosen values over the last `window` steps; not a number before the first chosen one.

    Args:
        values, chosen: [S, B]; steps count by how many of their values are chosen.
    """
    sums = np.cumsum((values * chosen).sum(1, dtype=np.float64))
    counts = np.cumsum(chosen.sum(1, dtype=np.float64))
    before = np.arange(len(values)) - window
    recent_sums = sums - np.where(before >= 0, sums[before], 0)
    recent_counts = counts - np.where(before >= 0, counts[before], 0)
    means = np.full(len(values), np.nan)
    np.divide(recent_sums, recent_counts, out=means, where=recent_counts > 0)
    return means
