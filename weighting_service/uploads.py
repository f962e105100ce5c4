"""Uploaded references as blobs of a storage that replicas share: read, verified, written; nothing is kept in memory.

A reference is <name>/reference.json, one of a tenant (named "tenant/name") @<tenant>/<name>/reference.json, which no
name without a tenant can be. All its files lie below that, in a folder named by the SHA-256 of this manifest, so that
several can be written at the same time; the manifest comes last, where there is none yet, and goes first: without it
there is no reference. (Earlier versions kept the files beside the manifest: such a reference is read as before.) Knows
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
        manifests = (key.rpartition("/") for key in self._storage.sizes() if key.endswith(f"/{MANIFEST}"))
        return {folder.removeprefix("@") for folder, _, _ in manifests if folder.count("/") == folder.startswith("@")}

    def fingerprint(self, name: str) -> str | None:
        """SHA-256 of the reference's manifest, and so of all of it; None where there is no such reference."""
        try:
            return _fingerprint(self._storage.get(f"{_folder(name)}/{MANIFEST}"))
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
            if folder := self._storage.local(self._contents(name, fingerprint)):
                return known_reference(name, folder, fingerprint)
            return self._fetched(name, fingerprint)
        except InvalidArgument:
            if self.fingerprint(name) == fingerprint:
                raise
            return None  # another replica deletes it now

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Stores the files of a reference, durable when this returns; what fails leaves no reference.

        Raises:
            FileExistsError: there is one of this name, and it stays as it is.
        """
        fingerprint = _fingerprint(files[MANIFEST])
        contents = f"{_folder(name)}/{fingerprint}"
        try:
            for file in (*CONTENT, MANIFEST):
                self._storage.put(f"{contents}/{file}", files[file])
            self._storage.create(f"{_folder(name)}/{MANIFEST}", files[MANIFEST])
        except OSError:
            with contextlib.suppress(OSError):
                if self.fingerprint(name) != fingerprint:  # else another replica has stored the very same
                    self._storage.delete_folder(contents)  # a full disk needs the space
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
        contents = self._contents(name, fingerprint)
        files = {}
        for file in FILES:
            with contextlib.suppress(FileNotFoundError):  # named by the check
                files[file] = self._storage.get(f"{contents}/{file}")
        check_reference(files, self._storage.where(contents))
        return known_reference(name, write_reference(folder, files), fingerprint)

    def _contents(self, name: str, fingerprint: str) -> str:
        """Key of the folder that holds the files of a reference: its own, or where earlier versions put them."""
        folder = _folder(name)
        own = f"{folder}/{fingerprint}"
        stored = self._storage.sizes(f"{folder}/")
        has_own = any(key.startswith(f"{own}/") for key in stored)
        beside = any(f"{folder}/{file}" in stored for file in CONTENT)
        return folder if beside and not has_own else own


def _fingerprint(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def _folder(name: str) -> str:
    return f"@{name}" if "/" in name else name
