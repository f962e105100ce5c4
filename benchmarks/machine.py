"""What a figure was measured on; printed beside every one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
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


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of measured values, 0 < q < 1."""
    return statistics.quantiles(values, n=1000, method="inclusive")[round(q * 1000) - 1]
