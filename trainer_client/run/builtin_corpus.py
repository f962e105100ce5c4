"""The built-in corpus: real text that every Python installation has, as a mixture with a known target.

The target is prose (the language reference in `pydoc_data.topics`, docstrings of the standard library). The training
pool mixes it with code, tables and token-shuffled noise. Deterministic for an installation: files in a fixed order, no
randomness but seeded, and no module is imported for its docstrings. Knows nothing of tokens, samples or training.
"""

from __future__ import annotations

import ast
import calendar
import hashlib
import inspect
import logging
import os
import random
import re
import sysconfig
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from trainer_client.run.documents import Document, Progress
from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)

SHARES = {"prose": 0.20, "code": 0.35, "tables": 0.20, "noise": 0.25}  # of the training pool, by characters
POOL_CHARACTERS = 2_950_000  # about 600 steps of 32 x 64 tokens with a vocabulary of 1,024
HELD_OUT_CHARACTERS = 80_000  # of prose, for validation and again for test

_CHUNK_CHARACTERS = 4_000
_LONGEST_HELD_OUT = 15_000  # a held-out set is many documents, not one long one
_LEAST_HELD_OUT = 0.5  # of HELD_OUT_CHARACTERS; with less prose than that there is no corpus
_SHINGLE_WORDS = 12  # documents that share a run of so many words are near-duplicates
_SKIPPED_FOLDERS = {  # installed packages, tests, bundled copies, and what is read as tables or topics
    *("__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "turtledemo"),
}


@dataclass(frozen=True)
class BuiltinCorpus:
    """Training pool and held-out prose; no module or topic, and no run of 12 words of prose, is in two of them."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]


class Named(NamedTuple):
    """A document while a corpus is put together."""

    name: str  # unique, and decides the order
    text: str


class Module(NamedTuple):
    """A module of Python, taken apart."""

    name: str
    prose: str  # its docstrings
    code: str  # its source without them


def build(
    stdlib: Path | None = None, *, pool_characters: int = POOL_CHARACTERS, progress: Progress | None = None
) -> BuiltinCorpus:
    """The corpus of this installation; takes a few seconds.

    Args:
        stdlib: folder of the standard library's sources, by default the running interpreter's.
        pool_characters: size of the training pool; it is smaller, with the same shares, where a source is short.

    Raises:
        InvalidArgument: the folder has too little text (a zipped or stripped standard library).
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    report = progress or (lambda done, total, label: None)
    modules = _read_modules(stdlib, pool_characters, report)
    topics = _topics()
    prose = without_near_duplicates([*topics, *(Named(m.name, m.prose) for m in modules)])
    validation, prose = hold_out(prose)
    test, prose = hold_out(prose)
    held_out = {document.name for document in chain(validation, test)}
    least = _LEAST_HELD_OUT * HELD_OUT_CHARACTERS
    code = list(chain.from_iterable(chunks(m.name, m.code) for m in modules if m.name not in held_out))
    tables = _tables(stdlib)
    pools = {"prose": prose, "code": code, "tables": tables}
    if min(_size(validation), _size(test)) < least or not all(pools.values()):
        raise InvalidArgument(
            f"the built-in corpus needs the sources of Python's standard library, but {stdlib} has too little text "
            f"({len(modules)} modules, {len(topics)} topics): name files with --data and --val instead"
        )
    # The scarcest source decides the size, so that the shares hold.
    size = min(pool_characters, *(int(_size(pool) / SHARES[source]) for source, pool in pools.items()))
    pools = {source: first(pool, int(size * SHARES[source])) for source, pool in pools.items()}
    pools["noise"] = shuffled(list(chain.from_iterable(pools.values())), int(size * SHARES["noise"]))
    report(1, 1, "built-in corpus")
    return BuiltinCorpus(
        train=tuple(Document(document.text, source) for source, pool in pools.items() for document in pool),
        validation=tuple(Document(document.text, "prose") for document in validation),
        test=tuple(Document(document.text, "prose") for document in test),
    )


# ---- The standard library's modules ---------------------------------------------------------------------------------


def _read_modules(stdlib: Path, pool_characters: int, report: Progress) -> list[Module]:
    """Modules in a fixed, mixed order, until there is prose and code enough for pool and held-out sets."""
    files = in_mixed_order([Named(str(path.relative_to(stdlib)), "") for path in _source_files(stdlib)])
    wanted_prose = pool_characters * SHARES["prose"] + 2 * HELD_OUT_CHARACTERS
    wanted_code = 1.5 * pool_characters * SHARES["code"]  # held-out modules give none
    modules: list[Module] = []
    prose = code = 0
    for file in files:
        module = read_module(stdlib / file.name, file.name)
        if module is None:
            continue
        modules.append(module)
        prose += len(module.prose)
        code += len(module.code)
        found = min(prose / wanted_prose, code / wanted_code)
        report(min(99, int(100 * found)), 100, "built-in corpus")
        if found >= 1:
            break
    return modules


def _source_files(stdlib: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(stdlib):
        names[:] = sorted(set(names) - _SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def read_module(path: Path, name: str) -> Module | None:
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():  # about other people's escapes; and no filter may change the corpus
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError) as exc:  # unreadable, not UTF-8, or of another Python: do without it
        logger.debug("built-in corpus: %s left out: %s", path, exc)
        return None
    lines = source.splitlines(keepends=True)
    prose: list[str] = []
    for docstring in _docstrings(tree):
        prose.append(inspect.cleandoc(str(docstring.value)))
        first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
        lines[first:last] = [""] * (last - first)
    return Module(name, _clean_prose("\n\n".join(prose)), "".join(lines))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.Constant]:
    """Docstrings of a module, its classes and their functions."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield first.value
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


# ---- Prose ----------------------------------------------------------------------------------------------------------


def _topics() -> list[Named]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        logger.warning("built-in corpus: pydoc_data.topics is not installed; its prose is docstrings only")
        return []
    return [Named(f"topic:{name}", _clean_prose(text)) for name, text in sorted(topics.items())]


def _clean_prose(text: str) -> str:
    """The paragraphs that are sentences: no sessions, grammar or code samples."""
    return "\n\n".join(paragraph for paragraph in _paragraphs(text) if _is_prose(paragraph))


def _paragraphs(text: str) -> list[str]:
    return [textwrap.dedent(part).strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _is_prose(paragraph: str) -> bool:
    if ">>>" in paragraph or len(paragraph.split()) < 6:
        return False
    wordlike = sum(character.isalpha() or character.isspace() for character in paragraph)
    return wordlike >= 0.85 * len(paragraph)


def without_near_duplicates(documents: list[Named]) -> list[Named]:
    """The documents less every paragraph that shares a run of words with an earlier one, in a mixed order."""
    seen: set[str] = set()
    kept: list[Named] = []
    for document in in_mixed_order(documents):
        paragraphs: list[str] = []
        for paragraph in _paragraphs(document.text):
            runs = shingles(paragraph)
            if seen.isdisjoint(runs):
                paragraphs.append(paragraph)
                seen.update(runs)
        if paragraphs:
            kept.append(Named(document.name, "\n\n".join(paragraphs)))
    return kept


def shingles(text: str) -> set[str]:
    """All runs of 12 words of the normalised text (lower case, letters and digits); a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - _SHINGLE_WORDS + 1))
    return {" ".join(words[start : start + _SHINGLE_WORDS]) for start in starts}


