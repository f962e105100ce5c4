"""weights.png: how much each source counts over the steps of a run, and what stands behind it.

Arrays in, a picture out; knows nothing of runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer_client.run.smoothing import moving_mean, moving_ratio

# Okabe and Ito: distinguishable with any colour vision. Without their yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _FAINT = "#333333", "#DDDDDD"


@dataclass(frozen=True)
class SourceHistory:
    """What a run was trained on, step by step."""

    weights: np.ndarray  # [S, B], mean 1 in a row
    sources: np.ndarray  # [S, B] of the samples trained on, indices into names
    drawn: np.ndarray  # [S, D] of those that these were chosen from; equal to sources where the batch was as drawn
    names: list[str]


def plot_sources(path: Path, history: SourceHistory, title: str, trust: np.ndarray | None = None) -> None:
    """Writes the picture: enrichment of the sources on top, below it effective samples or, where given, the trust.

    Args:
        path: the PNG to write.
        history: of at least one step.
        title: of the picture.
        trust: [S] in [0, 1], of runs that select.
    """
    count, batch = history.weights.shape
    steps = np.arange(1, count + 1)
    window = max(1, count // 15)
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    curves = {
        name: enrichment(history, i, window) for i, name in enumerate(history.names) if (history.drawn == i).any()
    }
    for colour, name in zip(_COLOURS * len(curves), sorted(curves, key=lambda n: -curves[n][-1]), strict=False):
        top.plot(steps, curves[name], color=colour, linewidth=2, label=f"{name}  {curves[name][-1]:.2f}")
    top.axhline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    top.set_ylim(bottom=0)
    top.set_ylabel("mean weight" if trust is None else "share in the batch /\nshare in the candidates")
    top.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    top.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, title="source, at the end", alignment="left")
    if trust is None:
        share = 100 * history.weights.sum(1) ** 2 / (history.weights**2).sum(1) / batch
        bottom.plot(steps, share, color=_FAINT, linewidth=0.8)
        bottom.plot(steps, moving_mean(share, window), color=_INK, linewidth=1.6)
        bottom.set_ylabel("effective\nsamples, %")
    else:
        bottom.plot(steps, 100 * trust, color=_INK, linewidth=1.6)
        bottom.set_ylabel("trust, %")
    bottom.set_ylim(0, 105)
    bottom.set_xlabel(f"optimiser step (averages over {window} steps; dashed: uniform)")
    for axes in (top, bottom):
        axes.set_xlim(1, max(2, count))
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    figure.savefig(path)


def enrichment(history: SourceHistory, source: int, window: int) -> np.ndarray:
    """[S] share of a source in what was trained on (weight x count) over its share in what was drawn.

    Both are sums over the last `window` steps; not a number before the source was first drawn. For a batch that is
    weighed as drawn this is the source's mean weight.
    """
    trained = (history.weights * (history.sources == source)).sum(1, dtype=np.float64) / history.weights.shape[1]
    drawn = (history.drawn == source).mean(1, dtype=np.float64)
    return moving_ratio(trained, drawn, window, 0.5 / history.drawn.shape[1])  # rounding apart, 0
