"""The selection: its threshold against a plain sort, its draws against their probabilities, its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer_client.score.corpus import Corpus, Fields, count_documents, find_files
from trainer_client.score.select import find_threshold, keys, sortable, write_selection
from weighting_contract.errors import FailedPrecondition, InvalidArgument

VALUES = [-np.inf, -1e300, -1.5, -1e-310, 0.0, 1e-310, 0.3, 0.3, 0.3, 1.0, 1 + 1e-15, 7.0, 1e300, np.inf]


def weights_file(path: Path, weights: list[float | None], row_group_size: int = 7) -> Path:
    columns = {
        "id": [f"d{i}" for i in range(len(weights))],
        "row": list(range(1, len(weights) + 1)),
        "weight": pa.array(weights, pa.float32()),
    }
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def chosen(values: np.ndarray, scored: np.ndarray, share: float, pieces: int = 3) -> np.ndarray:
    """[n] bool, by the threshold."""

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from zip(np.array_split(sortable(values), pieces), np.array_split(scored, pieces), strict=True)

    threshold, ranked = find_threshold(stream, share), sortable(values)
    same = scored & (ranked == np.uint64(threshold.key))
    return (scored & (ranked > np.uint64(threshold.key))) | (same & (np.cumsum(same) <= threshold.equal))


def test_keys_are_ordered_as_the_numbers() -> None:
    ranked = sortable(np.array(VALUES))
    assert (np.diff(ranked.astype(object)) >= 0).all()
    assert [a == b for a, b in pairwise(ranked)] == [a == b for a, b in pairwise(VALUES)]


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.2, 0.5, 0.77, 1.0])
def test_the_threshold_chooses_what_a_sort_would(share: float) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([VALUES, generator.normal(size=500), generator.integers(0, 5, 200)])
    generator.shuffle(values)
    scored = generator.random(len(values)) < 0.9
    found = chosen(values, scored, share)
    count = max(1, round(share * scored.sum()))
    order = np.lexsort((np.arange(len(values)), -values))
    expected = [i for i in order if scored[i]][:count]
    assert sorted(np.flatnonzero(found)) == sorted(expected)


def test_nothing_scored_is_nothing_to_select() -> None:
    with pytest.raises(InvalidArgument, match="nothing to select"):
        chosen(np.array([np.nan]), np.array([False]), 0.5)


def test_draws_go_by_weight_without_replacement_and_by_the_seed(tmp_path: Path) -> None:
    weights: list[float | None] = [0.0, 1.0, 2.0, 5.0, None]
    path = weights_file(tmp_path / "w.parquet", weights, row_group_size=2)
    firsts = np.zeros(5)
    for seed in range(2000):
        ranked, scored = map(np.concatenate, zip(*keys(path, "resample", seed), strict=True))
        firsts[np.argmax(np.where(scored, ranked, 0))] += 1
    np.testing.assert_allclose(firsts / 2000, [0, 1 / 8, 2 / 8, 5 / 8, 0], atol=0.04)
    for way in ("top", "resample"):
        one, two = (np.concatenate([k for k, _ in keys(path, way, 3)]) for _ in range(2))
        np.testing.assert_array_equal(one[:4], two[:4])


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz", "s.parquet"])
def test_the_selection_is_of_the_tables_documents_and_the_same_every_time(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": f"text ä {i}", "key": f"d{i}"}) for i in range(40)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n")
    fields = Fields("text", "key")
    corpus = Corpus(count_documents(find_files([str(tmp_path / "c.jsonl")]), fields), fields, block_documents=9, seed=0)
    table = weights_file(tmp_path / "w.parquet", [float(i % 10) for i in range(40)])
    contents = []
    for _ in range(2):
        written = write_selection(
            table, corpus, tmp_path / name, text_field="text", way="top", share=0.15, seed=0, progress=lambda n: None
        )
        assert written == 6
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["c.jsonl", "w.parquet", name])
    if name == "s.jsonl":
        rows = [json.loads(line) for line in contents[0].decode().splitlines()]
        assert [r["id"] for r in rows] == ["d8", "d9", "d18", "d19", "d29", "d39"]
        assert rows[0] == {"id": "d8", "text": "text ä 8", "source": "", "weight": 8.0}
    weights_file(tmp_path / "w.parquet", [1.0] * 39)
    with pytest.raises(FailedPrecondition, match="has 39 documents where the input has 40"):
        write_selection(
            table, corpus, tmp_path / name, text_field="text", way="top", share=0.15, seed=0, progress=lambda n: None
        )
    assert (tmp_path / name).read_bytes() == contents[0]


def test_a_table_of_other_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    corpus = Corpus(
        count_documents(find_files([str(tmp_path / "c.jsonl")]), Fields()), Fields(), block_documents=9, seed=0
    )
    table = weights_file(tmp_path / "w.parquet", [1.0, 1.0])
    with pytest.raises(FailedPrecondition, match="it is of another corpus"):
        write_selection(
            table, corpus, tmp_path / "s.jsonl", text_field="text", way="top", share=1, seed=0, progress=lambda n: None
        )
    assert not (tmp_path / "s.jsonl").exists()
