"""Folders of the service's models directory, by the names that specs may use."""

from __future__ import annotations

from pathlib import Path

from weighting_contract.errors import InvalidArgument


def model_folder(name: str, models_dir: Path | None, field: str) -> Path:
    """The folder `name` inside `models_dir`. Raises InvalidArgument where it isn't there or leads outside."""
    if models_dir is None:
        raise InvalidArgument(f"{field} is {name!r}, but this service has no models directory; start it with --models")
    root = models_dir.resolve()
    folder = (root / name).resolve()
    if root not in folder.parents or not folder.is_dir():
        raise InvalidArgument(f"{field} is {name!r}, expected the name of a folder in the service's models directory")
    return folder