def hold_out(documents: list[Named]) -> tuple[list[Named], list[Named]]:
    """(held out, the rest): whole documents of middling length, as many as fill the quota."""
    held_out: list[Named] = []
    rest: list[Named] = []
    size = 0
    for document in documents:
        if size < HELD_OUT_CHARACTERS and _CHUNK_CHARACTERS // 10 <= len(document.text) <= _LONGEST_HELD_OUT:
            held_out.append(document)
            size += len(document.text)
        else:
            rest.append(document)
    return held_out, rest


# ---- Tables and noise -----------------------------------------------------------------------------------------------


def _tables(stdlib: Path) -> list[Named]:
    """Chunks of mapping tables, character listings, calendars and number tables, mixed."""
    tables = {
        "encodings": _encodings(stdlib),
        "entities": _entities(),
        "unicode": _unicode_listing(),
        "calendars": "\n".join(_calendar(year) for year in range(1970, 2038)),
        "squares": "".join(f"{n:6d} {n * n:10d} {n**3:14d} {n**0.5:10.5f} {1 / n:10.7f}\n" for n in range(1, 2001)),
        "products": "".join(f"{a:3d} x {b:3d} = {a * b:5d}\n" for a in range(2, 60) for b in range(2, 60)),
    }
    return in_mixed_order(list(chain.from_iterable(chunks(name, text) for name, text in tables.items())))


