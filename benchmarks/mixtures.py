"""Corpora for experiments besides the built-in one: mixtures with a known target, as files that `run` reads.

`books` and `wiki` need a folder of texts (books.jsonl.gz, wiki.jsonl.gz, web.jsonl.gz: documents with a `text` a line);
`clean` is the built-in corpus's prose alone, whose pool is the target already;
`look-alikes` holds what resembles the target and does not help: a few documents again and again, and damaged ones;
`two-targets` is the built-in pool with held-out code beside held-out prose as its target;
`pip` takes the sources of the package installer, which every Python installation has, and shares nothing with the
built-in corpus: it is what the weighter in the package is taught on;
`large` holds all books of that folder, whole chapters of them, in ten times as much text as the others: for a GPU.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer_client.run import builtin_corpus
from trainer_client.run.builtin_corpus import Module, Named, chunks, read_module, shuffled, without_near_duplicates

POOL_CHARACTERS = 2_950_000  # as the built-in corpus
HELD_OUT_PASSAGES = 60  # of books and wiki, for validation and again for test
HELD_OUT_CHARACTERS = 80_000  # of pip likewise
NOISE_SHARE = 0.25
SHARES = {"target": 0.20, "web": 0.10, "code": 0.25, "tables": 0.20}  # of the pools of books and wiki, by characters
LOOK_ALIKE_SHARES = {"prose": 0.20, "code": 0.25, "tables": 0.15}  # the rest: repeated and damaged prose, 20 % each
LOOK_ALIKE_SHARE = 0.20
REPEATED_DOCUMENTS = 8
DAMAGED_PIECES = 1 / 3
GAP = 20  # pieces between held-out code and the pool's, so that no module is in both
PIP_SHARES = {"prose": 0.20, "code": 0.35, "tables": 0.20}
LARGE_PASSAGES = 8  # consecutive ones make up a document
LARGE_HELD_OUT = 24  # documents, for validation and again for test
LARGE_BOOKS = 0.25  # of that pool, by characters; the rest: the other texts, code, and noise as everywhere
LARGE_PACKAGES = ("torch", "transformers")  # whose sources are its code
_PIP_TABLES = ("idnadata", "uts46data", "_unicode", "unistring", "emoji_codes", "_mapping", "cells")

Documents = list[tuple[str, str]]  # (text, source)


@dataclass(frozen=True)
class Mixture:
    """A pool, and documents of its target that are not in it."""

    pool: Documents
    validation: Documents
    test: Documents

    def write(self, folder: Path) -> dict[str, Path]:
        """The three splits as JSON lines in `folder`; where each one is."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, documents in (("pool", self.pool), ("val", self.validation), ("test", self.test)):
            paths[name] = folder / f"{name}.jsonl"
            lines = (json.dumps({"text": text, "source": source}) + "\n" for text, source in documents)
            paths[name].write_text("".join(lines), encoding="utf-8")
        return paths


def text_mixture(target: str, texts: Path) -> Mixture:
    """`books` or `wiki` in a pool with web pages, code, tables and noise. The same one every time."""
    passages = _passages(texts / f"{target}.jsonl.gz")
    random.Random(0).shuffle(passages)
    validation, test = passages[:HELD_OUT_PASSAGES], passages[HELD_OUT_PASSAGES : 2 * HELD_OUT_PASSAGES]
    builtin = builtin_corpus.build().train
    sources = {
        "target": passages[2 * HELD_OUT_PASSAGES :],
        "web": _passages(texts / "web.jsonl.gz"),
        **{name: [d.text for d in builtin if d.source == name] for name in ("code", "tables")},
    }
    return Mixture(_with_noise(_shares(sources, SHARES, POOL_CHARACTERS)), _all(validation), _all(test))


def large_mixture(texts: Path) -> Mixture:
    """All books, in a pool with wiki and web pages, code of installed packages, and noise."""
    books = _joined(_passages(texts / "books.jsonl.gz"), LARGE_PASSAGES)
    random.Random(0).shuffle(books)
    validation, test, kept = (
        books[:LARGE_HELD_OUT],
        books[LARGE_HELD_OUT : 2 * LARGE_HELD_OUT],
        books[2 * LARGE_HELD_OUT :],
    )
    pool = [(text, "books") for text in kept]
    pool += [(text, name) for name in ("wiki", "web") for text in _passages(texts / f"{name}.jsonl.gz")]
    size = int(_size(kept) / LARGE_BOOKS)
    missing = int(size * (1 - NOISE_SHARE)) - _size([text for text, _ in pool])
    pool += [(text, "code") for text in _first(_package_sources(), missing)]
    return Mixture(_with_noise(pool, size), _all(validation), _all(test))


def clean_mixture() -> Mixture:
    """The pool is of the target's distribution: nothing is to be gained by weighting."""
    corpus = builtin_corpus.build()
    splits = (corpus.train, corpus.validation, corpus.test)
    pool, validation, test = ([(document.text, document.source) for document in split] for split in splits)
    return Mixture([document for document in pool if document[1] == "prose"], validation, test)


