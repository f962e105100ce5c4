"""The built-in corpus of this interpreter: deterministic, mixed as documented, and with splits that share nothing."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from trainer_client.run import builtin_corpus
from trainer_client.run.builtin_corpus import BuiltinCorpus, shingles
from trainer_client.run.documents import Document
from weighting_contract.errors import InvalidArgument


@pytest.fixture(scope="module")
def corpus() -> BuiltinCorpus:
    return builtin_corpus.build()


def size(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text) for document in documents)


def test_two_builds_are_equal(corpus: BuiltinCorpus) -> None:
    assert builtin_corpus.build() == corpus


def test_the_pool_is_mixed_as_documented(corpus: BuiltinCorpus) -> None:
    characters: Counter[str] = Counter()
    for document in corpus.train:
        characters[document.source] += len(document.text)
    shares = {source: count / characters.total() for source, count in characters.items()}
    assert shares == pytest.approx({"prose": 0.20, "code": 0.35, "tables": 0.20, "noise": 0.25}, abs=0.01)
    assert characters.total() == pytest.approx(builtin_corpus.POOL_CHARACTERS, rel=0.01)


def test_held_out_documents_are_prose(corpus: BuiltinCorpus) -> None:
    for held_out in (corpus.validation, corpus.test):
        assert {document.source for document in held_out} == {"prose"}
        assert size(held_out) > 0.9 * builtin_corpus.HELD_OUT_CHARACTERS
        assert len(held_out) >= 10


def test_splits_share_no_document_and_no_run_of_words(corpus: BuiltinCorpus) -> None:
    splits = [corpus.train, corpus.validation, corpus.test]
    texts = [{document.text for document in split} for split in splits]
    runs = [set().union(*(shingles(document.text) for document in split)) for split in splits]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not texts[a] & texts[b]
        assert not runs[a] & runs[b]


def test_noise_is_other_training_text_in_another_order(corpus: BuiltinCorpus) -> None:
    def characters(text: str) -> str:
        return "".join(sorted("".join(text.split())))

    characters_of = {characters(document.text) for document in corpus.train if document.source != "noise"}
    originals = {document.text for document in corpus.train if document.source != "noise"}
    noise = [document for document in corpus.train if document.source == "noise"]
    assert not originals & {document.text for document in noise}
    for document in noise[:-1]:  # the last is cut to fit the share
        assert characters(document.text) in characters_of
    runs = set().union(*(shingles(document.text) for document in noise))
    kept = runs & set().union(*(shingles(text) for text in originals))
    assert not kept


def test_code_has_no_docstrings_and_prose_no_sessions(corpus: BuiltinCorpus) -> None:
    for document in corpus.train:
        if document.source == "code":
            assert not re.search(r'^(class|def) \w+.*:\n\s+"""', document.text, re.MULTILINE)
        if document.source == "prose":
            assert ">>>" not in document.text


def test_progress_ends_complete() -> None:
    seen: list[tuple[int, int, str]] = []
    builtin_corpus.build(pool_characters=100_000, progress=lambda *args: seen.append(args))
    assert len(seen) > 3
    assert [done / total for done, total, _ in seen] == sorted(done / total for done, total, _ in seen)
    assert seen[-1] == (1, 1, "built-in corpus")


def test_damaged_and_missing_files_are_done_without(tmp_path: Path, corpus: BuiltinCorpus) -> None:
    original = Path(sysconfig.get_path("stdlib"))
    folder = tmp_path / "lib"
    for part in ("asyncio", "email", "encodings", "importlib", "json", "logging", "unittest", "xml"):
        if (original / part).is_dir():
            shutil.copytree(original / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "test*"))
    for file in original.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "argparse.py").write_bytes(b"\xff\x00 not a module")
    (folder / "heapq.py").write_text("def broken(:\n")
    (folder / "glob.py").unlink()
    small = builtin_corpus.build(folder, pool_characters=200_000)
    assert {document.source for document in small.train} == set(builtin_corpus.SHARES)
    assert size(small.train) == pytest.approx(200_000, rel=0.01)
    assert not any("not a module" in document.text for document in small.train)


def test_no_standard_library_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"needs the sources of Python's standard library.*--data"):
        builtin_corpus.build(tmp_path)
