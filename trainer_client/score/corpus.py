"""A corpus on disk, read as a stream: which files it is, how many documents each holds, and the documents in a mixed
order that can be taken up anywhere.

One pass at the start counts the documents. So the order is known before it is read: the corpus is cut into blocks, and
each block takes from every file its share, in proportion to the files' sizes. (Of many files, those that are read one
after the other form a lane.) Knows nothing of tokens or the service.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from trainer_client.run.documents import data_files, json_object, numbered_lines
from weighting_contract.errors import FailedPrecondition, InvalidArgument

LANES = 16  # files that are open at once
_ROWS_AT_ONCE = 1024  # of a Parquet file
_BETWEEN_REPORTS = 1 << 14  # documents

Progress: TypeAlias = Callable[[int], None]  # documents counted so far
T = TypeVar("T")


@dataclass(frozen=True)
class FileState:
    """A file as it was found; a changed one has another size or time."""

    path: str
    size: int  # bytes
    modified_ns: int


@dataclass(frozen=True)
class CorpusFile(FileState):
    """A file of which the documents are counted."""

    rows: int


@dataclass(frozen=True)
class Fields:
    """Where a record keeps what is read of it."""

    text: str = "text"
    id: str = ""  # empty: ids are FILE:ROW
    source: str = "source"  # may be missing


@dataclass(frozen=True)
class Record:
    """One document."""

    file: str
    row: int  # its line or row in the file, from 1
    id: str
    source: str | None
    text: str


def find_files(names: Sequence[str]) -> list[FileState]:
    """The files that `names` (files, folders, globs) stand for. Raises InvalidArgument: none, or one of them twice."""
    paths = [path for name in names for path in data_files(name)]
    found: dict[str, FileState] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as exc:
            raise InvalidArgument(f"{path} can't be read: {exc.strerror or exc}") from exc
        if str(path) in found:
            raise InvalidArgument(f"the file {path} is named twice: its documents would be scored twice")
        found[str(path)] = FileState(str(path), status.st_size, status.st_mtime_ns)
    return list(found.values())


def count_documents(
    files: Sequence[FileState], fields: Fields, progress: Progress = lambda counted: None
) -> list[CorpusFile]:
    """The files with the number of their documents; one pass over all of them.

    Raises:
        InvalidArgument: a file that is damaged, cut off, or lacks a field in its first or last document; no documents.
    """
    counted: list[CorpusFile] = []
    total = 0
    for file in files:
        count, path, before = _form(file.path).count, Path(file.path), total
        rows = _guarded(file.path, lambda: count(path, fields, lambda rows: progress(before + rows)))  # noqa: B023
        counted.append(CorpusFile(file.path, file.size, file.modified_ns, rows))
        total += rows
        progress(total)
    if not total:
        raise InvalidArgument(f"the input ({', '.join(file.path for file in files[:3])}) holds no documents")
    return counted


class Corpus:
    """Counted files in a mixed order.

    Attributes:
        documents: in all.
        blocks: into which they are cut; every file is spread evenly over them.
    """

    def __init__(self, files: Sequence[CorpusFile], fields: Fields, *, block_documents: int, seed: int) -> None:
        """
        Args:
            block_documents: most documents of a block, up to one more a lane.
            seed: of the way in which more than `LANES` files are dealt to lanes.
        """
        order = range(len(files)) if len(files) <= LANES else np.random.default_rng(seed).permutation(len(files))
        dealt = [[files[i] for i in order[lane::LANES]] for lane in range(LANES)]
        self._lanes = [lane for lane in dealt if any(file.rows for file in lane)]
        self._fields = fields
        self._rows = [sum(file.rows for file in lane) for lane in self._lanes]
        self.documents = sum(self._rows)
        self.blocks = -(-self.documents // block_documents)

    def documents_before(self, block: int) -> int:
        """Documents of the blocks before this one."""
        return sum(self._starts(block))

    def read(self, first_block: int = 0) -> Iterator[Iterator[Record]]:
        """The documents of every block from `first_block`; each must be read to its end before the next.

        Raises:
            InvalidArgument: a record that can't be read, or lacks a field; FailedPrecondition: a file changed.
        """
        lanes = [self._lane(lane, skip) for lane, skip in zip(self._lanes, self._starts(first_block), strict=True)]
        for block in range(first_block, self.blocks):
            shares = [end - start for start, end in zip(self._starts(block), self._starts(block + 1), strict=True)]
            yield chain.from_iterable(islice(lane, share) for lane, share in zip(lanes, shares, strict=True))

    def _starts(self, block: int) -> list[int]:
        """Documents of each lane that come before a block."""
        return [rows * block // self.blocks for rows in self._rows]

    def _lane(self, files: Sequence[CorpusFile], skip: int) -> Iterator[Record]:
        for file in files:
            if skip >= file.rows:
                skip -= file.rows
                continue
            yield from self._checked(file, skip)
            skip = 0

    def _checked(self, file: CorpusFile, skip: int) -> Iterator[Record]:
        read = skip
        rows = _form(file.path).read(Path(file.path), self._fields, skip)
        while (record := _guarded(file.path, lambda: next(rows, None))) is not None:
            read += 1
            if read > file.rows:
                break
            yield record
        if read != file.rows:
            raise FailedPrecondition(f"{file.path} was changed while it was read: it had {file.rows} documents before")


# ---- Forms of files -------------------------------------------------------------------------------------------------


class _Form(Protocol):
    """How files of one kind are read."""

    def count(self, path: Path, fields: Fields, report: Progress) -> int:
        """How many documents there are; what can be told to be wrong without reading each of them is an error."""

    def read(self, path: Path, fields: Fields, skip: int) -> Iterator[Record]:
        """The documents but the first `skip`."""


class _Jsonl:
    def count(self, path: Path, fields: Fields, report: Progress) -> int:
        rows = 0
        last: tuple[int, bytes] | None = None
        for number, line in numbered_lines(path):
            if not line.strip():
                continue
            rows += 1
            last = number, line
            if rows == 1:
                self._record(path, fields, number, line)
            if rows % _BETWEEN_REPORTS == 0:
                report(rows)
        if last is not None:
            self._record(path, fields, *last)
        return rows

    def read(self, path: Path, fields: Fields, skip: int) -> Iterator[Record]:
        full = ((number, line) for number, line in numbered_lines(path) if line.strip())
        for number, line in islice(full, skip, None):
            yield self._record(path, fields, number, line)

    def _record(self, path: Path, fields: Fields, number: int, line: bytes) -> Record:
        where = f"{path}, line {number}"
        return _record(json_object(line, where), fields, str(path), number, where)


class _Text:
    def count(self, path: Path, fields: Fields, report: Progress) -> int:
        if fields.id:
            raise InvalidArgument(f"{path} is plain text, which has no field {fields.id} (--id-field)")
        return 1

    def read(self, path: Path, fields: Fields, skip: int) -> Iterator[Record]:
        if skip:
            return
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidArgument(f"{path} is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
        yield Record(str(path), 1, f"{path}:1", None, text)


class _Parquet:
    def count(self, path: Path, fields: Fields, report: Progress) -> int:
        file = _open_parquet(path)
        names = file.schema_arrow.names
        for name in filter(None, (fields.text, fields.id)):
            if name not in names:
                raise InvalidArgument(f"{path} has no column {name}; its columns: {', '.join(names)}")
        return int(file.metadata.num_rows)

    def read(self, path: Path, fields: Fields, skip: int) -> Iterator[Record]:
        file = _open_parquet(path)
        columns = [name for name in (fields.text, fields.id, fields.source) if name in file.schema_arrow.names]
        group, number = 0, 0
        while number + (rows := file.metadata.row_group(group).num_rows) <= skip:
            group, number = group + 1, number + rows
        groups = range(group, file.num_row_groups)
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=columns):
            for values in batch.to_pylist():
                number += 1
                if number > skip:
                    yield _record(values, fields, str(path), number, f"{path}, row {number}")


def _form(path: str) -> _Form:
    name = path.lower()
    return _Parquet() if name.endswith(".parquet") else _Text() if name.endswith(".txt") else _Jsonl()


def _open_parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path, pre_buffer=False)


def _guarded(path: str, work: Callable[[], T]) -> T:
    """The answer of `work`; what the disk or Arrow says against it as a sentence."""
    import pyarrow

    try:
        return work()
    except pyarrow.ArrowException as exc:
        raise InvalidArgument(f"{path} is not a Parquet file that can be read: {exc}") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path} can't be read: {exc.strerror or exc}") from exc


def _record(values: dict[str, Any], fields: Fields, path: str, number: int, where: str) -> Record:
    text = _field(values, fields.text, where)
    if not isinstance(text, str):
        raise InvalidArgument(f"{where}: {fields.text} is {type(text).__name__}, expected a string")
    name = f"{path}:{number}"
    if fields.id:
        given = _field(values, fields.id, where)
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise InvalidArgument(f"{where}: {fields.id} is {type(given).__name__}, expected a string or an integer")
        name = _clean(str(given))
    source = values.get(fields.source) if fields.source else None
    if source is not None and not isinstance(source, str):
        raise InvalidArgument(f"{where}: {fields.source} is {type(source).__name__}, expected a string")
    return Record(path, number, name, None if source is None else _clean(source), _clean(text))


def _field(values: dict[str, Any], name: str, where: str) -> Any:
    if name not in values:
        raise InvalidArgument(f"{where} has no field {name}; its fields: {', '.join(values) or 'none'}")
    return values[name]


def _clean(text: str) -> str:
    """Half a surrogate pair, which JSON can hold, as a question mark: neither tokenizers nor Arrow take it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
