"""What comes with the package: a weighter that was taught before, and the small reference that it was taught with."""

from __future__ import annotations

from pathlib import Path

from weighting_contract.export import PRETAUGHT as NAME  # of the reference, and of the initial parameters

__all__ = ["NAME", "reference_folder", "weighter_folder"]


def reference_folder() -> Path:
    """The folder of the packaged reference, with the files of `weighting_contract.reference`."""
    return Path(__file__).parent / "reference"


def weighter_folder() -> Path:
    """The folder of the packaged weighter, an export as any other."""
    return Path(__file__).parent / "weighter"
