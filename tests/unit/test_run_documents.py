"""Reading documents: every form on real files, and one clear sentence for each thing that can be wrong with them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from trainer_client.run.documents import Document, dataset_documents, read_documents
from weighting_contract.errors import InvalidArgument

ROWS = [{"text": "one\ntwo", "source": "a"}, {"text": "drei für vier"}]
EXPECTED = [Document("one\ntwo", "a"), Document("drei für vier", "pool")]


def write_jsonl(path: Path, rows: list[object]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    assert read_documents(write_jsonl(tmp_path / name, list(ROWS))) == EXPECTED


def test_blank_lines_and_blank_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "  \\n"}\n{"text": "b"}')
    assert [d.text for d in read_documents(str(path))] == ["a", "b"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["one\ntwo", "drei für vier"], "source": ["a", None], "n": [1, 2]}), path
    )
    assert read_documents(str(path)) == EXPECTED


def test_text_is_one_document_a_file(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("First.\n\nSecond: für.\n", "utf-8")
    assert read_documents(str(path)) == [Document("First.\n\nSecond: für.\n", "novel")]


def test_folder_glob_and_list_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    seen: list[tuple[int, int, str]] = []

    folder = read_documents(str(tmp_path), progress=lambda *args: seen.append(args))
    assert [d.text for d in folder] == ["a", "b", "c"]
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [d.text for d in read_documents(f"{tmp_path}/*.txt")] == ["b"]
    assert [d.text for d in read_documents(f"{tmp_path}/**/*.txt")] == ["b", "c"]
    assert [d.text for d in read_documents(f"{tmp_path}/sub/c.txt, {tmp_path}/a.jsonl")] == ["c", "a"]


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_text("both")
    assert [d.text for d in read_documents(str(tmp_path / "a,b.txt"))] == ["both"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', r"x\.jsonl, line 2 is not JSON: .*char \d+\)$"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not JSON: .*ends in the middle of this line"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "f\xc3', "line 2 is not UTF-8 text: .*ends in the middle of this line"),
        ("x.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is list, expected an object"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', "line 1 has no field text; its fields: body, id"),
        ("x.jsonl", b'{"text": 7}\n', "line 1: text is int, expected a string"),
        ("x.jsonl", b'{"text": "a", "source": 7}\n', "line 1: source is int, expected a string"),
        ("x.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8 text"),
        ("x.jsonl", b"", "holds no documents"),
        ("x.jsonl", b'{"text": " "}\n', "holds no documents"),
        ("x.jsonl.gz", b'{"text": "a"}\n', "damaged or cut off after line 0"),
        ("x.txt", b"abc\xff", "not UTF-8 text: .* at byte 3"),
        ("x.txt", b" \n", "holds no documents"),
        ("x.parquet", b"PAR1 but not really", "not a Parquet file that can be read"),
        ("x.csv", b"text\na\n", "unknown form: expected builtin, a .txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message) as error:
        read_documents(str(path))
    assert str(path) in error.value.message


def test_truncated_gzip_says_after_which_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    write_jsonl(path, [{"text": f"{i} {hash(i * i)}"} for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidArgument, match=r"damaged or cut off after line \d+"):
        read_documents(str(path))


def test_parquet_without_text_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(InvalidArgument, match="no column text; its columns: body, id"):
        read_documents(str(path))


def test_parquet_with_a_missing_text_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(InvalidArgument, match="row 2: text is NoneType, expected a string"):
        read_documents(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/absent.jsonl", "there is no file .*absent.jsonl"),
        ("absent.txt", "there is no file absent.txt"),
        ("./absent", "there is no file ./absent"),
        ("{tmp}/*.jsonl", "no file matches"),
        ("{tmp}/empty", "holds no .txt, .jsonl"),
        ("{tmp}/" + "x" * 300 + ".txt", "there is no file"),
        ("", "the name of the data is empty"),
    ],
)
def test_names_of_nothing(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match=message):
        read_documents(name.format(tmp=tmp_path))


def test_dataset_name_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InvalidArgument, match="somebody/texts is no file, and the package datasets"):
        read_documents("somebody/texts")


def test_dataset_that_cannot_be_loaded() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InvalidArgument, match="as a dataset it can't be loaded"):
        read_documents("no/such/data/set")  # not a possible name, so nothing is asked of a hub


def test_dataset_rows_become_documents() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a", "source": None}, {"text": "b", "source": "s"}])
    assert list(dataset_documents(rows, "somebody/texts:plain@train")) == [Document("a", "texts"), Document("b", "s")]
    with pytest.raises(InvalidArgument, match="x, row 1 has no field text; its fields: body"):
        list(dataset_documents(datasets.Dataset.from_list([{"body": "a"}]), "x"))


# ---- Grouped by another field ---------------------------------------------------------------------------------------

GROUPED = [
    {"text": "a", "source": "web", "year": 2020},
    {"text": "b", "year": "2021"},
    {"text": "c", "year": None},
    {"text": "d"},
    {"text": "e", "year": True},
]
GROUPS = ["2020", "2021", "no year", "no year", "True"]


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz"])
def test_another_field_takes_the_place_of_the_source(tmp_path: Path, name: str) -> None:
    found = read_documents(write_jsonl(tmp_path / name, list(GROUPED)), group_by="year")
    assert [(d.text, d.source) for d in found] == list(zip("abcde", GROUPS, strict=True))


def test_another_field_of_parquet_datasets_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "year": [2020, 2021, None]}), path)
    assert [d.source for d in read_documents(str(path), group_by="year")] == ["2020", "2021", "no year"]
    assert [d.source for d in read_documents(str(path), group_by="month")] == ["no month"] * 3
    assert [d.source for d in dataset_documents(GROUPED, "somebody/texts", "year")] == GROUPS
    (tmp_path / "novel.txt").write_text("First.")
    assert read_documents(str(tmp_path / "novel.txt"), group_by="year") == [Document("First.", "no year")]


def test_a_field_that_can_name_no_group_is_one_sentence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pool.jsonl", [{"text": "a", "tags": ["x"]}])
    with pytest.raises(
        InvalidArgument, match="line 1: tags, which documents are grouped by, is list, expected a string"
    ):
        read_documents(path, group_by="tags")