def look_alikes_mixture(size: int = POOL_CHARACTERS) -> Mixture:
    """The built-in corpus with less code and tables, no noise, and prose that is repeated and prose that is damaged."""
    corpus = builtin_corpus.build()
    by_source = {name: [d.text for d in corpus.train if d.source == name] for name in LOOK_ALIKE_SHARES}
    pool = _shares(by_source, LOOK_ALIKE_SHARES, size)
    prose = [text for text, source in pool if source == "prose"]
    wanted = int(size * LOOK_ALIKE_SHARE)
    few = sorted(prose, key=len)[len(prose) // 2 :][:REPEATED_DOCUMENTS]
    repeated = [text for _ in range(wanted // max(1, _size(few)) + 1) for text in few]
    pool += [(text, "repeats") for text in _first(repeated, wanted)]
    pool += [(text, "damaged") for text in _first([_damaged(text, i) for i, text in enumerate(prose)], wanted)]
    validation, test = ([(d.text, d.source) for d in split] for split in (corpus.validation, corpus.test))
    return Mixture(pool, validation, test)


def two_targets_mixture() -> Mixture:
    """The built-in pool; validation and test are half prose and half code of modules that the pool lacks."""
    corpus = builtin_corpus.build()
    code = [d.text for d in corpus.train if d.source == "code"]
    held_out: list[list[str]] = []
    for split in (corpus.validation, corpus.test):
        pieces = _first(code, _size([d.text for d in split]))
        held_out.append(pieces)
        code = code[len(pieces) + GAP :]
    pool = [(d.text, d.source) for d in corpus.train if d.source != "code"] + [(text, "code") for text in code]
    validation, test = (
        [*((d.text, d.source) for d in split), *((text, "code") for text in pieces)]
        for split, pieces in zip((corpus.validation, corpus.test), held_out, strict=True)
    )
    return Mixture(pool, validation, test)


def _damaged(text: str, seed: int) -> str:
    """A third of the pieces of up to three characters (about a token) replaced by others of the same text."""
    pieces = re.findall(r"\s*\S{1,3}", text)
    draw = random.Random(seed)
    others = draw.sample(range(len(pieces)), int(len(pieces) * DAMAGED_PIECES))
    for place in others:
        pieces[place] = draw.choice(pieces)
    return "".join(pieces)


def pip_mixtures() -> dict[str, Mixture]:
    """One pool of pip's docstrings, code, tables and noise, with two targets to choose from: `prose` and `code`."""
    modules = _pip_modules()
    prose = [
        d.text for d in without_near_duplicates([Named(m.name, m.prose) for m in modules if not _is_table(m.name)])
    ]
    code = [m.code for m in modules if not _is_table(m.name)]
    tables = [piece.text for m in modules if _is_table(m.name) for piece in chunks(m.name, m.code)]
    sources, held_out = {"tables": tables}, {}
    for name, texts in (("prose", prose), ("code", code)):
        validation = _first(texts, HELD_OUT_CHARACTERS)
        test = _first(texts[len(validation) :], HELD_OUT_CHARACTERS)
        held_out[name] = _all(validation), _all(test)
        sources[name] = [piece.text for text in texts[len(validation) + len(test) :] for piece in chunks(name, text)]
    size = min(POOL_CHARACTERS, *(int(_size(sources[name]) / share) for name, share in PIP_SHARES.items()))
    pool = _with_noise(_shares(sources, PIP_SHARES, size), size)
    return {name: Mixture(pool, *splits) for name, splits in held_out.items()}


def _pip_modules() -> list[Module]:
    """pip's modules in a mixed order, and its certificates as one more."""
    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise SystemExit("pip is not installed here: python -m ensurepip")
    root = Path(spec.origin).parent
    names = [Named(str(path.relative_to(root)), "") for path in (*root.rglob("*.py"), *root.rglob("*.pem"))]
    modules = []
    for name, _ in builtin_corpus.in_mixed_order(names):
        if name.endswith(".pem"):
            modules.append(Module(name, "", (root / name).read_text("utf-8")))
        elif module := read_module(root / name, name):
            modules.append(module)
    return modules


def _package_sources() -> list[str]:
    """Modules of `LARGE_PACKAGES`, in a mixed order."""
    files = []
    for package in LARGE_PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None  # the runs need both
        assert spec.origin is not None
        root = Path(spec.origin).parent
        files += [Named(f"{package}/{path.relative_to(root)}", str(path)) for path in root.rglob("*.py")]
    return [Path(path).read_text("utf-8", errors="replace") for _, path in builtin_corpus.in_mixed_order(files)]


def _joined(texts: list[str], count: int) -> list[str]:
    return ["\n".join(texts[start : start + count]) for start in range(0, len(texts), count)]


def _is_table(name: str) -> bool:
    return name.endswith(".pem") or any(part in name for part in _PIP_TABLES)


def _passages(path: Path) -> list[str]:
    if not path.is_file():
        raise SystemExit(f"there is no {path}: name the folder of books, wiki and web texts with --texts")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _shares(sources: dict[str, list[str]], shares: dict[str, float], size: int) -> Documents:
    return [(text, name) for name, share in shares.items() for text in _first(sources[name], int(size * share))]


def _with_noise(pool: Documents, size: int = POOL_CHARACTERS) -> Documents:
    """The pool, and token-shuffled copies of it."""
    named = [Named(str(i), text) for i, (text, _) in enumerate(pool)]
    return [*pool, *((d.text, "noise") for d in shuffled(named, int(size * NOISE_SHARE)))]


def _all(texts: Iterable[str]) -> Documents:
    return [(text, "target") for text in texts]


def _first(texts: list[str], characters: int) -> list[str]:
    """As many as make up so many characters, whole."""
    kept: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        kept.append(text)
        characters -= len(text)
    return kept


def _size(texts: list[str]) -> int:
    return sum(map(len, texts))
