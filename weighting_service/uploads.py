"""Uploaded references as blobs of a storage that replicas share: read, verified, written; nothing is kept in memory.

The files of every upload lie in a folder of their own, <name>/<upload>/. Which upload is the reference of that name is
in the blob <name>/current, which is written last, where there is none yet, and removed first. So of several uploads at
the same time one is kept, and nobody touches another's files. A tenant's (named "tenant/name") lie at
@<tenant>/<name>/, which no name without a tenant can be. (Earlier versions kept the files at <name>/<file>, and wrote
reference.json last: such a reference is read as before.) Knows bytes and folders; nothing of models.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import time
import uuid
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
from weighting_service.storage import ABANDONED_S, Storage

log = logging.getLogger(__name__)

CURRENT = "current"
_UPLOAD = re.compile(r"\d{10}-[0-9a-f]{32}")  # when it began, seconds since 1970, and what makes it the only one


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
        keys = (key.rpartition("/") for key in self._storage.sizes())
        folders = {folder for folder, _, file in keys if file in (CURRENT, MANIFEST)}
        return {folder.removeprefix("@") for folder in folders if folder.count("/") == folder.startswith("@")}

    def fingerprint(self, name: str) -> str | None:
        """What tells the reference of a name from any other that it had or will have; None where there is none.

        Raises:
            InvalidArgument: it is damaged.
        """
        try:
            upload = self._storage.get(f"{_folder(name)}/{CURRENT}").decode(errors="replace")
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError):
                return hashlib.sha256(self._storage.get(f"{_folder(name)}/{MANIFEST}")).hexdigest()
            return None
        if not _UPLOAD.fullmatch(upload):
            where = self._storage.where(f"{_folder(name)}/{CURRENT}")
            raise InvalidArgument(f"{where} holds {upload[:40]!r}, which is no upload")
        return upload

    def read(self, name: str) -> Known | None:
        """The reference, verified whole and ready to be loaded from its folder; None where there is none.

        Raises:
            InvalidArgument: it is damaged; the message says how.
        """
        fingerprint = self.fingerprint(name)
        if fingerprint is None:
            return None
        try:
            if folder := self._storage.local(_contents(name, fingerprint)):
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
        upload = f"{int(time.time()):010d}-{uuid.uuid4().hex}"
        try:
            for file in (*CONTENT, MANIFEST):
                if file in files:  # a counted one has no model
                    self._storage.put(f"{_contents(name, upload)}/{file}", files[file])
            try:
                self._storage.create(f"{_folder(name)}/{CURRENT}", upload.encode())
            except FileExistsError:
                if self.fingerprint(name) != upload:  # else a store was asked twice, as the first answer was lost
                    raise
        except OSError:
            with contextlib.suppress(OSError):
                if self.fingerprint(name) == upload:
                    self._storage.delete(f"{_folder(name)}/{CURRENT}")
                self._storage.delete_folder(_contents(name, upload))  # a full disk needs the space
            raise

    def delete(self, name: str) -> None:
        """Removes a reference, whole or not; none is no error. What is being uploaded now is none yet, and stays."""
        try:
            fingerprint = self.fingerprint(name)
        except InvalidArgument:  # it names no upload
            fingerprint = None
            self._storage.delete(f"{_folder(name)}/{CURRENT}")
        if fingerprint and _UPLOAD.fullmatch(fingerprint):
            self._storage.delete(f"{_folder(name)}/{CURRENT}")
            self._storage.delete_folder(_contents(name, fingerprint))
        else:
            for file in (MANIFEST, *CONTENT):
                self._storage.delete(f"{_folder(name)}/{file}")

    def tidy(self, known: Collection[Known]) -> None:
        """Removes what nobody needs: uploads that were never finished, and what the cache holds beside these."""
        with contextlib.suppress(OSError):  # the next start tries again
            self._remove_unfinished({reference.fingerprint for reference in known})
        if not self._local and self._cache.is_dir():
            for folder in set(self._cache.iterdir()) - {reference.folder for reference in known}:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_unfinished(self, known: Collection[str]) -> None:
        for contents in {key.rpartition("/")[0] for key in self._storage.sizes()}:
            folder, _, upload = contents.rpartition("/")
            if not folder or not _UPLOAD.fullmatch(upload) or upload in known:
                continue
            with contextlib.suppress(InvalidArgument):
                old = time.time() - int(upload.partition("-")[0]) > ABANDONED_S
                if old and self.fingerprint(folder.removeprefix("@")) != upload:
                    log.warning(
                        "%s was an upload that was never finished; it is removed", self._storage.where(contents)
                    )
                    self._storage.delete_folder(contents)

    def _fetched(self, name: str, fingerprint: str) -> Known:
        """From the cache where it is intact there, else from the storage."""
        folder = self._cache / fingerprint
        if folder.is_dir():
            try:
                return known_reference(name, folder, fingerprint)
            except InvalidArgument:  # what counts is the storage
                shutil.rmtree(folder)
        contents = _contents(name, fingerprint)
        files = {}
        for file in FILES:
            with contextlib.suppress(FileNotFoundError):  # named by the check
                files[file] = self._storage.get(f"{contents}/{file}")
        check_reference(files, self._storage.where(contents))
        return known_reference(name, write_reference(folder, files), fingerprint)


def _contents(name: str, fingerprint: str) -> str:
    """Key of the folder that holds the files of a reference: its upload's, or where earlier versions put them."""
    return f"{_folder(name)}/{fingerprint}" if _UPLOAD.fullmatch(fingerprint) else _folder(name)


def _folder(name: str) -> str:
    return f"@{name}" if "/" in name else name
