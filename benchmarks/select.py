"""Selection against its goals: test loss from scratch, and steps of weighters that were taught elsewhere.

    python -m benchmarks.select --check [--texts DIR] [--out runs/select] [--processes 2]

Every figure comes from `python -m trainer_client.run` as users run it, its defaults unless said otherwise: 0.17 M
parameters, 600 steps of 32 x 64 tokens, M = 5. A job that is finished in --out is not run again. `--texts` names a
folder of books.jsonl.gz, wiki.jsonl.gz and web.jsonl.gz (a document with a `text` a line); without it the figures on
books and wiki are left out. Each figure is printed beside its goal; with `--check` the program ends with 1 where one is
not reached.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.mixtures import Mixture, clean_mixture, text_mixture
from trainer_client.run.report import RunSummary, reached_uniform

SEEDS = (0, 1, 2)
CLEAN_SEEDS = (0, 1)
CLEAN_LOSS = 1.003  # where nothing is to be gained, in that of uniform
CLEAN_TRUST = 0.1
OTHERS = {"books": 0.45, "wiki": 0.55}  # share of uniform's steps in which a weighter taught elsewhere gets there


@dataclass(frozen=True)
class Job:
    """One `python -m trainer_client.run`."""

    name: str  # of its folder
    flags: tuple[str, ...]
    after: str = ""  # name of the job whose weighter it uses


@dataclass(frozen=True)
class Figure:
    """A measured number and what it is to be at most."""

    what: str
    value: float
    at_most: float
    unit: str = "nats"

    @property
    def reached(self) -> bool:
        return self.value <= self.at_most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 where a goal is not reached")
    parser.add_argument("--texts", type=Path, help="folder of books, wiki and web texts")
    parser.add_argument("--out", type=Path, default=Path("runs/select"), help="folder of the jobs")
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, one core each")
    given = parser.parse_args()
    console = Console()
    console.print(describe(), highlight=False)
    folder = given.out / "corpora"
    corpora = {n: written(text_mixture(n, given.texts), folder / n) for n in OTHERS} if given.texts else {}
    clean = written(clean_mixture(), folder / "clean")
    run_all(jobs(corpora, clean, given.out), given.out, given.processes, console)
    figures = list(measured(given.out, corpora))
    console.print(table(figures))
    return int(given.check and not all(figure.reached for figure in figures))


def written(mixture: Mixture, folder: Path) -> tuple[str, ...]:
    """The flags of a run on a mixture, whose files are written."""
    flags = {"pool": "--data", "val": "--val", "test": "--test"}
    return tuple(part for name, path in mixture.write(folder).items() for part in (flags[name], str(path)))


def jobs(corpora: dict[str, tuple[str, ...]], clean: tuple[str, ...], out: Path) -> list[Job]:
    """Those that others need come first."""
    compare = ("--compare", "uniform", "dsir", "weight-scratch")
    scratch = ("--weighter-from", "none")
    found = [Job(f"builtin-{seed}", ("--seed", str(seed), *scratch, *compare, "select")) for seed in SEEDS]
    for seed in CLEAN_SEEDS:
        found.append(Job(f"clean-{seed}", (*clean, "--seed", str(seed), "--compare", "uniform")))
        found.append(Job(f"clean-{seed}-frozen", (*clean, "--seed", str(seed), "--role", "frozen")))
    lender = f"builtin-{SEEDS[0]}"
    for seed in SEEDS[1:] if corpora else ():  # one job after the other teaches the weighter that is lent
        name = f"builtin-taught-{seed}"
        found.append(Job(name, ("--seed", str(seed), *scratch, *state_flags(out, name)), after=lender))
        lender = name
    for name, flags in corpora.items():
        found.append(Job(f"{name}-0", (*flags, "--compare", "uniform", "dsir")))
        lent = ("--role", "frozen", *scratch, *state_flags(out, f"{name}-taught"))
        found.append(Job(f"{name}-taught", (*flags, *lent), after=lender))
        found.append(Job(f"{name}-frozen", (*flags, "--role", "frozen")))
    return found


def state_flags(out: Path, name: str) -> tuple[str, str]:
    """Of a job whose weighters lie in a folder of their own, to be lent to it and by it."""
    return "--weighter", f"embedded://{state_folder(out, name).resolve()}"


def state_folder(out: Path, name: str) -> Path:
    return out / f"{name}-state"


def run_all(todo: list[Job], out: Path, processes: int, console: Console) -> None:
    """Runs what is not finished; raises SystemExit where a job fails."""
    todo = [job for job in todo if not (out / job.name / "summary.json").is_file()]
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:

        def run(job: Job) -> None:
            task = bar.add_task(job.name)
            if job.after:
                lend_weighter(out, job.after, job.name)
            command = [sys.executable, "-m", "trainer_client.run", *job.flags, "--out", str(out / job.name)]
            done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{job.name} failed: {done.stderr}")
            bar.update(task, description=f"{job.name}: done", completed=100)
            if not console.is_terminal:
                console.print(f"{job.name}: done", highlight=False)

        with ThreadPoolExecutor(processes) as pool:
            while todo:
                waiting = {job.name for job in todo}
                wave = [job for job in todo if job.after not in waiting]
                todo = [job for job in todo if job.after in waiting]
                list(pool.map(run, wave))


def lend_weighter(out: Path, taught_by: str, name: str) -> None:
    """A copy of the weighters of a finished job: the next ones leave them as they are."""
    shutil.rmtree(state_folder(out, name), ignore_errors=True)
    own = state_folder(out, taught_by)
    shutil.copytree(own if own.is_dir() else out / taught_by / "weighters", state_folder(out, name))


def measured(out: Path, corpora: dict[str, tuple[str, ...]]) -> Iterator[Figure]:
    builtin = {seed: summaries(out / f"builtin-{seed}") for seed in SEEDS}
    for seed, runs in builtin.items():
        scratch, inside = runs["select-scratch"].test_loss, runs["weight-scratch"].test_loss
        yield Figure(f"built-in, seed {seed}: selection from scratch, DWM inside the batch being", scratch, inside)
        yield Figure(
            f"built-in, seed {seed}: pretaught, uniform being", runs["select"].test_loss, runs["uniform"].test_loss
        )
    # A run differs from another that is as good by up to 0.03, so seeds together say what is below what.
    ours, theirs = ([runs[name].test_loss for runs in builtin.values()] for name in ("select-scratch", "dsir"))
    yield Figure(
        f"built-in, mean of {pairs(ours, theirs)}: selection from scratch, DSIR being", fmean(ours), fmean(theirs)
    )
    for name, words in (("clean-{}", "pretaught"), ("clean-{}-frozen", "frozen")):
        folders = [out / name.format(seed) / "select" for seed in CLEAN_SEEDS]
        uniform = [RunSummary.read(out / f"clean-{seed}/uniform/summary.json").test_loss for seed in CLEAN_SEEDS]
        losses = [RunSummary.read(folder / "summary.json").test_loss for folder in folders]
        what = f"clean, mean of {pairs(losses, uniform)}: {words}"
        yield Figure(what, fmean(losses) / fmean(uniform), CLEAN_LOSS, "of uniform's")
        trust = fmean(last_trust(folder) for folder in folders)
        yield Figure(f"clean, trust in the last quarter: {words}", trust, CLEAN_TRUST, "of 1")
    for name in corpora:
        uniform = summaries(out / f"{name}-0")["uniform"]
        for kind, words in (("taught", "taught on the built-in corpus"), ("frozen", "the package's")):
            (run,) = summaries(out / f"{name}-{kind}").values()
            steps = reached_uniform(run, uniform).steps
            share = steps / uniform.steps if steps is not None else float("inf")
            yield Figure(f"{name}: steps to uniform's end, frozen, {words}", share, OTHERS[name], "of uniform's")


def pairs(ours: list[float], theirs: list[float]) -> str:
    """The losses seed by seed, for a line about their means."""
    return ", ".join(f"{x:.3f}/{y:.3f}" for x, y in zip(ours, theirs, strict=True))


def last_trust(run: Path) -> float:
    """Mean over the last quarter of a run's steps: that of a single step swings."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return fmean(json.loads(line)["trust"] for line in lines[-len(lines) // 4 :])


def summaries(folder: Path) -> dict[str, RunSummary]:
    return {path.parent.name: RunSummary.read(path) for path in sorted(folder.glob("*/summary.json"))}


def table(figures: list[Figure]) -> Table:
    result = Table("figure", "measured", "at most", "", "", title="selection", title_justify="left")
    for f in figures:
        verdict = "[green]reached" if f.reached else "[red]MISSED"
        result.add_row(f.what, f"{f.value:.3f}", f"{f.at_most:.3f}", f.unit, verdict)
    return result


if __name__ == "__main__":
    sys.exit(main())
