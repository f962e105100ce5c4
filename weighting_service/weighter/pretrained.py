"""Weighters to and from folders, as `transformers` does it with models: `save_pretrained`, `from_pretrained`.

The one place of this package that reads and writes files, and only by the contract's functions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch

from weighting_contract.export import check_export, export_files, write_export
from weighting_service.weighter.export import load_parameters, weighter_files

if TYPE_CHECKING:
    from weighting_contract.spec import WeighterSpec
    from weighting_service.weighter.learner import Weighter


class Pretrained:
    """What makes a weighter one that can be saved and loaded."""

    if TYPE_CHECKING:

        def __init__(self, spec: WeighterSpec, *, device: torch.device, taught_before: bool) -> None: ...

    def save_pretrained(self, folder: str | os.PathLike[str], card: str = "") -> Path:
        """Writes the published state into `folder`, made where it is missing: what ExportWeighter gives; the folder.

        Args:
            folder: an export that is there is replaced as a whole, other files are left alone.
            card: Markdown on how the weighter was taught, for README.md.

        Raises:
            OSError: the disk refuses; an export that was there stays.
        """
        return write_export(folder, weighter_files(cast("Weighter", self), card))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """A new weighter, at position 0 with a fresh optimiser, with the spec and the parameters that `folder` holds.

        Args:
            folder: of `save_pretrained`, of ExportWeighter, of a run (`weighter-export`), or the packaged one.
            device: where it lives.

        Raises:
            InvalidArgument: a file is missing, was truncated or changed, or holds no weighter; one sentence names it.
        """
        files = export_files(folder)
        weighter = cls(check_export(files, str(folder)).spec, device=torch.device(device), taught_before=True)
        load_parameters(cast("Weighter", weighter), files, str(folder))
        return weighter
