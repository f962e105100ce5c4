"""The files of one thing in a folder, such as a reference or an exported weighter: read, and written for good.

Knows names, not what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from weighting_contract.errors import InvalidArgument


def read_files(folder: str | os.PathLike[str], names: Collection[str], missing: str) -> dict[str, bytes]:
    """Those of the named files that lie in the folder, by name; other files that lie there are left alone.

    Args:
        missing: what to say where there is no such folder.

    Raises:
        InvalidArgument: no such folder, or a file that can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidArgument(missing)
    files = {}
    for name in names:
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise InvalidArgument(f"{folder / name} can't be read: {exc.strerror or exc}") from exc
    return files


def write_durably(path: Path, content: bytes) -> None:
    """A new file whose content survives a power loss; its name does so after `sync` of the folder."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """After it the content of a file, or the names in a folder, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
