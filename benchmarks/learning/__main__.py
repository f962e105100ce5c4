"""The command: runs what is not finished, then results, report and goals.

    python -m benchmarks.learning [--quick] [--texts DIR] [--out runs/learning] [--processes 2] [--known FILE]
    python -m benchmarks.learning --check [--results FILE]

The first runs the matrix of full.yaml (--quick: quick.yaml; --plan: any other), each run a process of one thread, and
goes on where it was stopped. With --known what a results.json has of the same flags and rate is not run again: use it
after a change that leaves those runs as they are, with --anew for the methods that it does not leave so. The second
reads the goals off a results.json and trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.learning.corpora import NEED_TEXTS, data_flags
from benchmarks.learning.execute import execute
from benchmarks.learning.figures import figures
from benchmarks.learning.goals import Goal, goals
from benchmarks.learning.plan import Plan, Run, load_plan
from benchmarks.learning.report import write_report
from benchmarks.learning.results import Results, best_rates, collect, known_losses, validation_losses

HERE = Path(__file__).parent
COMMITTED = HERE.parent / "results" / "learning.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a subset, at most 20 minutes on 2 cores")
    parser.add_argument("--plan", type=Path, help="a YAML file in place of full.yaml")
    parser.add_argument("--texts", type=Path, help="folder of books, wiki and web texts; without it those are left out")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--known", type=Path, help="a results.json whose runs and rates are taken as they are")
    parser.add_argument("--anew", nargs="+", default=(), metavar="METHOD", help="with --known: not of these methods")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument(
        "--check", action="store_true", help="only hold results against the goals; ends with 1 for a miss"
    )
    parser.add_argument("--results", type=Path, default=COMMITTED, help="for --check: a results.json")
    given = parser.parse_args()
    console = Console()
    if given.check:
        results = Results.read(given.results)
        found = list(goals(results, figures(results)))
        console.print(table(found))
        return int(not all(goal.reached for goal in found))
    plan = load_plan(given.plan or HERE / ("quick.yaml" if given.quick else "full.yaml"))
    known = (Results.read(given.known) if given.known else Results.none()).without(given.anew)
    return run(plan, given.out, given.texts, given.processes, console, known)


def run(plan: Plan, out: Path, texts: Path | None, processes: int, console: Console, known: Results) -> int:
    """Trains what is not `known`, collects and reports; 1 where a run failed."""
    left_out = [c for c in plan.corpora if c in NEED_TEXTS and texts is None]
    if left_out:
        console.print(f"left out, as --texts is not given: {', '.join(left_out)}")
    corpora = [c for c in dict.fromkeys((*plan.tuning_corpora, *plan.corpora)) if c not in left_out]
    data = {corpus: data_flags(corpus, out / "corpora", texts) for corpus in corpora}

    def those(runs: list[Run]) -> list[Run]:
        return [r for r in runs if r.corpus in data]

    failed = execute(
        [r for r in those(plan.tuning()) if f"{r.rate:g}" not in known_losses(plan, r.method, known)],
        lambda r: plan.command(r, r.rate or 0, data[r.corpus], out),
        out,
        processes,
        console,
        "tuning",
    )
    rates = validation_losses(plan, out, known)
    chosen = best_rates(plan, rates)
    failed += execute(
        [r for r in those(plan.runs(chosen)) if known.known(plan, r) is None],
        lambda r: plan.command(r, chosen[r.method], data[r.corpus], out),
        out,
        processes,
        console,
        "runs",
    )
    results = collect(plan, out, rates, chosen, known)
    results.write(out / "results.json")
    found = list(goals(results, figures(results)))
    report = write_report(results, figures(results), found, out / "report")
    console.print(table(found))
    console.print(f"{out / 'results.json'}\n{report}", highlight=False)
    for each, error in failed:
        console.print(f"[red]failed:[/red] {each.folder}: {error}", highlight=False, soft_wrap=True)
    return int(bool(failed))


def table(found: list[Goal]) -> Table:
    result = Table("figure", "measured", "goal", "", title="goals", title_justify="left")
    for goal in found:
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.bound:.3f}"
        result.add_row(goal.what, f"{goal.value:.3f}", bound, "[green]reached" if goal.reached else "[red]MISSED")
    return result


if __name__ == "__main__":
    sys.exit(main())