def _encodings(stdlib: Path) -> str:
    parts: list[str] = []
    for path in sorted((stdlib / "encodings").glob("*.py")):
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as exc:
            logger.debug("built-in corpus: %s left out: %s", path, exc)
            continue
        mapping = "".join(line for line in text.splitlines(keepends=True) if "->" in line)
        parts.append(mapping[: 2 * _CHUNK_CHARACTERS])
    return "".join(parts)


def _entities() -> str:
    from html.entities import html5

    return "".join(
        f"&{name}\t{' '.join(f'U+{ord(c):04X}' for c in characters)}\n" for name, characters in sorted(html5.items())
    )


def _unicode_listing() -> str:
    rows = ((point, chr(point), unicodedata.name(chr(point), "")) for point in range(0xA0, 0x1900))
    return "".join(
        f"{point:04X};{name};{unicodedata.category(c)};{unicodedata.bidirectional(c)};{unicodedata.decomposition(c)}\n"
        for point, c, name in rows
        if name
    )


def _calendar(year: int) -> str:
    months: list[str] = []
    for month in range(1, 13):  # not calendar.TextCalendar: its names depend on the locale
        weeks = calendar.Calendar().monthdayscalendar(year, month)
        rows = (" ".join(f"{day:2d}" if day else "  " for day in week).rstrip() for week in weeks)
        months.append("\n".join([f"{year}-{month:02d}", "Mo Tu We Th Fr Sa Su", *rows]) + "\n")
    return "\n".join(months)


def shuffled(documents: list[Named], characters: int) -> list[Named]:
    """Copies of the documents, their pieces of up to three characters (about a token) in random order."""
    copies: list[Named] = []
    size = 0
    for document in in_mixed_order([Named(f"noise:{d.name}", d.text) for d in documents]):
        if size >= characters:
            break
        pieces = re.findall(r"\s*\S{1,3}", "\n" + document.text)
        if len(pieces) < 20:
            continue
        random.Random(document.name).shuffle(pieces)
        copies.append(Named(document.name, "".join(pieces).strip()))
        size += len(copies[-1].text)
    return first(copies, characters)


# ---- Sizes and order ------------------------------------------------------------------------------------------------


def in_mixed_order(documents: list[Named]) -> list[Named]:
    """Sorted by a hash of the name: as good as shuffled, equal everywhere, and little changed by one file more."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def _size(documents: list[Named]) -> int:
    return sum(len(document.text) for document in documents)


def first(documents: list[Named], characters: int) -> list[Named]:
    """The first documents, `characters` in all; the last one is cut."""
    kept: list[Named] = []
    for document in documents:
        if characters <= 0:
            break
        kept.append(Named(document.name, document.text[:characters]))
        characters -= len(document.text)
    return kept


def chunks(name: str, text: str) -> Iterator[Named]:
    """The text in pieces of about 4,000 characters that end at ends of lines."""
    piece: list[str] = []
    size = number = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _CHUNK_CHARACTERS:
            yield Named(f"{name}:{number}", "".join(piece))
            piece, size, number = [], 0, number + 1
    if "".join(piece).strip():
        yield Named(f"{name}:{number}", "".join(piece))
