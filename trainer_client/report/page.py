"""The report as one HTML file: a table of the runs, then charts. It needs nothing from anywhere, and asks nobody.

Knows what runs and charts look like on a page, not how either came about.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from plotly.offline import get_plotlyjs

from trainer_client.report.charts import Chart, Style, loss_charts, preference_charts, run_styles, signal_charts
from trainer_client.report.runs import Run, baseline_of
from trainer_client.report.series import window_of
from trainer_client.run.report import reached_uniform

_NONE = "-"
_DASH_ARRAYS = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
# Nothing may be loaded from anywhere; a browser that obeys could not even if something tried.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
html { overflow-y: scroll; }
body { margin: 0 auto; max-width: 1400px; padding: 24px clamp(12px, 3vw, 40px) 60px; background: #fff; color: #222;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 44px 0 2px; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 2px 8px; }
p { margin: 0 0 8px; max-width: 90ch; color: #555; }
.scroll { overflow-x: auto; margin: 18px 0 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 6px 22px 6px 0; text-align: right; border-bottom: 1px solid #e6e6e6; vertical-align: bottom; }
th { font-weight: 600; color: #555; font-size: .88rem; line-height: 1.3; white-space: normal; max-width: 7.5em; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td:first-child { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 10px; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 7px; }
.panels { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px 16px; }
@media (min-width: 620px) { .of-2, .of-3, .of-4 { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (min-width: 960px) {
  .of-1 { max-width: 800px; }
  .of-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .of-4 { grid-template-columns: repeat(4, minmax(0, 1fr)); }
}
"""
_CONFIG = {"responsive": True, "displayModeBar": False}


def page(runs: Sequence[Run]) -> str:
    """The HTML of a report on runs, at least one."""
    window = window_of(max(run.steps for run in runs))
    charts = [*loss_charts(runs), *preference_charts(runs, window), *signal_charts(runs, window)]
    title = "How data preferences evolved"
    body = "\n".join(_section(number, chart) for number, chart in enumerate(charts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {_escaped(", ".join(run.name for run in runs))}</title>
<link rel="icon" href="data:,">
<style>{_CSS}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>{title}</h1>
<p>{_escaped(_about(runs))}</p>
{_table(runs)}
{body}
</body>
</html>
"""


def _about(runs: Sequence[Run]) -> str:
    jobs = list(dict.fromkeys(run.job.resolve().name for run in runs))
    return (
        f"{_count(len(runs), 'run')} of the {'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}. Drag over a "
        "chart to zoom in, double-click to zoom out."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- Charts ---------------------------------------------------------------------------------------------------------


def _section(number: int, chart: Chart) -> str:
    panels = "\n".join(
        f'<div class="panel">{f"<h3>{_escaped(panel.name)}</h3>" if panel.name else ""}'
        + panel.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"chart-{number}-{place}", config=_CONFIG
        )
        + "</div>"
        for place, panel in enumerate(chart.panels)
    )
    return f"""<section>
<h2>{_escaped(chart.title)}</h2>
<p>{_escaped(chart.about)}</p>
{_legend(chart.legend)}
<div class="panels of-{chart.columns}">
{panels}
</div>
</section>"""


def _legend(styles: dict[str, Style]) -> str:
    items = "".join(f"<li>{_swatch(style)}{_escaped(name)}</li>" for name, style in styles.items())
    return f'<ul class="legend">{items}</ul>' if items else ""


def _swatch(style: Style) -> str:
    return (
        '<svg width="28" height="12" aria-hidden="true"><line x1="1" y1="6" x2="27" y2="6" stroke-width="4" '
        f'stroke="{style.colour}" stroke-dasharray="{_DASH_ARRAYS[style.dash]}"/></svg>'
    )


# ---- Table ----------------------------------------------------------------------------------------------------------

Cell = Callable[[Run], str]


def _table(runs: Sequence[Run]) -> str:
    """Runs in rows; columns that say nothing of any of them are left out."""
    styles = run_styles(runs)
    columns: dict[str, Cell] = {
        "run": lambda run: f"{_swatch(styles[run.name])} {_escaped(run.name)}",
        "method": _method,
        "seed": lambda run: str(run.seed),
        "steps": lambda run: f"{run.steps:,}" if run.summary else f"{run.steps:,}, not finished",
        "test loss": _test_loss,
        "steps to uniform's loss": lambda run: _steps_to(run, runs),
        "compute, uniform = 1": lambda run: f"{run.summary.compute['relative']:.2f}" if run.summary else _NONE,
        "effective samples": lambda run: f"{run.summary.effective_sample_size:.1f}" if run.summary else _NONE,
        "trust": _trust,
        "t of trust": _trust_t,
        "steps without an answer": lambda run: _of_weighters(run, sum(line.get("fallback", 0) for line in run.lines)),
    }
    rows = {name: [cell(run) for run in runs] for name, cell in columns.items()}
    rows = {name: cells for name, cells in rows.items() if any(cell != _NONE for cell in cells)}
    text = {"method": ' class="text"'}
    head = "".join(f"<th{text.get(name, '')}>{name}</th>" for name in rows)
    lines = "\n".join(
        "<tr>" + "".join(f"<td{text.get(name, '')}>{cells[i]}</td>" for name, cells in rows.items()) + "</tr>"
        for i in range(len(runs))
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _method(run: Run) -> str:
    if run.summary is None:
        return _NONE
    said = [run.summary.method, run.summary.mode, *_beginning(run)]
    return _escaped(", ".join(part for part in said if part))


def _beginning(run: Run) -> list[str]:
    assert run.summary is not None
    beginning = {"pretaught": "pretaught", "none": "from scratch"}.get(run.summary.weighter_from, "")
    return [beginning, "frozen" if run.summary.role == "frozen" else ""]


def _test_loss(run: Run) -> str:
    """On all test samples; of a run that is not finished on those of the curves."""
    if run.summary is not None:
        return f"{run.summary.test_loss:.3f}"
    curve = run.curve("test_loss")
    return f"{curve[-1][2]:.3f} so far" if curve else _NONE


def _steps_to(run: Run, runs: Sequence[Run]) -> str:
    baseline = baseline_of(run, runs)
    if run.summary is None or baseline is None or baseline.summary is None:
        return _NONE
    steps = reached_uniform(run.summary, baseline.summary).steps
    return "never" if steps is None else f"{steps:,.0f}"


def _trust(run: Run) -> str:
    said = [line["trust"] for line in run.lines if "trust" in line and not line["fallback"]]
    return f"{100 * said[-1]:.0f} %" if said else _NONE


def _trust_t(run: Run) -> str:
    t = (run.summary.weighter or {}).get("trust_t") if run.summary else None
    return _NONE if t is None else f"{t:.1f}"


def _of_weighters(run: Run, value: int) -> str:
    """Of runs that ask a weighter."""
    return f"{value:,}" if any("position" in line for line in run.lines) else _NONE


def _escaped(text: str) -> str:
    return html.escape(text)
