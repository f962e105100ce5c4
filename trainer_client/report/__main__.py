"""`python -m trainer_client.report RUN_DIR...`: folders of runs in, one HTML file out, mistakes as sentences."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weighting_contract.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

_MISTAKE = 2
_ABOUT = """Shows how the data preferences of runs evolved, as one HTML file that opens without a network: weight or
share kept by source, length, loss and times seen, effective sample size, trust, the learning signal, and the losses."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a report.

    Returns:
        The exit code: 0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer_client.report", description=_ABOUT)
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a job's --out folder, or the folder of one run")
    parser.add_argument("--out", default="report.html", help="the file to write (default: report.html)")
    given = parser.parse_args(arguments)
    for package in ("plotly", "rich"):
        if importlib.util.find_spec(package) is None:
            print(
                f"trainer_client.report: it needs the package {package}, which is not installed: "
                "pip install 'weighbridge[report]'",
                file=sys.stderr,
            )
            return _MISTAKE
    from trainer_client.run.shell import in_shell

    return in_shell("trainer_client.report", lambda console: _write(given.folders, Path(given.out), console))


def _write(folders: Sequence[str], out: Path, console: Console) -> int:
    from trainer_client.report.page import page
    from trainer_client.report.runs import find_runs

    if out.is_dir() or not out.parent.is_dir():
        wrong = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise InvalidArgument(f"--out {out} {wrong}: name a file to write")
    runs = find_runs(folders)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page(runs), encoding="utf-8")
    partial.replace(out)
    said = f"{out}  [dim]{', '.join(run.name for run in runs)}; open it in a browser[/dim]"
    console.print(said, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
