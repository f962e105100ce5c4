"""Uploaded references as blobs of a storage that replicas share: read, verified, written; nothing is kept in memory.

A reference lies at <name>/<file>, one of a tenant (named "tenant/name") at @<tenant>/<name>/<file>, which no name
without a tenant can be. Its reference.json is written last and removed first: without it there is no reference. Knows
bytes and folders; nothing of models.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from weighting_contract.errors import InvalidArgument
from weighting_contract.reference import (
    CONTENT,
    FILES,
    MANIFEST,
    ReferenceInfo,
    check_reference,
    read_counts,
    reference_files,
    write_reference,
)
from weighting_service.storage import Storage


@dataclass(frozen=True)
class Known:
    """A verified reference: the folder of this machine that it can be loaded from, and what it says about itself."""

    name: str
    folder: Path
    info: ReferenceInfo
    ngram_buckets: int
    fingerprint: str = ""  # of an upload; else it is the package's or the models directory's, and stays

    @property
    def uploaded(self) -> bool:
        return bool(self.fingerprint)


def known_reference(name: str, folder: Path, fingerprint: str = "") -> Known:
    """The reference in a folder. Raises InvalidArgument where it is damaged."""
    files = reference_files(folder)
    info = check_reference(files, str(folder))
    return Known(name, folder, info, len(read_counts(files).ngrams), fingerprint)


class Uploads:
    """Uploaded references of a storage, by name. Safe to call from any thread.

    All methods raise OSError where the storage fails, and InvalidArgument for what is no name.

    Args:
        storage: where they lie.
        cache: a folder for what was fetched from a storage that is not of this machine; needed for such a one.
    """

    def __init__(self, storage: Storage, cache: Path | None) -> None:
        self._storage = storage
        self._local = storage.local("any") is not None
        if cache is None and not self._local:
            raise InvalidArgument(f"references at {storage.url} need a cache folder on this machine; give one")
        self._cache = cache or Path()  # of no use to a local storage

    def names(self) -> set[str]:
        """Names of the references that are there, verified or not."""
        folders = (key.rpartition("/") for key in self._storage.sizes())
        return {folder.removeprefix("@") for folder, _, file in folders if file == MANIFEST and folder}

    def fingerprint(self, name: str) -> str | None:
        """SHA-256 of the reference's manifest, and so of all of it; None where there is no such reference."""
        try:
            return hashlib.sha256(self._storage.get(f"{_folder(name)}/{MANIFEST}")).hexdigest()
        except FileNotFoundError:
            return None

    def read(self, name: str) -> Known | None:
        """The reference, verified whole and ready to be loaded from its folder; None where there is none.

        Raises:
            InvalidArgument: it is damaged; the message says how.
        """
        fingerprint = self.fingerprint(name)
        if fingerprint is None:
            return None
        try:
            if folder := self._storage.local(_folder(name)):
                return known_reference(name, folder, fingerprint)
            return self._fetched(name, fingerprint)
        except InvalidArgument:
            if self.fingerprint(name) == fingerprint:
                raise
            return None  # another replica deletes it now

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Stores the files of a reference, durable when this returns; what fails leaves no reference."""
        try:
            for file in (*CONTENT, MANIFEST):
                self._storage.put(f"{_folder(name)}/{file}", files[file])
        except OSError:
            with contextlib.suppress(OSError):
                self.delete(name)  # a full disk needs the space
            raise

    def delete(self, name: str) -> None:
        """Removes a reference, whole or not; none is no error."""
        self._storage.delete(f"{_folder(name)}/{MANIFEST}")
        self._storage.delete_folder(_folder(name))

    def tidy(self, needed: Collection[Path]) -> None:
        """Removes what the cache holds beside the folders that are needed."""
        if not self._local and self._cache.is_dir():
            for folder in set(self._cache.iterdir()) - set(needed):
                shutil.rmtree(folder, ignore_errors=True)

    def _fetched(self, name: str, fingerprint: str) -> Known:
        """From the cache where it is intact there, else from the storage."""
        folder = self._cache / fingerprint
        if folder.is_dir():
            try:
                return known_reference(name, folder, fingerprint)
            except InvalidArgument:  # what counts is the storage
                shutil.rmtree(folder)
        files = {}
        for file in FILES:
            with contextlib.suppress(FileNotFoundError):  # named by the check
                files[file] = self._storage.get(f"{_folder(name)}/{file}")
        check_reference(files, self._storage.where(_folder(name)))
        return known_reference(name, write_reference(folder, files), fingerprint)


def _folder(name: str) -> str:
    return f"@{name}" if "/" in name else name
