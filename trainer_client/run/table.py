"""The table that a user sees at the end: the runs of a job side by side. Knows summaries only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table

from trainer_client.run.report import RunSummary, loss_at_compute, reached_uniform

_NONE = "-"
_CAPTION = (
    "by uniform's compute and loss: on the fixed samples of the curves\n"
    "share: in what was trained on, weight x count\n"
    "* over the last quarter of the steps; times in % of the steps'"
)

Cell = Callable[[RunSummary], str]


def table(runs: dict[str, RunSummary], main: str) -> Table:
    """A rich table of the runs, the main one last; with four runs it fits into 80 columns."""
    shown = [runs[label] for label in sorted(runs, key=lambda label: label == main)]
    result = Table(title=_title(shown), title_justify="left", caption=_CAPTION, caption_justify="left")
    result.add_column("")
    for run in shown:
        result.add_column(run.label.replace("-", "-\n"), justify="right")

    def row(name: str, value: Cell) -> None:
        values = [value(run) for run in shown]
        if any(v != _NONE for v in values):
            result.add_row(name, *values)

    row("test loss", lambda r: f"{r.test_loss:.3f}")
    row("validation loss", lambda r: f"{r.val_loss:.3f}")
    uniform = runs.get("uniform")
    if uniform and len(runs) > 1:
        row("loss at uniform's compute", lambda r: f"{loss_at_compute(r, uniform):.3f}")
        row("steps to uniform's loss", lambda r: _number(reached_uniform(r, uniform).steps))
        row("seconds to it", lambda r: _number(reached_uniform(r, uniform).seconds))
    row("compute, uniform = 1", lambda r: f"{r.compute['relative']:.2f}")
    row("wall time, s", lambda r: f"{r.wall_seconds:.0f}")
    for task, metric in dict.fromkeys(key for r in shown for key in _task_scores(r)):
        row(f"{task} {metric}", _task_score(task, metric))
    result.add_section()
    for name in _names(r.shares_by_source for r in shown):
        row(f"share of {name}*", _share(name))
    row("effective samples*", lambda r: f"{r.effective_sample_size:.1f}")
    if any(r.weighter for r in shown):
        result.add_section()
        _add_service_rows(row)
    return result


def _task_scores(run: RunSummary) -> dict[tuple[str, str], float]:
    """The scores of evaluation tasks by task and metric, without their standard errors."""
    tasks = (run.eval_scores or {}).items()
    return {(task, m): value for task, scores in tasks for m, value in scores.items() if "_stderr" not in m}


def _task_score(task: str, metric: str) -> Cell:
    def cell(run: RunSummary) -> str:
        score = _task_scores(run).get((task, metric))
        return _NONE if score is None else f"{score:.3f}"

    return cell


def _title(shown: list[RunSummary]) -> str:
    *others, main = (run.label for run in shown)
    return f"{main}{' against ' if others else ''}{', '.join(others)}; seed {shown[0].seed}"


def _add_service_rows(row: Callable[[str, Cell], None]) -> None:
    row("trust at the end", lambda r: _NONE if r.trust is None else f"{r.trust:.2f}")
    row("scoring, s", lambda r: _time_share(r.score_seconds, r))
    row(
        "waiting for scores, s",
        lambda r: f"{r.wait_seconds:.1f}" if r.weighter and r.mode in ("select", "both") else _NONE,
    )
    row("teaching, s", lambda r: _time_share(r.meta_seconds, r))
    row("meta-updates", lambda r: _of(r, str(r.meta_updates)))
    row("  degenerate", lambda r: _of(r, str(r.meta_updates_skipped or _NONE)))
    row("  acknowledged", _acknowledged)
    row("steps without an answer", lambda r: _of(r, str(r.fallback_steps)))


def _names(sources: Iterable[dict[str, float]]) -> list[str]:
    return list({name: None for each in sources for name in each})


def _share(name: str) -> Cell:
    return lambda run: f"{100 * run.shares_by_source.get(name, 0):.0f} %"


def _of(run: RunSummary, text: str) -> str:
    """For runs with a weighter only."""
    return text if run.weighter else _NONE


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _acknowledged(run: RunSummary) -> str:
    if run.weighter is None:
        return _NONE
    counts = run.weighter["client"]
    return f"{counts['updates_acknowledged']} of {counts['updates_sent']}"


def _time_share(seconds: float, run: RunSummary) -> str:
    return _of(run, f"{seconds:.1f} ({100 * seconds / run.train_seconds:.0f} %)")
