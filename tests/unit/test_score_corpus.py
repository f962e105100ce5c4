"""A corpus as a stream: every document once, in an order that can be taken up anywhere; what is wrong is named."""

from __future__ import annotations

import gzip
import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer_client.score.blocks import Ahead, windows_of
from trainer_client.score.corpus import Corpus, Fields, Record, count_documents, find_files
from weighting_contract.errors import FailedPrecondition, InvalidArgument

FIELDS = Fields()


def jsonl(path: Path, count: int, **more: object) -> Path:
    lines = "".join(json.dumps({"text": f"{path.stem} {i}", "n": i, **more}) + "\n" for i in range(count))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def table(path: Path, count: int, row_group_size: int) -> Path:
    columns = {"text": [f"{path.stem} {i}" for i in range(count)], "source": ["s"] * count}
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def corpus(*names: Path, block: int = 10, fields: Fields = FIELDS, seed: int = 0) -> Corpus:
    files = count_documents(find_files([str(name) for name in names]), fields)
    return Corpus(files, fields, block_documents=block, seed=seed)


def blocks(read: Corpus, first: int = 0) -> list[list[Record]]:
    return [list(block) for block in read.read(first)]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    (tmp_path / "one.txt").write_text("a text")
    return [
        jsonl(tmp_path / "a.jsonl", 40),
        jsonl(tmp_path / "b.jsonl.gz", 21),
        table(tmp_path / "c.parquet", 37, row_group_size=5),
        tmp_path / "one.txt",
    ]


def test_every_document_comes_once_and_every_block_has_each_files_share(mixed: list[Path]) -> None:
    read = corpus(*mixed)
    found = blocks(read)
    assert (read.documents, read.blocks, len(found)) == (99, 10, 10)
    records = list(chain.from_iterable(found))
    assert {(r.file, r.row) for r in records} == {
        *((str(mixed[0]), i) for i in range(1, 41)),
        *((str(mixed[1]), i) for i in range(1, 22)),
        *((str(mixed[2]), i) for i in range(1, 38)),
        (str(mixed[3]), 1),
    }
    assert len(records) == 99
    assert all(r.text == f"{Path(r.file).stem} {r.row - 1}" for r in records if r.file != str(mixed[3]))
    assert {sum(r.file == str(mixed[0]) for r in block) for block in found} == {4}
    assert {sum(r.file == str(mixed[2]) for r in block) for block in found} <= {3, 4}
    assert [read.documents_before(i) for i in range(11)] == np.cumsum([0, *map(len, found)]).tolist()


def test_reading_begins_at_any_block(mixed: list[Path]) -> None:
    read = corpus(*mixed)
    whole = blocks(read)
    for first in range(read.blocks):
        assert blocks(read, first) == whole[first:]


def test_many_files_are_dealt_to_lanes_by_the_seed(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"f{i:02d}.jsonl", 3 + i % 4) for i in range(50)]
    first, again, other = (blocks(corpus(*files, block=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    rows = {(r.file, r.row) for r in chain.from_iterable(first)}
    assert len(rows) == sum(3 + i % 4 for i in range(50)) == len(list(chain.from_iterable(first)))
    assert blocks(corpus(*files, block=30, seed=1), 3) == first[3:]


def test_rows_are_lines_of_the_file_and_fields_are_named_freely(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"body": "x", "key": 7, "from": "web"}\n\n{"body": "y \\ud800", "key": "k", "from": null}')
    one, two = chain.from_iterable(blocks(corpus(path, fields=Fields("body", "key", "from"))))
    assert one == Record(str(path), 2, "7", "web", "x")
    assert two == Record(str(path), 4, "k", None, "y ?")
    path.write_text('{"text": "x"}\n')
    assert next(corpus(path).read()).__next__().id == f"{path}:1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": "b', "a.jsonl, line 2 is not JSON.*ends in the middle of this line"),
        (b'{"body": "a"}\n', "a.jsonl, line 1 has no field text; its fields: body"),
        (b'{"text": "a"}\n{"text": 3}\n', "a.jsonl, line 2: text is int, expected a string"),
        (b'{"text": "a", "source": 3}\n', "a.jsonl, line 1: source is int"),
        (b"[]\n", "a.jsonl, line 1 is list"),
        (b'{"text": "\xff"}\n', "a.jsonl, line 1 is not UTF-8"),
        (b"\n \n", "holds no documents"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_before_it_is_read(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InvalidArgument, match=words):
        corpus(tmp_path / "a.jsonl")


def test_a_cut_archive_is_named_with_the_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl.gz", 500)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidArgument, match=r"a.jsonl.gz is damaged or cut off after line \d+"):
        corpus(path)


def test_other_mistakes_in_the_input(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", 3)
    with pytest.raises(InvalidArgument, match="is named twice"):
        find_files([str(path), str(tmp_path / "*.jsonl")])
    with pytest.raises(InvalidArgument, match=r"there is no file 'x\.jsonl'"):
        find_files(["x.jsonl"])
    with pytest.raises(InvalidArgument, match="has no column key; its columns: text, source"):
        corpus(table(tmp_path / "b.parquet", 2, 2), fields=Fields(id="key"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidArgument, match=r"c.parquet is not a Parquet file that can be read"):
        corpus(tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(InvalidArgument, match=r"d\.csv has an unknown form"):
        find_files([str(tmp_path / "d.csv")])


def test_a_mistake_in_the_middle_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", 30)
    lines = path.read_text().splitlines(keepends=True)
    lines[14] = "{}\n"
    path.write_text("".join(lines))
    with pytest.raises(InvalidArgument, match="line 15 has no field text; its fields: none"):
        blocks(corpus(path))


def test_a_file_that_loses_documents_while_it_is_read_is_refused(tmp_path: Path) -> None:
    read = corpus(jsonl(tmp_path / "a.jsonl", 30))
    jsonl(tmp_path / "a.jsonl", 20)
    with pytest.raises(FailedPrecondition, match="was changed while it was read: it had 30 documents"):
        blocks(read)


# ---- Windows, and the thread that makes them ahead ------------------------------------------------------------------


def test_windows_are_spread_over_a_document() -> None:
    ids = np.arange(100)
    assert windows_of(ids[:1], 10, 4) == []
    assert [w.tolist() for w in windows_of(ids[:7], 10, 4)] == [list(range(7))]
    assert [(w[0], w[-1]) for w in windows_of(ids, 10, 4)] == [(0, 9), (30, 39), (60, 69), (90, 99)]
    assert [(w[0], w[-1]) for w in windows_of(ids[:15], 10, 4)] == [(0, 9), (5, 14)]
    assert [(w[0], w[-1]) for w in windows_of(ids, 10, 1)] == [(0, 9)]
    assert all(w.base is None for w in windows_of(ids, 10, 4))


def test_what_is_made_ahead_comes_in_order_with_its_error_and_ends_when_it_is_left() -> None:
    def numbers() -> object:
        yield from range(3)
        raise InvalidArgument("no more")

    seen = []
    with Ahead(numbers(), "numbers") as ahead, pytest.raises(InvalidArgument, match="no more"):
        list(map(seen.append, ahead))
    assert seen == [0, 1, 2]
    made = []
    endless = (made.append(i) or i for i in iter(lambda: os.getpid(), None))
    with Ahead(endless, "endless") as ahead:
        assert next(iter(ahead)) == os.getpid()
    assert not ahead._thread.is_alive()
    assert len(made) < 10
