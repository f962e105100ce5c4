"""What a scoring leaves on disk: a Parquet file a block while it goes on, and one of all at the end.

    OUTPUT.parts/journal.json          what is scored and how, written once
    OUTPUT.parts/part-00000000.parquet, ...   whole blocks, in order, each written under another name and renamed
    OUTPUT                             the parts one after the other, the journal in its schema's metadata

A kill at any moment leaves whole files only, so how far a scoring came is how many parts there are. Knows nothing of
tokens or the service.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from trainer_client.flags import flag
from trainer_client.score.blocks import Block
from trainer_client.score.corpus import CorpusFile, FileState
from trainer_client.score.weighing import BlockScores
from weighting_contract.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from weighting_contract.folder import sync

FORMAT = 1
METADATA_KEY = b"weighbridge.score"
_ROWS_PER_GROUP = 1 << 17  # of the table
_COLUMNS = (
    ("id", pa.string()),
    ("file", pa.string()),
    ("row", pa.int64()),  # line or row of the file, from 1
    ("source", pa.string()),
    ("tokens", pa.int64()),  # of the whole document
    ("batch", pa.int64()),  # that it was weighed in; null: not scored
    ("position", pa.int64()),  # of the weighter
    ("weight", pa.float32()),  # mean 1 over the documents of its batch
    ("logit", pa.float32()),
)


@dataclass(frozen=True)
class Journal:
    """What a scoring is of: the same for all of its parts."""

    settings: dict[str, Any]  # `ScoreConfig.lasting`
    reference_checksum: str
    profile_checksum: str
    statistics: tuple[str, ...]  # names of the columns
    files: tuple[CorpusFile, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Journal:
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            files = tuple(CorpusFile(**file) for file in values.pop("files"))
            return cls(**{**values, "statistics": tuple(values["statistics"])}, files=files)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise InvalidArgument(f"{where} is of no scoring by this version ({exc!r}): --overwrite it") from exc

    def check_same(self, settings: dict[str, Any], files: Sequence[FileState], where: str) -> None:
        """Raises FailedPrecondition where a scoring of these settings and files is not this one."""
        for name, value in settings.items():
            if value != self.settings[name]:
                raise FailedPrecondition(
                    f"{flag(name)} is {_shown(value)}, but {where} was begun with {_shown(self.settings[name])}: give "
                    "the same to go on, or --overwrite to start anew"
                )
        known = [FileState(file.path, file.size, file.modified_ns) for file in self.files]
        if list(files) != known:
            different = next((f.path for f in (*files, *known) if f not in known or f not in files), "their order")
            raise FailedPrecondition(
                f"the input of {where} has changed ({different}): weights of the rest would not go with those that are "
                "there; bring it back, or start anew with --overwrite"
            )


class ScoreTable:
    """The files of one scoring."""

    def __init__(self, output: Path) -> None:
        self.output, self.parts = output, output.with_name(output.name + ".parts")

    @property
    def finished(self) -> bool:
        return self.output.exists()

    def check_free(self) -> None:
        """Raises AlreadyExists where there is a scoring, finished or not."""
        if self.output.exists():
            raise AlreadyExists(f"{self.output} exists: replace it with --overwrite, or select from it with --resume")
        if self.parts.exists():
            raise AlreadyExists(f"{self.parts} is an unfinished scoring: go on with --resume, or --overwrite it")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes away for as long as it is entered. Raises FailedPrecondition where there is one."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        path = self.output.with_name(f".{self.output.name}.lock")
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino  # else it was removed
            except BlockingIOError:
                mine = False
            if not mine:
                raise FailedPrecondition(f"another process is scoring into {self.output}: wait for it, or end it")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Whatever there is of an earlier scoring."""
        self.output.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def journal(self) -> Journal | None:
        """Of the scoring that is here; None: none."""
        path = self.parts / "journal.json"
        if self.output.exists():
            return Journal.from_json(_metadata(self.output).get(METADATA_KEY, b""), str(self.output))
        return Journal.from_json(path.read_text("utf-8"), str(path)) if path.exists() else None

    def begin(self, journal: Journal) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        _put(self.parts / "journal.json", lambda path: path.write_text(journal.to_json(), "utf-8"))

    def parts_done(self) -> int:
        """Blocks that are scored."""
        done = 0
        while self._part(done).exists():
            done += 1
        return done

    def last_position(self, done: int) -> int:
        """Of the weighter that scored the last part; -1: unknown."""
        positions = [int(p) for p in _read(self._part(done - 1))["position"].drop_null().to_numpy()] if done else []
        return max(positions, default=-1)

    def write(self, block: Block, scores: BlockScores, journal: Journal, first_batch: int) -> None:
        """Adds the next part; `first_batch` of the block is its first batch's number in the table."""
        unscored = scores.positions < 0
        columns: list[Any] = [
            *(block.ids, block.files, block.rows, block.sources, block.tokens),
            *(pa.array(values, mask=unscored) for values in (scores.batches + first_batch, scores.positions)),
            *(pa.array(values, mask=unscored) for values in (scores.weights, scores.logits)),
        ]
        if scores.statistics is not None:
            columns += [pa.array(np.ascontiguousarray(column), mask=unscored) for column in scores.statistics.T]
        table = pa.Table.from_arrays(
            [pa.array(c, t) if isinstance(c, list) else c for c, (_, t) in zip(columns, _fields(journal), strict=True)],
            schema=pa.schema(_fields(journal)),
        )
        _put(self._part(block.index), lambda path: parquet.write_table(table, path))

    def merge(self, journal: Journal, blocks: int, documents: int) -> Iterator[pa.Table]:
        """Puts the parts together to the output and removes them; yields each as it is taken.

        Raises:
            FailedPrecondition: a part is damaged, or they don't hold all documents.
        """
        schema = pa.schema(_fields(journal), {METADATA_KEY: journal.to_json().encode()})
        temporary, rows = self.output.with_name(f".{self.output.name}.tmp"), 0
        held: list[pa.Table] = []
        with parquet.ParquetWriter(temporary, schema) as writer:
            for block in range(blocks):
                part = _read(self._part(block))
                rows += len(part)
                yield part
                held.append(part)
                if sum(map(len, held)) >= _ROWS_PER_GROUP or block == blocks - 1:
                    writer.write_table(pa.concat_tables(held).cast(schema), row_group_size=_ROWS_PER_GROUP)
                    held = []
        if rows != documents:
            raise FailedPrecondition(f"{self.parts} holds {rows} documents, not {documents}: score with --overwrite")
        _put(self.output, lambda path: os.replace(temporary, path))

    def tidy(self) -> None:
        """Removes the parts of a finished scoring."""
        if self.finished:
            shutil.rmtree(self.parts, ignore_errors=True)

    def _part(self, block: int) -> Path:
        return self.parts / f"part-{block:08d}.parquet"


def _fields(journal: Journal) -> list[tuple[str, pa.DataType]]:
    return [*_COLUMNS, *((name, pa.float32()) for name in journal.statistics)]


def _read(path: Path) -> pa.Table:
    try:
        return parquet.read_table(path)
    except (OSError, pa.ArrowException) as exc:
        raise FailedPrecondition(
            f"{path} is missing or damaged ({exc}): delete it and those after it, and go on with --resume"
        ) from exc


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return dict(parquet.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException) as exc:
        raise InvalidArgument(f"{path} can't be read as Parquet: {exc}; replace it with --overwrite") from exc


def _put(path: Path, write: Any) -> None:
    """Has `write` fill a file under another name, which then takes its place, whole and durable."""
    temporary = path.with_name(f".{path.name}.new")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) or "nothing"
