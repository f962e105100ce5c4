"""The charts of a report, drawn with plotly: curves in, figures with their headings and legends out.

Every chart is a row of panels: one a run where groups of samples are shown, so that runs are side by side, else one for
all runs. Colours are those that people with any colour vision can tell apart.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from trainer_client.report import series
from trainer_client.report.runs import Run
from trainer_client.report.series import Series

STEP = "optimiser step"
# Okabe and Ito, without their black and their yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot")
_GREY, _INK, _FAINT = "#777777", "#222222", "#E6E6E6"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_QUARTERS = {"q1": "lowest", "q2": "second", "q3": "third", "q4": "highest"}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")  # of units, a thousand times each


@dataclass(frozen=True)
class Style:
    """How a curve looks."""

    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    """A figure and what it is of."""

    name: str
    figure: go.Figure


@dataclass(frozen=True)
class Chart:
    """Panels that are read together."""

    title: str
    about: str  # how to read it
    panels: list[Panel]
    legend: dict[str, Style] = field(default_factory=dict)
    most_columns: int = 4  # side by side

    @property
    def columns(self) -> int:
        """Panels that lie side by side on a wide screen."""
        count = len(self.panels)
        return count if count <= self.most_columns else 3 if count % 3 == 0 else self.most_columns


def run_styles(runs: Sequence[Run]) -> dict[str, Style]:
    """By name; uniform runs are grey, and colours come again with another dash."""
    styles: dict[str, Style] = {}
    numbers = {True: 0, False: 0}
    for run in runs:
        uniform = run.label == "uniform"
        number, numbers[uniform] = numbers[uniform], numbers[uniform] + 1
        turn = number if uniform else number // len(_COLOURS)
        colour = _GREY if uniform else _COLOURS[number % len(_COLOURS)]
        styles[run.name] = Style(colour, _DASHES[turn % len(_DASHES)])
    return styles


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Test and validation loss, over steps and over compute."""
    panels = []
    for name, title in (("test_loss", "Test loss"), ("val_loss", "Validation loss")):
        curves = {run.name: run.curve(name) for run in runs}
        over_steps = {name: Series([p[0] for p in curve], [p[2] for p in curve]) for name, curve in curves.items()}
        y_title = f"{title.lower()}, nats a token"
        styles = run_styles(runs)
        panels.append(Panel(f"{title} over steps", _lines(over_steps, styles, STEP, y_title)))
        known = [run for run in runs if run.spent]
        if known:
            unit, size = _unit(max(max(run.spent.values()) for run in known))
            over_compute = {
                run.name: Series([run.spent[p[0]] / size for p in curves[run.name]], over_steps[run.name].y)
                for run in known
            }
            x_title = f"training, teaching and scoring, {unit}FLOP"
            panels.append(Panel(f"{title} over compute", _lines(over_compute, styles, x_title, y_title)))
    about = (
        "On the same fixed samples at every evaluation. Compute is what training, teaching and scoring the candidates "
        "took by the usual counts; what training a reference took is not in it."
    )
    return [Chart("Loss", about, panels, run_styles(runs), most_columns=2)]


