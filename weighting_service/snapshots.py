"""Snapshots of weighters: one safetensors file each, whole or not at all, verified before it is used.

Must not know what the tensors mean. A snapshot only bounds replay; the update log is what a weighter is made from.
One process owns a folder of snapshots.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument

FORMAT = "weighbridge-snapshot-1"
_UID = re.compile(r"[0-9A-Za-z_-]+")
_NAME = re.compile(r"([0-9]{12,})\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A weighter's state at `position`. `damaged` lists newer files that did not verify and were passed over."""

    position: int
    tensors: dict[str, Tensor]  # on the CPU, owned by the caller
    metadata: dict[str, Any]  # JSON values
    damaged: tuple[Path, ...] = ()


class SnapshotStore:
    """Snapshots at `folder`/<uid>/<position>.safetensors, of which a save keeps the `keep` newest.

    Raises:
        InvalidArgument: `keep` is below 1, or a uid that can't name a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise InvalidArgument(f"keep is {keep}; at least 1 snapshot must be kept")
        self._folder = Path(folder)
        self._keep = keep

    def save(self, uid: str, position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Writes the state at `position`; it is on the disk, and read back, before an older one is removed.

        `tensors` are copied first, from any device; `metadata` holds JSON values.

        Raises:
            OSError: the file could not be written (disk full, permissions) or does not read back; what was there stays.
            InvalidArgument: a negative position, or metadata that is not JSON.
        """
        if position < 0:
            raise InvalidArgument(f"position is {position}, expected 0 or more")
        folder = self._folder_of(uid)
        content = _serialised(position, tensors, metadata)
        _make_durably(folder)
        path = folder / f"{position:012d}.safetensors"
        _write_durably(path, content)
        try:
            _read(path, position)
        except _Damaged as exc:
            raise OSError(errno.EIO, f"the snapshot does not read back as it was written ({exc})", str(path)) from exc
        self._retire(uid, position)
        return path

    def load_latest(self, uid: str) -> Snapshot | None:
        """The newest snapshot that verifies; None where there is none.

        Files that don't verify are logged as warnings, listed in `damaged`, and left where they are, as evidence.
        """
        folder = self._folder_of(uid)
        for leftover in sorted(folder.glob("*.tmp")):
            log.warning("%s is a snapshot that was not finished; it is not used", leftover)
        damaged: list[Path] = []
        for position in reversed(self.positions(uid)):
            path = folder / f"{position:012d}.safetensors"
            try:
                tensors, metadata = _read(path, position)
            except _Damaged as exc:
                log.warning("snapshot %s is damaged (%s); it is left in place, and an older one is tried", path, exc)
                damaged.append(path)
            else:
                return Snapshot(position, tensors, metadata, tuple(damaged))
        return None

    def positions(self, uid: str) -> list[int]:
        """Positions of the files that are there, verified or not, oldest first."""
        folder = self._folder_of(uid)
        if not folder.is_dir():
            return []
        return sorted(int(match[1]) for file in folder.iterdir() if (match := _NAME.fullmatch(file.name)))

    def delete(self, uid: str) -> None:
        """Removes all snapshots of a weighter; none is no error."""
        folder = self._folder_of(uid)
        if folder.exists():
            shutil.rmtree(folder)

    def _retire(self, uid: str, newest: int) -> None:
        """Removes what is older than the `keep` newest up to the one just verified, and unfinished files.

        A later position can only be a damaged file, or the state of another history: it neither counts nor goes.
        """
        folder = self._folder_of(uid)
        older = [position for position in self.positions(uid) if position < newest]
        for position in older[: max(0, len(older) - (self._keep - 1))]:
            (folder / f"{position:012d}.safetensors").unlink()
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def _folder_of(self, uid: str) -> Path:
        if not _UID.fullmatch(uid):
            raise InvalidArgument(f"weighter uid {uid!r} can't name a folder; expected letters, digits, - and _")
        return self._folder / uid


class _Damaged(Exception):
    """Why a file is not a snapshot that can be used."""


def _serialised(position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    # Copies: the state may move on while it is written, and safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    try:
        text = json.dumps(dict(metadata))
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"the snapshot's metadata is not JSON: {exc}") from exc
    header = {
        "format": FORMAT,
        "position": str(position),
        "metadata": text,
        "sha256": _digest(position, text, copies),
    }
    return safetensors.torch.save(copies, header)


def _read(path: Path, position: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a snapshot file that verifies. Raises _Damaged with the reason where it doesn't."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: what is verified must not be a mapping of a file that can still change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as exc:
        raise _Damaged(f"it can't be read: {exc}") from exc
    if header.get("format") != FORMAT:
        raise _Damaged(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("position") != str(position):
        raise _Damaged(f"it says that it is of position {header.get('position')}")
    text = header.get("metadata", "")
    if header.get("sha256") != _digest(position, text, tensors):
        raise _Damaged("its checksum does not match its content")
    metadata: dict[str, Any] = json.loads(text)
    return tensors, metadata


def _digest(position: int, metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over position, metadata and every tensor's name, dtype, shape and bytes: all that a snapshot says."""
    h = hashlib.sha256(f"{FORMAT};{position};{len(metadata)};{metadata};".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _make_durably(folder: Path) -> None:
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        _sync_folder(made.parent)


def _write_durably(path: Path, content: bytes) -> None:
    """`content` under the name `path`, whole, or not at all: also after a power loss at any point."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
