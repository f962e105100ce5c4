"""The documents of a block as token ids, made ahead by a thread of its own while the block before is being scored.

Of a document only the windows are kept that will be read. Knows nothing of the service.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from trainer_client.run.tokenizer import Tokenizer
from trainer_client.score.corpus import Corpus, Record

LEAST_TOKENS = 2  # of a document that can be scored: its first token is predicted by nothing
_TEXTS_AT_ONCE = 256  # that are tokenised together, or fewer long ones
_CHARACTERS_AT_ONCE = 1 << 20

T = TypeVar("T")


@dataclass
class Block:
    """Documents that are mixed with each other; one entry a document in every list."""

    index: int
    files: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sources: list[str | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of the whole document
    windows: list[list[np.ndarray]] = field(default_factory=list)  # token ids [T]; none where it can't be scored

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scorable(self) -> np.ndarray:
        """[n] int64, the documents that have windows."""
        return np.flatnonzero([bool(windows) for windows in self.windows])


def windows_of(ids: np.ndarray, length: int, most: int) -> list[np.ndarray]:
    """Up to `most` windows of a document, evenly spread from its beginning to its end; all of it where they suffice.

    Args:
        ids: [T] token ids.
        length: of a window, in tokens; only a whole document is shorter.
    """
    if len(ids) < LEAST_TOKENS:
        return []
    if len(ids) <= length:
        return [ids]
    count = min(most, -(-len(ids) // length))
    starts = np.linspace(0, len(ids) - length, count).round().astype(np.int64) if count > 1 else [0]
    return [ids[start : start + length].copy() for start in starts]  # a copy lets the long document go


def tokenised_blocks(
    corpus: Corpus, tokenizer: Tokenizer, *, length: int, most: int, first_block: int
) -> Iterator[Block]:
    """The blocks of a corpus from `first_block`; `length` and `most` windows as of `windows_of`."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    for index, records in enumerate(corpus.read(first_block), start=first_block):
        block = Block(index)
        for together in _together(records):
            for record, ids in zip(together, tokenizer.encode_batch([r.text for r in together]), strict=True):
                block.files.append(record.file)
                block.rows.append(record.row)
                block.ids.append(record.id)
                block.sources.append(record.source)
                block.tokens.append(len(ids))
                block.windows.append(windows_of(np.array(ids, dtype), length, most))
        yield block


def _together(records: Iterator[Record]) -> Iterator[list[Record]]:
    held: list[Record] = []
    characters = 0
    for record in records:
        held.append(record)
        characters += len(record.text)
        if len(held) >= _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield held
            held, characters = [], 0
    if held:
        yield held


class Ahead(Generic[T]):
    """Iterates in a thread, one item ahead of whoever iterates over this; a context manager that ends the thread.

    An error of the source comes up where its item would have come.
    """

    def __init__(self, source: Iterator[T], name: str) -> None:
        self._source = source
        self._made: queue.Queue[T | BaseException | None] = queue.Queue(1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (item := self._made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._made.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _run(self) -> None:
        try:
            for item in self._source:
                self._made.put(item)
                if self._closing.is_set():
                    return
            self._made.put(None)
        except BaseException as exc:
            self._made.put(exc)
