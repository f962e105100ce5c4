"""A small durable store of blobs by URL: a folder of this machine, or an object store through fsspec.

Every blob is put whole or not at all, and is durable when `put` returns; several processes may use one store. Must not
know what the blobs mean.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import importlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from weighting_contract.errors import InvalidArgument
from weighting_contract.folder import sync

log = logging.getLogger(__name__)

ABANDONED_S = 3600.0  # a write that has been unfinished for so long is nobody's any more
_PART = re.compile(r"[0-9A-Za-z@][0-9A-Za-z@._-]*")
_UNFINISHED = ".tmp"
_S3_CALLS = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 3}}  # seconds, of an attempt


class Storage(abc.ABC):
    """Blobs by key; a key is one or more names with slashes between, each of letters, digits, ``@._-``.

    All methods raise OSError with the blob's URL in its message where the storage fails, is full, or refuses; and
    InvalidArgument for what is no key.
    """

    url: str

    @abc.abstractmethod
    def put(self, key: str, content: bytes | Iterable[bytes]) -> None:
        """Stores a blob, or replaces it. What fails leaves what was there.

        Args:
            key: of the blob.
            content: its bytes, or parts of them, which a folder writes as they come.
        """

    @abc.abstractmethod
    def create(self, key: str, content: bytes) -> None:
        """Stores a blob where there is none: of several who do so at the same time, one succeeds.

        Raises FileExistsError (an OSError) where there is one.
        """

    @abc.abstractmethod
    def get(self, key: str) -> bytes:
        """The blob's bytes. Raises FileNotFoundError (an OSError) where there is none."""

    @abc.abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every blob whose key begins with `prefix`, by key, in the keys' order."""

    @abc.abstractmethod
    def move(self, key: str, to: str) -> None:
        """Gives a blob another key. Raises FileNotFoundError where there is none."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Removes a blob; none is no error."""

    @abc.abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Removes every blob below `folder`, one after the other; none is no error."""

    @abc.abstractmethod
    def within(self, folder: str) -> Storage:
        """The part of this storage whose keys begin with `folder`/, as a storage of its own."""

    @abc.abstractmethod
    def where(self, key: str) -> str:
        """Path or URL of a blob, for people."""

    def local(self, key: str) -> Path | None:
        """The file or folder that a key is on this machine; None where it is none."""
        return None

    def unfinished(self, folder: str) -> list[str]:
        """Where writes below `folder` lie that were never finished, or are under way; for people."""
        return []

    def check(self) -> None:
        """Puts, reads and deletes a blob: raises OSError where the storage can't be used.

        One that does not hold `create`'s promise can be used: it is a warning.
        """
        key, content = f"check-{uuid.uuid4().hex}", b"can this storage be used?"
        self.put(key, content)
        try:
            if self.get(key) != content:
                raise OSError(errno.EIO, "the storage gives back something else than was put", self.where(key))
            with contextlib.suppress(FileExistsError):
                self.create(key, content)
                log.warning(
                    "%s replaces what it is asked to create: of references that are uploaded under one name at the "
                    "same time it keeps the last",
                    self.url,
                )
        finally:
            self.delete(key)


def open_storage(place: Storage | str | os.PathLike[str]) -> Storage:
    """The storage at a path, file:///DIR or s3://BUCKET/PREFIX; nothing is read or made yet. A storage is itself.

    Raises:
        InvalidArgument: a URL of another kind, or the package that it needs is not installed.
    """
    if isinstance(place, Storage):
        return place
    text = os.fspath(place)
    if "://" not in text:
        return LocalStorage(Path(text))
    url = urlsplit(text)
    if url.scheme == "file" and not url.netloc and url.path.startswith("/"):
        return LocalStorage(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        return ObjectStorage(_s3(), f"s3://{url.netloc}{url.path}".rstrip("/"))
    raise InvalidArgument(f"the storage is {text!r}, expected a path, file:///DIR or s3://BUCKET/PREFIX")


class LocalStorage(Storage):
    """A folder, made when the first blob comes. Blobs survive a power loss at any point."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.url = str(root)

    def put(self, key: str, content: bytes | Iterable[bytes]) -> None:
        self._write(key, [content] if isinstance(content, bytes) else content, os.replace)

    def create(self, key: str, content: bytes) -> None:
        self._write(key, [content], _place_new)

    def _write(self, key: str, parts: Iterable[bytes], place: Callable[[Path, Path], None]) -> None:
        path = self._path(key)
        with _naming(path):
            _make_durably(path.parent)
            _remove_abandoned(path.parent)
            # Unique: another replica may be writing the same blob.
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
            try:
                with open(temporary, "xb") as file:
                    for part in parts:
                        file.write(part)
                        file.flush()
                    os.fsync(file.fileno())
                place(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)  # a full disk needs the space
            sync(path.parent)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with _naming(path):
            return path.read_bytes()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self._root
        with _naming(folder):
            for parent, _, names in os.walk(folder, onerror=_unless_gone):
                for name in names:
                    path = Path(parent, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(".") and not name.endswith(_UNFINISHED):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            found[key] = path.stat().st_size
        return dict(sorted(found.items()))

    def move(self, key: str, to: str) -> None:
        path, target = self._path(key), self._path(to)
        with _naming(path):
            _make_durably(target.parent)
            path.rename(target)
            sync(target.parent)
            sync(path.parent)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _naming(path):
            path.unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        path = self._path(folder)
        with _naming(path), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)

    def within(self, folder: str) -> Storage:
        return LocalStorage(self._path(folder))

    def where(self, key: str) -> str:
        return str(self._path(key))

    def local(self, key: str) -> Path | None:
        return self._path(key)

    def unfinished(self, folder: str) -> list[str]:
        path = self._path(folder)
        return sorted(map(str, path.glob(f"*{_UNFINISHED}"))) if path.is_dir() else []

    def _path(self, key: str) -> Path:
        _check_key(key)
        return self._root / key


