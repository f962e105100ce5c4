"""The table that a user sees at the end: the runs of a job side by side. Knows summaries only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table

from trainer_client.run.report import RunSummary, loss_at_compute, reached_uniform

_NONE = "-"
_MOST_BESIDE = 6  # runs in columns
_CAPTION = (
    "by uniform's compute and loss: on the fixed samples of the curves\n"
    "share: in what was trained on, weight x count\n"
    "* over the last quarter of the steps; times in % of the steps'"
)

_HEADS_OF_MANY = {
    "test loss": "test\nloss",
    "loss at uniform's compute": "at equal\ncompute",
    "steps to uniform's loss": "steps to\nuniform's",
    "compute, uniform = 1": "compute",
}
_CAPTION_OF_MANY = (
    "at equal compute: once as much was spent as by uniform in all\n"
    "steps to uniform's: until the loss that uniform ends with\n"
    "both on the fixed samples of the curves; summary.json has all the rest"
)

Cell = Callable[[RunSummary], str]


def table(runs: dict[str, RunSummary], main: str) -> Table:
    """A rich table of the runs, the main one last; it fits into 80 columns with up to four runs, and with many.

    Many are rows, the best one first, with the few figures that they are compared by.
    """
    shown = [runs[label] for label in sorted(runs, key=lambda label: label == main)]
    return _beside(shown, runs.get("uniform")) if len(runs) <= _MOST_BESIDE else _beneath(shown, runs.get("uniform"))


def _beside(shown: list[RunSummary], uniform: RunSummary | None) -> Table:
    result = Table(title=_title(shown), title_justify="left", caption=_CAPTION, caption_justify="left")
    result.add_column("")
    for run in shown:
        result.add_column(run.label.replace("-", "-\n"), justify="right")

    def row(name: str, value: Cell) -> None:
        values = [value(run) for run in shown]
        if any(v != _NONE for v in values):
            result.add_row(name, *values)

    for name, value in _comparison(shown, uniform):
        row(name, value)
    result.add_section()
    for name in _names(r.shares_by_source for r in shown):
        row(f"share of {name}*", _share(name))
    row("effective samples*", lambda r: f"{r.effective_sample_size:.1f}")
    if any(r.weighter for r in shown):
        result.add_section()
        _add_service_rows(row)
    return result


def _beneath(shown: list[RunSummary], uniform: RunSummary | None) -> Table:
    title = f"{len(shown)} runs, of which {shown[-1].label} is the main one; seed {shown[0].seed}"
    result = Table(title=title, title_justify="left", caption=_CAPTION_OF_MANY, caption_justify="left")
    values = dict(_comparison(shown, uniform))
    cells = [(head, values[name]) for name, head in _HEADS_OF_MANY.items() if name in values]
    cells += _score_cells(shown)
    cells += [("trust", _trust)] * any(run.trust is not None for run in shown)
    cells += [("no\nanswer", _unanswered)] * any(run.fallback_steps for run in shown)
    result.add_column("", no_wrap=True)
    for name, _ in cells:
        result.add_column(name, justify="right")
    for run in sorted(shown, key=lambda run: run.test_loss):
        result.add_row(run.label, *(value(run) for _, value in cells))
    return result


def _comparison(shown: list[RunSummary], uniform: RunSummary | None) -> list[tuple[str, Cell]]:
    """What runs are compared by."""
    cells: list[tuple[str, Cell]] = [
        ("test loss", lambda r: f"{r.test_loss:.3f}"),
        ("validation loss", lambda r: f"{r.val_loss:.3f}"),
    ]
    if uniform and len(shown) > 1:
        cells += [
            ("loss at uniform's compute", lambda r: f"{loss_at_compute(r, uniform):.3f}"),
            ("steps to uniform's loss", lambda r: _number(reached_uniform(r, uniform).steps)),
            ("seconds to it", lambda r: _number(reached_uniform(r, uniform).seconds)),
        ]
    cells += [
        ("compute, uniform = 1", lambda r: f"{r.compute['relative']:.2f}"),
        ("wall time, s", lambda r: f"{r.wall_seconds:.0f}"),
    ]
    return cells + _score_cells(shown)


def _score_cells(shown: list[RunSummary]) -> list[tuple[str, Cell]]:
    scores = dict.fromkeys(key for r in shown for key in _task_scores(r))
    return [(f"{task} {metric}", _task_score(task, metric)) for task, metric in scores]


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
    row("trust at the end", _trust)
    row("scoring, s", lambda r: _time_share(r.score_seconds, r))
    row(
        "waiting for scores, s",
        lambda r: f"{r.wait_seconds:.1f}" if r.weighter and r.mode in ("select", "both") else _NONE,
    )
    row("teaching, s", lambda r: _time_share(r.meta_seconds, r))
    row("meta-updates", lambda r: _of(r, str(r.meta_updates)))
    row("  degenerate", lambda r: _of(r, str(r.meta_updates_skipped or _NONE)))
    row("  acknowledged", _acknowledged)
    row("steps without an answer", _unanswered)


def _trust(run: RunSummary) -> str:
    return _NONE if run.trust is None else f"{run.trust:.2f}"


def _unanswered(run: RunSummary) -> str:
    return _of(run, str(run.fallback_steps))


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
