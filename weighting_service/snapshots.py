"""Snapshots of weighters: one safetensors file each, whole or not at all, verified before it is used.

Must not know what the tensors mean, nor where blobs lie. A snapshot only bounds replay; the update log is what a
weighter is made from. Several replicas may keep their snapshots in one storage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from weighting_contract.errors import FailedPrecondition, InvalidArgument, NotFound
from weighting_service import failpoints
from weighting_service.storage import Storage, open_storage

FORMAT = "weighbridge-snapshot-1"
SIZE_EVERY_S = 10.0  # how long a measured size holds
_UID = re.compile(r"[0-9A-Za-z_-]+")
_NAME = re.compile(r"([0-9]{12,})\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A weighter's state at `position`. `damaged` says where newer ones lie that could not be used."""

    position: int
    tensors: dict[str, Tensor]  # on the CPU, owned by the caller
    metadata: dict[str, Any]  # JSON values
    digest: str  # `state_digest` of it
    damaged: tuple[str, ...] = ()


class DamagedSnapshot(FailedPrecondition):
    """Bytes that are no snapshot, or not the one that they should be; the message says why."""


def state_digest(position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 in hex over position, metadata and every tensor's name, dtype, shape and bytes: all that a snapshot says.

    Raises:
        InvalidArgument: metadata that is not JSON.
    """
    return _digest(position, _json(metadata), {name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def parse(content: bytes, position: int) -> Snapshot:
    """The snapshot in the bytes of a file, verified. Raises DamagedSnapshot where it is not whole or of `position`."""
    try:
        views = safetensors.torch.load(content)
        header = _header(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DamagedSnapshot(f"it can't be read: {exc}") from exc
    if header.get("format") != FORMAT:
        raise DamagedSnapshot(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("position") != str(position):
        raise DamagedSnapshot(f"it says that it is of position {header.get('position')}, expected {position}")
    tensors = {name: views.pop(name).clone() for name in list(views)}  # aligned as torch does it
    text = header.get("metadata", "")
    digest = _digest(position, text, tensors)
    if header.get("sha256") != digest:
        raise DamagedSnapshot("its checksum does not match its content")
    return Snapshot(position, tensors, json.loads(text), digest)


class SnapshotStore:
    """Snapshots at <uid>/<position>.safetensors of a storage, of which a save keeps the `keep` newest that verify.

    Safe to call from any thread. Files that don't verify are evidence: they are neither overwritten nor removed.

    Args:
        storage: a storage, or the path or URL of one.
        keep: how many.

    Raises:
        InvalidArgument: `keep` is below 1; in all methods, a uid that can't name a folder.
    """

    def __init__(self, storage: Storage | str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise InvalidArgument(f"keep is {keep}; at least 1 snapshot must be kept")
        self._storage = open_storage(storage)
        self._keep = keep
        self._verified: set[str] = set()  # keys of snapshots that this process has read and found whole
        self._reported: set[str] = set()  # keys of damaged ones that the log has already
        self._size = (float("-inf"), 0)  # when it was measured, bytes

    def save(self, uid: str, position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
        """Stores the state at `position`, reads it back, and only then removes what is older than the kept ones.

        A snapshot that is there and verifies stays as it is: another replica has saved the same. Unless `chain` in its
        metadata is another than in `metadata`: then it is of another history, and is moved aside (NAME.superseded), as
        a damaged one is (NAME.damaged).

        Args:
            uid: of the weighter.
            position: 0 or more.
            tensors: copied first, from any device.
            metadata: JSON values.

        Returns:
            The `state_digest` of what was given, also where another replica's snapshot stays.

        Raises:
            OSError: it could not be stored (disk full, storage not reached) or does not read back; what was there
                stays.
            InvalidArgument: a negative position, or metadata that is not JSON.
        """
        if position < 0:
            raise InvalidArgument(f"position is {position}, expected 0 or more")
        key = _key(uid, position)
        content, digest = _serialised(position, tensors, metadata)
        if self._make_way(key, position, metadata.get("chain")):
            self._storage.put(key, _halves(content))
            try:
                parse(self._storage.get(key), position)
            except DamagedSnapshot as exc:
                where = self._storage.where(key)
                raise OSError(errno.EIO, f"the snapshot does not read back as it was written ({exc})", where) from exc
            except FileNotFoundError:
                if sum(later > position for later in self.positions(uid)) < self._keep:
                    raise
                return digest  # replicas that are ahead of this one keep newer ones by now
        self._verified.add(key)
        self._retire(uid, position)
        return digest

    def load_latest(self, uid: str, before: int | None = None) -> Snapshot | None:
        """The newest snapshot that verifies, of a position below `before` where it is given; None where there is none.

        Those that don't verify, or can't be read now, are logged as warnings and listed in `damaged`.

        Raises:
            OSError: the storage can't be reached, so that there may be one.
        """
        for leftover in self._storage.unfinished(_folder(uid)):
            log.warning("%s is a snapshot that was not finished; it is not used", leftover)
        damaged: list[str] = []
        unreadable: OSError | None = None
        for position in reversed(self.positions(uid)):
            if before is not None and position >= before:
                continue
            where = self._storage.where(_key(uid, position))
            try:
                return replace(self._read(uid, position)[1], damaged=tuple(damaged))
            except FileNotFoundError:
                continue  # another replica keeps newer ones by now
            except DamagedSnapshot as exc:
                log.warning("snapshot %s is damaged (%s); it is left in place, and an older one is tried", where, exc)
            except OSError as exc:
                log.warning("snapshot %s can't be read (%s); an older one is tried", where, exc)
                unreadable = exc
            damaged.append(where)
        if unreadable:
            raise unreadable
        return None

    def load(self, uid: str, position: int) -> Snapshot:
        """The snapshot at `position`.

        Raises:
            NotFound: there is none.
            DamagedSnapshot: it does not verify.
            OSError: the storage failed.
        """
        return self._at(uid, position)[1]

    def read_bytes(self, uid: str, position: int) -> bytes:
        """The file of the snapshot at `position`, verified: what `parse` takes. Raises as `load`."""
        return self._at(uid, position)[0]

    def positions(self, uid: str) -> list[int]:
        """Positions of the snapshots that are there, verified or not, oldest first. Raises OSError."""
        names = (key.rpartition("/")[2] for key in self._storage.sizes(f"{_folder(uid)}/"))
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def taught(self) -> list[str]:
        """Uids of the weighters that have a snapshot of a position above 0, verified or not. Raises OSError."""
        parts = (key.rpartition("/")[::2] for key in self._storage.sizes())
        return sorted({uid for uid, name in parts if (match := _NAME.fullmatch(name)) and int(match[1]) > 0})

    def oldest_verified(self, uid: str) -> int | None:
        """Position of the oldest snapshot that verifies, beyond which no log may be trimmed; None where none does.

        A snapshot is read once in a process's life for it. Raises OSError.
        """
        return next((position for position in self.positions(uid) if self._verifies(uid, position)), None)

    def delete(self, uid: str) -> None:
        """Removes all snapshots of a weighter, damaged ones too; none is no error. Raises OSError."""
        self._storage.delete_folder(_folder(uid))
        for keys in (self._verified, self._reported):
            keys.difference_update([key for key in list(keys) if key.startswith(f"{uid}/")])

    def size_bytes(self) -> int:
        """What all snapshots occupy, in bytes, as of at most `SIZE_EVERY_S` ago. Raises OSError."""
        measured, size = self._size
        if time.monotonic() - measured > SIZE_EVERY_S:
            size = sum(self._storage.sizes().values())
            self._size = (time.monotonic(), size)
        return size

    def _at(self, uid: str, position: int) -> tuple[bytes, Snapshot]:
        try:
            return self._read(uid, position)
        except FileNotFoundError as exc:
            raise NotFound(f"there is no snapshot of position {position}; there are {self.positions(uid)}") from exc
        except DamagedSnapshot as exc:
            raise DamagedSnapshot(f"snapshot {self._storage.where(_key(uid, position))} is damaged: {exc}") from exc

    def _read(self, uid: str, position: int) -> tuple[bytes, Snapshot]:
        key = _key(uid, position)
        content = self._storage.get(key)
        try:
            snapshot = parse(content, position)
        except DamagedSnapshot:
            self._verified.discard(key)
            raise
        self._verified.add(key)
        return content, snapshot

    def _make_way(self, key: str, position: int, chain: object) -> bool:
        """Whether a snapshot is to be written: not where the same is there. What is in its place is moved aside."""
        try:
            there = parse(self._storage.get(key), position)
        except FileNotFoundError:
            return True
        except DamagedSnapshot as exc:
            self._aside(key, "damaged", str(exc))
            return True
        other = there.metadata.get("chain")
        if chain is None or other is None or chain == other:
            return False
        self._aside(key, "superseded", f"it is of another history: its chain is {other}, now it is {chain}")
        return True

    def _aside(self, key: str, ending: str, reason: str) -> None:
        taken = self._storage.sizes(f"{key}.{ending}")
        aside = f"{key}.{ending}" if not taken else f"{key}.{ending}-{len(taken) + 1}"
        self._storage.move(key, aside)
        self._verified.discard(key)
        log.warning("snapshot %s is now %s: %s", self._storage.where(key), self._storage.where(aside), reason)

    def _verifies(self, uid: str, position: int) -> bool:
        """Only good verdicts are remembered: a damaged file may give way to a good one of another replica."""
        key = _key(uid, position)
        if key in self._verified:
            return True
        try:
            self._read(uid, position)
        except FileNotFoundError:
            return False
        except DamagedSnapshot as exc:
            if key not in self._reported:
                self._reported.add(key)
                log.warning("snapshot %s is damaged (%s); it is left in place", self._storage.where(key), exc)
            return False
        return True

    def _retire(self, uid: str, newest: int) -> None:
        """Removes what is older than the `keep` newest that verify, up to the one just saved.

        A later position is a damaged file, another history's, or a faster replica's: it neither counts nor goes.
        """
        kept = 0
        try:
            for position in reversed(self.positions(uid)):
                key, surplus = _key(uid, position), kept >= self._keep
                if surplus:
                    self._verified.discard(key)  # read once more: by now it may be evidence
                if position > newest or not self._verifies(uid, position):
                    continue
                kept += 1
                if surplus:
                    self._storage.delete(key)
                    self._verified.discard(key)
        except OSError as exc:  # the new one is safe, and the next save tries again
            log.warning("older snapshots of weighter %s were not removed: %s", uid, exc)


def _folder(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise InvalidArgument(f"weighter uid {uid!r} can't name a folder; expected letters, digits, - and _")
    return uid


def _key(uid: str, position: int) -> str:
    return f"{_folder(uid)}/{position:012d}.safetensors"


def _halves(content: bytes) -> Iterator[bytes]:
    middle = len(content) // 2
    yield content[:middle]
    failpoints.hit("during_snapshot_write")
    yield content[middle:]


def _serialised(position: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[bytes, str]:
    """(content of the file, digest)"""
    # Copies: the state may move on while it is written, and safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = _json(metadata)
    digest = _digest(position, text, copies)
    header = {"format": FORMAT, "position": str(position), "metadata": text, "sha256": digest}
    return safetensors.torch.save(copies, header), digest


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata))
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"the snapshot's metadata is not JSON: {exc}") from exc


def _header(content: bytes) -> dict[str, str]:
    """The strings that a safetensors file has in its header, which is JSON behind its length in 8 bytes."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return dict(header)


def _digest(position: int, metadata: str, tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(f"{FORMAT};{position};{len(metadata)};{metadata};".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
