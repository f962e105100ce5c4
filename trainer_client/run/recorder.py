"""The samples and weights that each step was trained with, on disk before they are used.

Makes a resumed run exact: a step that was trained after the last checkpoint is trained again with the samples and
weights that it had, whatever the weighter has learned since. Knows nothing of training or of the service.

The file: a header, then one record of fixed size a step, its checksum at the end. A record that a crash left
half-written is cut off when the file is opened again.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from weighting_contract.errors import InvalidArgument

_MAGIC = b"WBRECORD4\0\0\0"
_FAMILY = b"WBRECORD"


@dataclass(frozen=True)
class Record:
    """What the weighter said for one step."""

    step: int
    weights: np.ndarray  # [B] float32, mean 1; all 1 where the batch was selected
    kept: np.ndarray  # [B] int64, the batch as indices of the step's candidates; 0 to B - 1 where it is as drawn
    probes: int  # samples that were drawn evenly; they come first
    position: int
    fallback: bool
    trust: float  # the factor in [0, 1] that was on the logits
    taught: int  # meta-updates of this run that were handed over before the step was scored
    computed: int = 0  # candidates that a service's reference computed for it
    quarters: np.ndarray | None = None  # [B] int8, 0 to 3 by loss among the candidates; -1: not known. None: all -1


class Recorder:
    """Append-only record of a run, open for writing."""

    def __init__(self, path: Path, batch_size: int, candidates: int) -> None:
        """Opens or creates `path`.

        Args:
            batch_size: B, samples of a step.
            candidates: samples that these are chosen from, B where they are taken as drawn.

        Raises:
            InvalidArgument: it is the record of other sizes or of an earlier version, or no record.
        """
        self.path = path
        self._dtype = _record_dtype(batch_size, candidates)
        records, whole = _read(path, batch_size, candidates) if path.exists() else ([], 0)
        self._records = {r.step: r for r in records}
        self._file = open(path, "r+b" if whole else "w+b")  # noqa: SIM115 - lives as long as the recorder
        if whole:
            self._file.truncate(whole)
            self._file.seek(whole)
        else:
            self._file.write(_header(batch_size, candidates))
            self._file.flush()

    def get(self, step: int) -> Record | None:
        """The record of `step`, None where the step was never scored."""
        return self._records.get(step)

    def append(self, record: Record) -> None:
        """Writes `record` and hands it to the operating system, so that a killed process does not lose it."""
        row = np.zeros((), self._dtype)
        for name in ("step", "position", "fallback", "trust", "taught", "computed", "probes", "kept", "weights"):
            row[name] = getattr(record, name)
        row["quarters"] = -1 if record.quarters is None else record.quarters
        row["checksum"] = zlib.crc32(row.tobytes()[:-4])
        self._file.write(row.tobytes())
        self._file.flush()
        self._records[record.step] = record

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_records(path: Path, batch_size: int, candidates: int) -> list[Record]:
    """The whole records of a file, by step."""
    return sorted(_read(path, batch_size, candidates)[0], key=lambda r: r.step)


def _header(batch_size: int, candidates: int) -> bytes:
    return _MAGIC + batch_size.to_bytes(4, "little") + candidates.to_bytes(4, "little")


def _record_dtype(batch_size: int, candidates: int) -> np.dtype:
    return np.dtype(
        [
            ("step", "<i8"),
            ("position", "<i8"),
            ("fallback", "u1"),
            ("trust", "<f8"),
            ("taught", "<i8"),
            ("computed", "<u4"),
            ("probes", "<u4"),
            ("kept", "<u2" if candidates <= 1 << 16 else "<u4", (batch_size,)),
            ("quarters", "i1", (batch_size,)),
            ("weights", "<f4", (batch_size,)),
            ("checksum", "<u4"),
        ]
    )


def _read(path: Path, batch_size: int, candidates: int) -> tuple[list[Record], int]:
    """The whole records and the bytes that they and the header take; 0 for a file that broke off in its header."""
    content, header, dtype = path.read_bytes(), _header(batch_size, candidates), _record_dtype(batch_size, candidates)
    if content.startswith(_FAMILY) and not _MAGIC.startswith(content[: len(_MAGIC)]):
        raise InvalidArgument(f"{path} is the record of an earlier version, whose runs can't be continued")
    if len(content) < len(header):
        return [], 0
    if content[: len(header)] != header:
        raise InvalidArgument(
            f"{path} is not the record of a run with batches of {batch_size} samples out of {candidates}"
        )
    rows = np.frombuffer(content, dtype, count=(len(content) - len(header)) // dtype.itemsize, offset=len(header))
    records = []
    for row in rows:
        if zlib.crc32(row.tobytes()[:-4]) != int(row["checksum"]):
            break
        records.append(_record(row))
    return records, len(header) + len(records) * dtype.itemsize


def _record(row: np.void) -> Record:
    return Record(
        step=int(row["step"]),
        weights=row["weights"].copy(),
        kept=row["kept"].astype(np.int64),
        probes=int(row["probes"]),
        position=int(row["position"]),
        fallback=bool(row["fallback"]),
        trust=float(row["trust"]),
        taught=int(row["taught"]),
        computed=int(row["computed"]),
        quarters=row["quarters"].copy(),
    )
