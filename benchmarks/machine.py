"""What a figure was measured on and whether it reaches its goal; printed beside every one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "fastapi", "uvicorn", "numpy")


def describe() -> str:
    """Processor, cores, Python and package versions, on a few lines."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    hardware = f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    return f"{hardware}\nPython {platform.python_version()}, {versions}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def goal(value: float, most: float, form: str = "g") -> str:
    """The words that stand beside a figure that is to be at most `most`."""
    return f"(goal: at most {most:{form}}: {'reached' if value <= most else 'MISSED'})"


def goal_at_least(value: float, least: float, form: str = "g") -> str:
    """The words that stand beside a figure that is to be at least `least`."""
    return f"(goal: at least {least:{form}}: {'reached' if value >= least else 'MISSED'})"


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of measured values, 0 < q < 1."""
    return statistics.quantiles(values, n=1000, method="inclusive")[round(q * 1000) - 1]


@cache
def commit() -> str:
    """Of the work tree that runs, short, with a + where it differs from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"