def preference_charts(runs: Sequence[Run], window: int) -> list[Chart]:
    """What counts, by source, by length, by loss and by times seen."""
    field_name = " or ".join(dict.fromkeys(run.group_by for run in runs))
    even = f"1 is even; means over {window} steps. A gap: too few were drawn."
    relative = (
        "A group's share of what was trained on, each sample by its weight, over its share of what was drawn. Where "
        "batches are weighed as they are drawn, that is its mean weight; where they are chosen from candidates, how "
        f"much more often than others its samples are kept. {even} Runs that train evenly on what they draw are left "
        "out."
    )
    deciding = [run for run in runs if not series.even(run.lines)]
    share = f"Of what was trained on, each sample by its weight; means over {window} steps."
    charts = [
        _by_group(runs, "source", f"Share by {field_name}", share, window, stacked=True),
        _by_group(deciding, "source", f"Weight or share kept, by {field_name}", relative, window),
        _by_group(
            deciding,
            "length",
            "By length",
            f"Relative to an even choice, by the tokens of the document that a sample is cut from. {even}",
            window,
            label=lambda name: f"{name.replace('-', ' to ')} tokens",
        ),
        _by_group(
            deciding,
            "loss",
            "By loss",
            "Relative to an even choice, by quarters of what was drawn. Among candidates the loss is that of what "
            "scored them, the reference or the trainer; in a batch as drawn it is the trainer's. Runs without losses "
            f"of their candidates are left out. {even}",
            window,
            label=lambda name: f"{_QUARTERS[name]} quarter",
        ),
        _by_group(
            deciding,
            "seen",
            "By times seen",
            f"Relative to an even choice, by how often the run had trained on a sample before. {even}",
            window,
            label=lambda name: {"0": "never before", "1": "once", "2": "twice"}.get(name, "three times or more"),
        ),
    ]
    return [chart for chart in charts if chart.panels]


def signal_charts(runs: Sequence[Run], window: int) -> list[Chart]:
    """Effective sample size and trust, and the mean cotangent by source."""
    styles = run_styles(runs)
    sizes = {run.name: series.mean(run.lines, "effective_sample_size", window, 100 / run.batch_size) for run in runs}
    panels = [Panel("Effective sample size", _lines(sizes, styles, STEP, "of the batch, %", (0, 105)))]
    about = (
        "The effective sample size is (Σw)² / Σw²: below the whole batch, uneven weights cost gradient noise. Runs "
        f"that choose their batch train on it evenly and stay at 100 %. Means over {window} steps."
    )
    learned = [run for run in runs if any("trust" in line for line in run.lines)]
    if learned:
        trust = {run.name: series.mean(run.lines, "trust", 1, 100) for run in learned}
        panels.append(Panel("Trust", _lines(trust, styles, STEP, "trust, %", (-3, 105))))
        about += (
            " Trust is the factor on a job's logits: 100 % while the weighter's word proves right on what the job "
            "sends; 0 %, and even weights, where it does not. It follows from t, which the table has for the end: the "
            "mean agreement, less what choosing costs, over its standard error."
        )
    title = "Effective sample size and trust" if learned else "Effective sample size"
    charts = [Chart(title, about, panels, styles)]
    taught = [run for run in runs if any("cotangent" in line for line in run.lines)]
    if taught:
        names, legend, _ = _groups(taught, "source")
        long = 3 * window
        curves = {run.name: {name: series.cotangent(run.lines, name, long) for name in names} for run in taught}
        bounds = _bounds([curve for each in curves.values() for curve in each.values()])
        charts.append(
            Chart(
                f"Learning signal, by {' or '.join(dict.fromkeys(run.group_by for run in taught))}",
                "The mean cotangent dL_val/dw of the samples that steps were taught with: how the validation loss "
                "answers to more weight on them. Below 0 is help. Single ones are mostly noise: means over "
                f"{long} steps.",
                [
                    Panel(run.name, _lines(curves[run.name], legend, STEP, "nats a unit of weight", bounds, line_at=0))
                    for run in taught
                ],
                legend,
            )
        )
    return charts


def _by_group(
    runs: Sequence[Run],
    by: str,
    title: str,
    about: str,
    window: int,
    *,
    stacked: bool = False,
    label: Callable[[str], str] = str,
) -> Chart:
    """A panel for each run that has the groups, all on the same scale."""
    having = [run for run in runs if any(by in line["preference"] for line in run.lines)]
    names, styles, left_out = _groups(having, by)
    legend = {label(name): style for name, style in styles.items()}
    if left_out:
        about = f"{about} The {len(names)} largest groups; {left_out} more are left out."
    panels, top = [], 1.9
    for run in having:
        if stacked:
            curves = {label(name): series.shares(run.lines, by, name, window, 100) for name in names}
        else:
            curves = {
                label(name): series.relative_weight(run.lines, by, name, window, run.batch_size) for name in names
            }
        curves = {name: curve for name, curve in curves.items() if not series.empty(curve)}
        top = max([top, *(y for curve in curves.values() for y in curve.y if y is not None)])
        if curves and stacked:
            panels.append(Panel(run.name, _areas(curves, legend, STEP, "share of the batch, %")))
        elif curves:
            panels.append(Panel(run.name, _lines(curves, legend, STEP, "relative to even", line_at=1)))
    for panel in panels:
        panel.figure.update_yaxes(range=(0, 100 if stacked else 1.05 * top))  # all on one scale
    return Chart(title, about, panels, legend)


