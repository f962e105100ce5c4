"""Uploads of one name beside each other: whoever fails, or deletes, touches nobody else's files."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.unit import reference_models as models
from weighting_contract.reference import write_reference
from weighting_service.storage import LocalStorage
from weighting_service.uploads import CURRENT, Uploads

FILES = models.reference()
OTHER = models.reference(seed=1)


class Scripted(LocalStorage):
    """A real folder, with something that happens before a blob is written."""

    def __init__(self, root: Path, before: Callable[[str], None]) -> None:
        super().__init__(root)
        self._before = before

    def put(self, key: str, content: bytes | Iterable[bytes]) -> None:
        self._before(key)
        super().put(key, content)

    def create(self, key: str, content: bytes) -> None:
        self._before(key)
        super().create(key, content)


def full(key: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", key)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("at", ["config.json", "reference.json", CURRENT])
def test_what_fails_leaves_nothing(tmp_path: Path, at: str) -> None:
    uploads = Uploads(Scripted(tmp_path, lambda key: full(key) if key.endswith(at) else None), None)
    with pytest.raises(OSError, match="No space left"):
        uploads.write("mine", FILES)
    assert files_of(tmp_path) == []
    assert uploads.names() == set()


@pytest.mark.parametrize("theirs", [FILES, OTHER])
def test_one_that_fails_leaves_the_other_ones_files(tmp_path: Path, theirs: dict[str, bytes]) -> None:
    other = Uploads(LocalStorage(tmp_path), None)

    def before(key: str) -> None:
        if key.endswith(CURRENT):
            other.write("mine", theirs)
            full(key)

    with pytest.raises(OSError, match="No space left"):
        Uploads(Scripted(tmp_path, before), None).write("mine", FILES)
    known = other.read("mine")
    assert known is not None
    assert {file: (known.folder / file).read_bytes() for file in theirs} == theirs
    assert files_of(tmp_path) == sorted([*theirs, CURRENT])


def test_a_delete_leaves_what_is_being_uploaded(tmp_path: Path) -> None:
    other = Uploads(LocalStorage(tmp_path), None)
    other.write("mine", OTHER)

    def before(key: str) -> None:
        if key.endswith(CURRENT):
            other.delete("mine")

    Uploads(Scripted(tmp_path, before), None).write("mine", FILES)
    known = other.read("mine")
    assert known is not None
    assert (known.folder / "reference.json").read_bytes() == FILES["reference.json"]


def test_one_whose_first_answer_was_lost_is_stored(tmp_path: Path) -> None:
    """The store has created the blob, and is asked for it again."""

    class Twice(LocalStorage):
        def create(self, key: str, content: bytes) -> None:
            super().create(key, content)
            super().create(key, content)

    uploads = Uploads(Twice(tmp_path), None)
    uploads.write("mine", FILES)
    assert uploads.read("mine") is not None
    with pytest.raises(FileExistsError):
        uploads.write("mine", FILES)


def test_names_of_both_layouts(tmp_path: Path) -> None:
    uploads = Uploads(LocalStorage(tmp_path), None)
    for name in ("current", "acme", "acme/current", "acme/reference.json"):
        uploads.write(name, FILES)
    write_reference(tmp_path / "older", FILES)
    write_reference(tmp_path / "@acme" / "older", OTHER)
    names = {"current", "acme", "acme/current", "acme/reference.json", "older", "acme/older"}
    assert uploads.names() == names
    for name in sorted(names):
        assert uploads.read(name) is not None
        uploads.delete(name)
        assert uploads.read(name) is None
    assert files_of(tmp_path) == []
