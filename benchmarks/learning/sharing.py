"""One weighter for several jobs, for a larger model, and on top of other methods: runs, results, report and goals.

    python -m benchmarks.learning.sharing [--texts DIR] [--out runs/sharing]
    python -m benchmarks.learning.sharing --check [--results FILE]

Four jobs (two targets, each with two sizes of model) with a weighter each, two runs at a time; then the four at once,
teaching one weighter of one served service; then a fifth job that finds it taught, the larger models with what the
smaller ones taught, and selection from pools that DSIR and a loss have reduced before. A run that is finished is not
run again; jobs that share a weighter go on from their checkpoints, as the service does from its state. The second form
reads the goals off a results.json and trains nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.learning.__main__ import table
from benchmarks.learning.corpora import data_flags
from benchmarks.learning.execute import execute, finished
from benchmarks.learning.plan import Run
from benchmarks.learning.reduced import reduced_flags
from benchmarks.learning.sharing_figures import SharingResults, collect_sharing, sharing_goals
from benchmarks.learning.sharing_plan import SharingPlan, sharing_plan
from benchmarks.learning.sharing_report import write_sharing_report
from benchmarks.served import served

ATTEMPTS = 3  # of jobs that share: on two cores, a reference may take longer to load than opening a job waits
COMMITTED = Path(__file__).parent.parent / "results" / "sharing.json"

Command = Callable[..., list[str]]  # takes a run and more flags
Failed = list[tuple[Run, str]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.sharing", description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="folder of texts, for books as the second target; without it, pip's")
    parser.add_argument("--out", type=Path, default=Path("runs/sharing"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, but for the four that share")
    parser.add_argument("--sizes", nargs=2, default=("nano", "micro"), help="presets of the smaller and larger models")
    parser.add_argument("--steps", type=int, default=600, help="of every run")
    parser.add_argument("--lr", type=float, default=2e-3, help="of every run")
    parser.add_argument(
        "--check", action="store_true", help="only hold results against the goals; ends with 1 for a miss"
    )
    parser.add_argument("--results", type=Path, default=COMMITTED, help="for --check: a results.json")
    given = parser.parse_args()
    console = Console()
    if given.check:
        found = list(sharing_goals(SharingResults.read(given.results)))
        console.print(table(found))
        return int(not all(goal.reached for goal in found))
    small, large = given.sizes
    plan = sharing_plan("books" if given.texts else "pip", small, large, given.steps, given.lr)
    data = {job.corpus: data_flags(job.corpus, given.out / "corpora", given.texts) for job in plan.jobs}
    with console.status("reducing the built-in pool"):
        data |= reduced_flags(given.out / "corpora")
    return run(plan, data, given.out, given.processes, console)


def run(plan: SharingPlan, data: dict[str, tuple[str, ...]], out: Path, processes: int, console: Console) -> int:
    """Trains, collects and reports; `data` are the flags of each corpus. 1 where a run failed."""
    rate = plan.rates[0]

    def command(each: Run, *more: str) -> list[str]:
        return [*plan.command(each, rate, data[each.corpus], out), *more]

    failed = execute(plan.alone(), command, out, processes, console, "by themselves")
    failed += run_together(plan, command, out, console)
    after, lent = plan.after(), out / "lent"

    def with_taught(each: Run) -> list[str]:
        by = after[each]
        state = lend(out / by.folder / "weighters" if by else out / "service", lent / each.folder)
        return command(each, "--weighter", f"embedded://{state.resolve()}")

    ready = [each for each, by in after.items() if all(finished(out, b) for b in ([by] if by else plan.together()))]
    failed += execute(ready, with_taught, out, processes, console, "with a taught weighter")
    results = collect_sharing(plan, out)
    results.write(out / "results.json")
    found = list(sharing_goals(results))
    report = write_sharing_report(results, found, out / "report")
    console.print(table(found))
    console.print(f"{out / 'results.json'}\n{report}", highlight=False)
    for each, error in failed:
        console.print(f"[red]failed:[/red] {each.folder}: {error}", highlight=False, soft_wrap=True)
    return int(bool(failed))


def run_together(plan: SharingPlan, command: Command, out: Path, console: Console) -> Failed:
    """The jobs that teach one weighter, all at the same time, against a service of their own."""
    jobs, state = plan.together(), out / "service"
    if all(finished(out, each) for each in jobs):
        return []
    if not state.exists():  # what was taught is gone: all again
        for each in jobs:
            shutil.rmtree(out / each.folder, ignore_errors=True)
    with served(state) as url:

        def at_service(each: Run) -> list[str]:
            folder = out / each.folder
            begun = (folder / "config.json").is_file()
            return ["--resume", "--out", str(folder), "--weighter", url] if begun else command(each, "--weighter", url)

        return execute(jobs, at_service, out, len(jobs), console, "together", ATTEMPTS)


def lend(state: Path, copy: Path) -> Path:
    """A copy of the state of a service that has stopped: what is taught to one job is not taught to the next."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(state, copy)
    return copy


if __name__ == "__main__":
    sys.exit(main())
