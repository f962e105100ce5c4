"""Chooses a share of the documents of a finished table, and writes them to a file that `datasets` loads.

Memory does not grow with the corpus: the threshold is found digit by digit, in four passes over the column of weights
that count 65,536 bins each (half a megabyte, for a billion documents too); another pass over table and corpus writes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from trainer_client.score.corpus import Corpus
from weighting_contract.errors import FailedPrecondition, InvalidArgument

_ROWS_AT_ONCE = 1 << 16
_ROWS_PER_GROUP = 1024  # of a selection in Parquet
_DIGIT_BITS = 16
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Threshold:
    """Documents with a larger key are chosen, and of those with this very key the first ones of the table."""

    key: int  # of `sortable`
    equal: int  # how many of those with this very key
    chosen: int  # in all


def keys(table: Path, way: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What documents are ranked by, some rows at a time: (key [n] uint64, scored [n] bool); the same every time.

    "top": the weight. "resample": log w + g, g of the standard Gumbel distribution: the largest k are a draw of k
    without replacement in proportion to the weights (Kool et al. 2019, arXiv 1903.06059). Weight 0 comes last.
    """
    generator = np.random.default_rng(seed)
    for batch in parquet.ParquetFile(table).iter_batches(_ROWS_AT_ONCE, columns=["weight"]):
        weights = batch["weight"].to_numpy(zero_copy_only=False).astype(np.float64)  # null: NaN
        ranked = weights
        if way == "resample":
            with np.errstate(divide="ignore"):
                ranked = np.log(weights) + generator.gumbel(size=len(weights))
        yield sortable(ranked), ~np.isnan(weights)


def sortable(values: np.ndarray) -> np.ndarray:
    """[n] uint64 that are ordered as the float64 are (IEEE 754: flip all bits of negative ones, else the sign)."""
    bits = np.ascontiguousarray(values, np.float64).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def find_threshold(stream: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], share: float) -> Threshold:
    """The threshold that chooses `share` of the scored documents, at least one, exactly.

    Args:
        stream: begins a pass over the keys.

    Raises:
        InvalidArgument: no document has a weight.
    """
    total = sum(int(scored.sum()) for _, scored in stream())
    if not total:
        raise InvalidArgument("all documents have fewer than two tokens and no weight: there is nothing to select")
    chosen = need = max(1, round(share * total))
    prefix = 0
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for values, scored in stream():
            digits = values[scored] >> np.uint64(shift)
            digits = digits[digits >> np.uint64(_DIGIT_BITS) == np.uint64(prefix)]
            counts += np.bincount((digits & np.uint64(len(counts) - 1)).astype(np.int64), minlength=len(counts))
        above = counts[::-1].cumsum()[::-1] - counts  # with a larger digit
        digit = int(np.flatnonzero(above + counts >= need)[-1])
        need -= int(above[digit])
        prefix = prefix << _DIGIT_BITS | digit
    return Threshold(prefix, need, chosen)


def write_selection(
    table: Path,
    corpus: Corpus,
    path: Path,
    *,
    text_field: str,
    way: str,
    share: float,
    seed: int,
    progress: Callable[[int], None],
) -> int:
    """Writes the chosen documents, in the order of the table: id, text, source ("" where there is none) and weight.

    The file is there whole or not at all.

    Args:
        table: of this corpus, finished.
        path: .jsonl, .jsonl.gz or .parquet.
        progress: called with the number of documents that were looked at.

    Returns:
        Documents written.

    Raises:
        FailedPrecondition: the table is of other documents. InvalidArgument: nothing to select.
    """
    if (rows := parquet.read_metadata(table).num_rows) != corpus.documents:
        raise FailedPrecondition(f"{table} has {rows} documents where the input has {corpus.documents}")
    threshold = find_threshold(lambda: keys(table, way, seed), share)
    documents = zip(_chosen(table, way, seed, threshold), _rows(table), chain.from_iterable(corpus.read()), strict=True)
    temporary = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with _writer(temporary, path.name, text_field) as writer:
        for number, (chosen, (name, row, weight), record) in enumerate(documents, start=1):
            if (record.id, record.row) != (name, row):
                raise FailedPrecondition(f"{table} has {name} where the input has {record.id}: it is of another corpus")
            if chosen:
                values = {"id": name, text_field: record.text, "source": record.source or "", "weight": weight}
                writer.write(values)
                written += 1
            if number % _ROWS_PER_GROUP == 0:
                progress(number)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return written


def _chosen(table: Path, way: str, seed: int, threshold: Threshold) -> Iterator[bool]:
    equal = threshold.equal
    for values, scored in keys(table, way, seed):
        same = scored & (values == np.uint64(threshold.key))
        first = same & (np.cumsum(same) <= equal)
        equal -= int(first.sum())
        yield from (first | (scored & (values > np.uint64(threshold.key)))).tolist()


def _rows(table: Path) -> Iterator[tuple[str, int, float | None]]:
    for batch in parquet.ParquetFile(table).iter_batches(_ROWS_AT_ONCE, columns=["id", "row", "weight"]):
        yield from zip(*(batch[name].to_pylist() for name in ("id", "row", "weight")), strict=True)


# ---- Forms of a selection -------------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, values: dict[str, Any]) -> None: ...

    def __enter__(self) -> _Writer: ...

    def __exit__(self, *exc: object) -> None: ...


def _writer(path: Path, name: str, text_field: str) -> _Writer:
    """A writer to `path` in the form that `name` ends with."""
    return _ParquetWriter(path, text_field) if name.endswith(".parquet") else _JsonlWriter(path, name.endswith(".gz"))


class _JsonlWriter:
    def __init__(self, path: Path, compressed: bool) -> None:
        self._open = ExitStack()
        raw: Any = self._open.enter_context(open(path, "wb"))  # noqa: SIM115
        if compressed:  # without name and time, so that equal selections are equal files
            raw = self._open.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        self._file = self._open.enter_context(io.TextIOWrapper(raw, "utf-8", newline="\n"))

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def __enter__(self) -> _JsonlWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()


class _ParquetWriter:
    def __init__(self, path: Path, text_field: str) -> None:
        kinds = {"id": pa.string(), text_field: pa.string(), "source": pa.string(), "weight": pa.float32()}
        self._schema = pa.schema(kinds)
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._held: list[dict[str, Any]] = []

    def write(self, values: dict[str, Any]) -> None:
        self._held.append(values)
        if len(self._held) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._held, self._schema))
        self._held = []

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._held:
            self._flush()
        self._writer.close()