def _groups(runs: Sequence[Run], by: str) -> tuple[list[str], dict[str, Style], int]:
    """The groups that are shown, their styles, and how many are not."""
    names = series.groups([run.lines for run in runs], by)
    if by == "source":
        shown, colours = names[: len(_COLOURS)], list(_COLOURS)
    else:  # in order, from dark to light
        shown = names
        colours = sample_colorscale("Plasma", [0.82 * i / max(1, len(names) - 1) for i in range(len(names))])
    return shown, {name: Style(colour) for name, colour in zip(shown, colours, strict=False)}, len(names) - len(shown)


# ---- Figures --------------------------------------------------------------------------------------------------------


def _lines(
    curves: dict[str, Series],
    styles: dict[str, Style],
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    *,
    line_at: float | None = None,
) -> go.Figure:
    figure = _figure(x_title, y_title, y_range)
    for name, curve in curves.items():
        style = styles[name]
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name=html.escape(name),
            mode="lines" if len(curve.x) > 1 else "markers",
            line={"color": style.colour, "dash": style.dash, "width": 2},
        )
    if line_at is not None:
        figure.add_hline(y=line_at, line={"color": _INK, "width": 1, "dash": "4px 3px"}, layer="below")
    return figure


def _areas(curves: dict[str, Series], styles: dict[str, Style], x_title: str, y_title: str) -> go.Figure:
    figure = _figure(x_title, y_title)
    for name, curve in curves.items():
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name=html.escape(name),
            mode="lines",
            stackgroup="all",
            line={"color": "white", "width": 1},
            fillcolor=styles[name].colour,
        )
    return figure


def _figure(x_title: str, y_title: str, y_range: tuple[float, float] | None = None) -> go.Figure:
    axis = {"gridcolor": _FAINT, "zeroline": False, "linecolor": _INK, "ticks": "outside", "tickcolor": _FAINT}
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=290,
        margin={"l": 58, "r": 12, "t": 8, "b": 46},
        font={"family": _FONT, "size": 13, "color": _INK},
        hovermode="x unified",
        hoverlabel={"font": {"size": 12}},
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={**axis, "title": {"text": x_title, "standoff": 6}, "showgrid": False, "rangemode": "tozero"},
        yaxis={
            **axis,
            "title": {"text": y_title, "standoff": 6},
            "range": y_range,
            "hoverformat": ".4~g",
            "exponentformat": "SI",
            "automargin": True,
        },
    )
    return figure


def _bounds(curves: Sequence[Series]) -> tuple[float, float]:
    """A range for all of them, with 0 in it; what only the first and noisiest means reach is cut off."""
    values = sorted(y for curve in curves for y in curve.y[len(curve.y) // 10 :] if y is not None)
    if not values:
        return (-1.0, 1.0)
    low, high = min(values[0], 0.0), max(values[-1], 0.0)
    margin = 0.08 * ((high - low) or 1.0)
    return (low - margin, high + margin)


def _unit(largest: float) -> tuple[str, float]:
    """The prefix that leaves numbers from 1 to 1000, and what it stands for."""
    power = 0
    while largest >= 1000 ** (power + 1) and power < len(_PREFIXES) - 1:
        power += 1
    return _PREFIXES[power], 1000.0**power