class ObjectStorage(Storage):
    """A prefix in a bucket, through an fsspec file system whose `pipe_file` stores an object whole or not at all."""

    def __init__(self, filesystem: Any, url: str) -> None:
        self._filesystem = filesystem
        self.url = url

    def put(self, key: str, content: bytes | Iterable[bytes]) -> None:
        with _naming(self.where(key)):
            whole = content if isinstance(content, bytes) else b"".join(content)
            self._filesystem.pipe_file(self.where(key), whole)

    def create(self, key: str, content: bytes) -> None:
        with _naming(self.where(key)):
            try:
                self._filesystem.pipe_file(self.where(key), content, mode="create")
            except OSError as exc:  # stores say in many ways that there is one
                if not self._filesystem.exists(self.where(key)):
                    raise
                raise FileExistsError(errno.EEXIST, "there is one") from exc

    def get(self, key: str) -> bytes:
        with _naming(self.where(key)):
            content: bytes = self._filesystem.cat_file(self.where(key))
            return content

    def sizes(self, prefix: str = "") -> dict[str, int]:
        folder = self.where(prefix.rpartition("/")[0]) if "/" in prefix else self.url
        root = self.url.partition("://")[2] + "/"
        with _naming(folder):
            objects = self._filesystem.find(folder, detail=True)
        keys = {name.removeprefix(root): int(found["size"]) for name, found in objects.items()}
        return {key: keys[key] for key in sorted(keys) if key.startswith(prefix)}

    def move(self, key: str, to: str) -> None:
        with _naming(self.where(key)):
            self._filesystem.cp_file(self.where(key), self.where(to))
            self._filesystem.rm_file(self.where(key))

    def delete(self, key: str) -> None:
        with _naming(self.where(key)), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self.where(key))

    def delete_folder(self, folder: str) -> None:
        for key in self.sizes(f"{folder}/"):
            self.delete(key)

    def within(self, folder: str) -> Storage:
        return ObjectStorage(self._filesystem, self.where(folder))

    def where(self, key: str) -> str:
        _check_key(key)
        return f"{self.url}/{key}"


def _s3() -> Any:
    """Credentials, region and endpoint come from where all tools of AWS look (AWS_ENDPOINT_URL for other makers')."""
    try:
        importlib.import_module("s3fs")
        fsspec = importlib.import_module("fsspec")
    except ImportError as exc:
        raise InvalidArgument(
            f"storage at s3:// needs {exc.name}, which isn't installed here: pip install weighbridge[s3]"
        ) from exc
    # No caches: other replicas change what is there.
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, config_kwargs=_S3_CALLS)


def _check_key(key: str) -> None:
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise InvalidArgument(
            f"{key!r} is no key of a blob; expected names of letters, digits and @._- between slashes"
        )


@contextlib.contextmanager
def _naming(where: str | Path) -> Iterator[None]:
    """Turns what a storage raises into an OSError that names the blob."""
    try:
        yield
    except OSError as exc:
        kinds = (
            (FileNotFoundError, errno.ENOENT),
            (FileExistsError, errno.EEXIST),
            (PermissionError, errno.EACCES),
            (OSError, errno.EIO),
        )
        code = exc.errno or next(code for kind, code in kinds if isinstance(exc, kind))
        raise OSError(code, exc.strerror or str(exc), str(where)) from exc
    except Exception as exc:  # libraries of object stores have kinds of their own for: not reached, no credentials
        raise OSError(errno.EIO, f"{type(exc).__name__}: {exc}", str(where)) from exc


def _place_new(temporary: Path, path: Path) -> None:
    """Gives a file its name unless it is taken."""
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with open(path, "xb") as file:  # where there are no hard links; short blobs are written in one piece
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _unless_gone(exc: OSError) -> None:
    if not isinstance(exc, FileNotFoundError):
        raise exc


def _remove_abandoned(folder: Path) -> None:
    for leftover in folder.glob(f"*{_UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):  # finished, or removed by another replica
            if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                leftover.unlink()
                log.warning("%s was a write that was never finished; it is removed", leftover)


def _make_durably(folder: Path) -> None:
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)
