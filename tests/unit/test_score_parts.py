"""The files of a scoring: whole at any moment, put together in order, and only for one process at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from trainer_client.score.blocks import Block
from trainer_client.score.corpus import CorpusFile, FileState
from trainer_client.score.parts import Journal, ScoreTable
from trainer_client.score.weighing import BlockScores, check_position
from weighting_contract.errors import AlreadyExists, FailedPrecondition, InvalidArgument

FILE = CorpusFile("a.jsonl", 10, 1, 6)
JOURNAL = Journal({"seed": 0, "target": ["t"]}, "r", "p", ("loss_z",), (FILE,))


def block(index: int) -> Block:
    rows = list(range(3 * index + 1, 3 * index + 4))
    windows = [[np.array([1, 2])], [], [np.array([1])]]
    return Block(index, ["a.jsonl"] * 3, rows, [f"d{row}" for row in rows], ["s", None, None], [2, 0, 1], windows)


def scores(position: int) -> BlockScores:
    nan = np.float32(np.nan)
    return BlockScores(
        np.array([0.5, nan, 1.5], np.float32),
        np.array([-1, nan, 1], np.float32),
        np.array([0, -1, 0]),
        np.array([position, -1, position]),
        np.array([[1], [nan], [2]], np.float32),
    )


@pytest.fixture
def table(tmp_path: Path) -> ScoreTable:
    table = ScoreTable(tmp_path / "w.parquet")
    table.begin(JOURNAL)
    for index in range(2):
        table.write(block(index), scores(4 + index), JOURNAL, first_batch=10 * index)
    return table


def test_parts_become_one_table_whatever_an_interrupted_merge_left(table: ScoreTable) -> None:
    assert (table.journal(), table.parts_done(), table.last_position(2), table.last_position(0)) == (JOURNAL, 2, 5, -1)
    merging = table.merge(JOURNAL, 2, 6)
    next(merging)
    merging.close()
    assert not table.finished
    assert [len(part) for part in table.merge(JOURNAL, 2, 6)] == [3, 3]
    assert table.finished
    assert table.journal() == JOURNAL
    table.tidy()
    assert [path.name for path in table.output.parent.iterdir()] == ["w.parquet"]
    assert parquet.read_table(table.output).to_pydict() == {
        "id": [f"d{i}" for i in range(1, 7)],
        "file": ["a.jsonl"] * 6,
        "row": [1, 2, 3, 4, 5, 6],
        "source": ["s", None, None] * 2,
        "tokens": [2, 0, 1] * 2,
        "batch": [0, None, 0, 10, None, 10],
        "position": [4, None, 4, 5, None, 5],
        "weight": [0.5, None, 1.5] * 2,
        "logit": [-1.0, None, 1.0] * 2,
        "loss_z": [1.0, None, 2.0] * 2,
    }


def test_what_is_there_is_not_overwritten_by_accident(table: ScoreTable) -> None:
    with pytest.raises(AlreadyExists, match="unfinished scoring: go on with --resume"):
        table.check_free()
    list(table.merge(JOURNAL, 2, 6))
    with pytest.raises(AlreadyExists, match="exists: replace it with --overwrite"):
        table.check_free()
    table.remove()
    table.check_free()
    assert table.journal() is None


def test_damage_is_named(table: ScoreTable) -> None:
    with pytest.raises(FailedPrecondition, match="holds 6 documents, not 7"):
        list(table.merge(JOURNAL, 2, 7))
    part = table.parts / "part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(FailedPrecondition, match=r"part-00000001\.parquet is missing or damaged"):
        list(table.merge(JOURNAL, 2, 6))
    (table.parts / "journal.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"journal\.json is of no scoring by this version"):
        table.journal()
    parquet.write_table(parquet.read_table(table.parts / "part-00000000.parquet"), table.output)
    with pytest.raises(InvalidArgument, match=r"w\.parquet is of no scoring by this version"):
        table.journal()


def test_what_goes_on_must_be_the_same(table: ScoreTable) -> None:
    found = [FileState("a.jsonl", 10, 1)]
    JOURNAL.check_same(JOURNAL.settings, found, "here")
    with pytest.raises(FailedPrecondition, match="--target is nothing, but here was begun with t:"):
        JOURNAL.check_same({"seed": 0, "target": []}, found, "here")
    for changed in ([FileState("a.jsonl", 10, 2)], [], [FileState("a.jsonl", 11, 1)]):
        with pytest.raises(FailedPrecondition, match=r"the input of here has changed \(a\.jsonl\)"):
            JOURNAL.check_same(JOURNAL.settings, changed, "here")
    check_position(4, scores(4))
    check_position(-1, scores(0))
    with pytest.raises(
        FailedPrecondition, match="the weighter is at position 3, but earlier documents were scored at 4"
    ):
        check_position(4, scores(3))


def test_one_process_at_a_time(table: ScoreTable) -> None:
    with table.alone(), pytest.raises(FailedPrecondition, match="another process is scoring"), table.alone():
        pass
    with table.alone():
        pass
