"""An exported weighter as files: what they are called, what is in them, and what says that they are whole.

Services export weighters and start others from exports, clients and runs carry them, Python loads them: one format for
all, the packaged weighter's too. Knows bytes and folders; nothing of torch or of what the parameters mean.

| file              | content                                                                                      |
|-------------------|----------------------------------------------------------------------------------------------|
| config.json       | the spec, the position that it was exported at, and the checksums of itself and of the model |
| model.safetensors | the parameters                                                                               |
| README.md         | a card for people; nothing reads it, so it may be edited                                     |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weighting_contract.errors import InvalidArgument
from weighting_contract.folder import read_files, sync, write_durably
from weighting_contract.spec import WeighterSpec

FORMAT = 1
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (CONFIG, TENSORS)  # needed to start from
_EXPECTED = " and ".join(FILES)
PRETAUGHT = "pretaught"  # in place of an export: the one that comes with the service
EXPORT = "export:"  # in front of the checksum of an export that a weighter started from


@dataclass(frozen=True)
class ExportInfo:
    """What an export says about itself."""

    spec: WeighterSpec
    position: int  # of the weighter that was exported
    checksum: str  # SHA-256 of model.safetensors, in hex: equal exactly for equal parameters

    @property
    def initial(self) -> str:
        """What a weighter that starts from it has as `initial`."""
        return EXPORT + self.checksum


def build_export(spec: WeighterSpec, tensors: bytes, card: str, *, position: int) -> dict[str, bytes]:
    """The files of an export, for `write_export` or an upload.

    Args:
        tensors: content of model.safetensors.
        card: of README.md.
    """
    values = {
        "format": FORMAT,
        "position": position,
        "spec": spec.to_dict(),
        "model_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    config = json.dumps({**values, "sha256": _digest(values)}, indent=2) + "\n"
    return {CONFIG: config.encode(), TENSORS: tensors, CARD: card.encode()}


def check_export(files: Mapping[str, bytes], where: str) -> ExportInfo:
    """What the files say about themselves, once they are verified; `where` they come from is for messages.

    Exports of before there were checksums have none, and pass without.

    Raises:
        InvalidArgument: a file that is missing or none of an export's, was truncated or changed, or a config.json
            without a valid spec; one sentence that names it.
    """
    for name in files:
        if name not in (*FILES, CARD):
            raise InvalidArgument(f"{where}: {name!r} is no file of an exported weighter, expected {_EXPECTED}")
    for name in FILES:
        if name not in files:
            raise InvalidArgument(f"{where}: {name} is missing; an exported weighter is {_EXPECTED}")
    config = _config(files[CONFIG], where)
    checksum = hashlib.sha256(files[TENSORS]).hexdigest()
    expected = config.get("model_sha256", checksum)
    if checksum != expected:
        raise InvalidArgument(
            f"{where}: {TENSORS} has the checksum {checksum[:12]}..., but {CONFIG} names {str(expected)[:12]}...: it "
            "was truncated or changed, or belongs to another export; export or copy the weighter again"
        )
    try:
        spec = WeighterSpec.from_dict(config.get("spec"))
    except InvalidArgument as exc:
        raise InvalidArgument(f"{where}: {CONFIG} holds no spec of a weighter: {exc.message}") from exc
    position = config.get("position")
    if type(position) is not int or position < 0:
        raise InvalidArgument(f"{where}: {CONFIG} has position {position!r}, expected a whole number of 0 or more")
    return ExportInfo(spec, position, checksum)


def export_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The verified files of the export in a folder, without its card; other files that lie there are left alone.

    Raises:
        InvalidArgument: one sentence about the first thing that is wrong, as of `check_export`.
    """
    folder = Path(folder)
    files = read_files(folder, FILES, f"there is no exported weighter at {folder}: expected a folder with {_EXPECTED}")
    check_export(files, str(folder))  # names what is missing
    return files


def write_export(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> Path:
    """Puts the files of an export into `folder`, which is made where it is missing; the folder.

    An export that is there is replaced, other files are left alone. Its config.json goes first and comes last, and
    without it there is no export: whatever is interrupted, what can be read afterwards is whole.

    Raises:
        InvalidArgument: as of `check_export`; nothing was written.
        OSError: the disk refuses; an export that was there stays.
    """
    folder = Path(folder)
    check_export(files, "the export")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as temporary:
        for name, content in files.items():
            write_durably(Path(temporary) / name, content)
        with contextlib.suppress(FileNotFoundError):
            (folder / CONFIG).unlink()
        for name in sorted(files, key=lambda name: name == CONFIG):
            os.replace(Path(temporary) / name, folder / name)
    sync(folder)
    return folder


def _config(content: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
        given = config.pop("sha256", None) if isinstance(config, dict) else None
        digest = _digest(config)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"{where}: {CONFIG} is not JSON ({exc}); export or copy the weighter again") from exc
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InvalidArgument(
            f"{where}: {CONFIG} is not that of an exported weighter of format {FORMAT}, the one that this version reads"
        )
    if given not in (None, digest):
        raise InvalidArgument(
            f"{where}: {CONFIG} was changed since the weighter was exported, its checksum does not match; export or "
            "copy it again, and give what is to differ as a spec to the weighter that starts from it"
        )
    return config


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
