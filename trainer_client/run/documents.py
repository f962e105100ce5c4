"""Documents from outside: text, JSONL and Parquet files, folders, globs and `datasets` names.

Knows nothing of tokens, splits or the built-in corpus. Whatever can't be read is one sentence with the file and line.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from weighting_contract.errors import InvalidArgument

Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, label

SOURCE = "source"  # the field that groups documents where nothing else is said

_FORMS = "builtin, a .txt, .jsonl, .jsonl.gz or .parquet file, a folder of those, a glob, or the name of a dataset"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from, or what else groups it; the source is for reports only."""

    text: str
    source: str


def read_documents(name: str, *, group_by: str = SOURCE, progress: Progress | None = None) -> list[Document]:
    """The documents of `name`: a file, a folder, a glob, several of them separated by commas, or a dataset's name.

    .txt: one document a file. .jsonl, .jsonl.gz: one JSON object a line. .parquet: one row each. Objects and rows have
    `text` and, if they like, `source`; without it the source is the file's stem. A dataset is
    NAME[:CONFIG][@SPLIT] (split: train), as the package `datasets` knows it; its source is NAME's last part.
    Texts that are only white space are left out.

    Args:
        group_by: another field whose text, number or truth value is taken for the source; `without(group_by)` where a
            document has none.

    Raises:
        InvalidArgument: no such file or dataset, unreadable, damaged, or without documents.
    """
    parts = [name] if os.path.exists(name) else [part.strip() for part in name.split(",")]
    documents = [document for part in parts for document in _read_part(part, group_by, progress)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InvalidArgument(f"{name} holds no documents: expected at least one text that is not empty")
    return documents


def without(group_by: str) -> str:
    """What a document without the field has for its source; of `source` itself, readers know better."""
    return f"no {group_by}"


def _read_part(part: str, group_by: str, progress: Progress | None) -> Iterator[Document]:
    if not part:
        raise InvalidArgument(f"the name of the data is empty: expected {_FORMS}")
    files = _files(part)
    if files is None:
        yield from _read_dataset(part, group_by)
        return
    for index, file in enumerate(files):
        yield from _read_file(file, group_by)
        if progress is not None:
            progress(index + 1, len(files), f"reading {part}")


# ---- Files ----------------------------------------------------------------------------------------------------------


def data_files(name: str) -> list[Path]:
    """The files that `name` (a file, a folder or a glob) stands for, in a fixed order. InvalidArgument: none."""
    expected = "expected a .txt, .jsonl, .jsonl.gz or .parquet file, a folder of those, or a glob"
    if not os.path.exists(Path(name).expanduser()) and not any(character in name for character in "*?["):
        raise InvalidArgument(f"there is no file {name!r}: {expected}")
    files = _files(name) or []
    for file in files:
        if _reader(file) is None:
            raise InvalidArgument(f"{file} has an unknown form: {expected}")
    return files


def _files(part: str) -> list[Path] | None:
    """The files that `part` names, in a fixed order; None where it can only be a dataset's name."""
    path = Path(part).expanduser()
    if os.path.isdir(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) is not None)
        if not files:
            raise InvalidArgument(f"the folder {part} holds no .txt, .jsonl, .jsonl.gz or .parquet file")
        return files
    if os.path.exists(path):  # unlike Path.exists, it takes names of any length
        return [path]
    if any(character in part for character in "*?["):
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise InvalidArgument(f"no file matches {part}")
        return files
    if _reader(path) is not None or part.startswith((".", "/", "~")):
        raise InvalidArgument(f"there is no file {part}: expected {_FORMS}")
    return None


def _reader(path: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}
    return next((reader for suffix, reader in readers.items() if path.name.lower().endswith(suffix)), None)


def _read_file(path: Path, group_by: str) -> Iterator[Document]:
    reader = _reader(path)
    if reader is None:
        raise InvalidArgument(f"{path} has an unknown form: expected {_FORMS}")
    try:
        yield from reader(path, group_by)
    except OSError as exc:
        raise InvalidArgument(f"{path} can't be read: {exc.strerror or exc}") from exc


def _read_text(path: Path, group_by: str) -> Iterator[Document]:
    try:
        yield Document(path.read_text("utf-8"), path.stem if group_by == SOURCE else without(group_by))
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{path} is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc


def _read_jsonl(path: Path, group_by: str) -> Iterator[Document]:
    stem = path.name.split(".jsonl")[0]
    for number, line in numbered_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield _document(json_object(line, where), stem, where, group_by)


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line of JSONL. Raises InvalidArgument, naming `where` it stands, for anything else."""
    end = "" if line.endswith(b"\n") else "; the file ends in the middle of this line"
    try:
        row = json.loads(line)
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{where} is not UTF-8 text: {exc.reason}{end}") from exc
    except ValueError as exc:
        raise InvalidArgument(f"{where} is not JSON: {exc}{end}") from exc
    if not isinstance(row, dict):
        raise InvalidArgument(f'{where} is {type(row).__name__}, expected an object like {{"text": "..."}}')
    return row


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl or .jsonl.gz, from 1, as they are read. Raises InvalidArgument where a .gz is cut off."""
    number = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        try:
            for line in file:
                number += 1
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise InvalidArgument(f"{path} is damaged or cut off after line {number}: {exc}") from exc


def _read_parquet(path: Path, group_by: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in ("text", group_by) if name in file.schema_arrow.names]
        if "text" not in columns:
            raise InvalidArgument(f"{path} has no column text; its columns: {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _document(row, path.stem, f"{path}, row {number}", group_by)
    except pyarrow.ArrowException as exc:
        raise InvalidArgument(f"{path} is not a Parquet file that can be read: {exc}") from exc


def _document(row: dict[str, Any], source: str, where: str, group_by: str) -> Document:
    if "text" not in row:
        raise InvalidArgument(f"{where} has no field text; its fields: {', '.join(row) or 'none'}")
    text, given = row["text"], row.get(group_by)
    if not isinstance(text, str):
        raise InvalidArgument(f"{where}: text is {type(text).__name__}, expected a string")
    if group_by == SOURCE:
        if given is not None and not isinstance(given, str):
            raise InvalidArgument(f"{where}: source is {type(given).__name__}, expected a string")
        return Document(text, given or source)
    if given is not None and not isinstance(given, str | int | float):
        raise InvalidArgument(
            f"{where}: {group_by}, which documents are grouped by, is {type(given).__name__}, expected a string, a "
            "number or a truth value"
        )
    return Document(text, without(group_by) if given in (None, "") else str(given))


# ---- Datasets -------------------------------------------------------------------------------------------------------


def _read_dataset(name: str, group_by: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as exc:
        raise InvalidArgument(
            f"{name} is no file, and the package datasets, which could know it by name, is not installed: "
            f"expected {_FORMS}; pip install 'weighbridge[datasets]' for the last"
        ) from exc
    rest, _, split = name.partition("@")
    path, _, config = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as exc:  # not found, no network, unknown config or split: the package raises many kinds
        raise InvalidArgument(f"{name} is no file, and as a dataset it can't be loaded: {exc}") from exc
    yield from dataset_documents(rows, name, group_by)


def dataset_documents(rows: Any, name: str, group_by: str = SOURCE) -> Iterator[Document]:
    """The documents of a loaded split: an iterable of rows with `text` and, if they like, the field `group_by`."""
    source = name.partition("@")[0].partition(":")[0].rsplit("/", 1)[-1]
    for number, row in enumerate(rows, start=1):
        yield _document(row, source, f"{name}, row {number}", group_by)
