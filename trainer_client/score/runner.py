"""One scoring from its settings to its files: count, score block by block, merge, select.

The order of things keeps mistakes cheap: whatever can be told to be wrong is told before anything is scored or removed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer_client.score.blocks import Ahead, tokenised_blocks
from trainer_client.score.config import ScoreConfig
from trainer_client.score.corpus import LANES, Corpus, Fields, FileState, count_documents, find_files
from trainer_client.score.parts import Journal, ScoreTable
from trainer_client.score.progress import phase
from trainer_client.score.select import write_selection
from trainer_client.score.weighing import Weighing, check_position
from weighting_contract.errors import AlreadyExists, FailedPrecondition

_SOURCES_SHOWN = 1000  # a source may be a URL: as many as there are documents


@dataclass
class Outcome:
    """What a scoring was."""

    documents: int = 0
    unscored: int = 0  # of these, too short to have a weight
    positions: tuple[int, int] | None = None  # of the weighter, first and last
    weights: Counter[str] = field(default_factory=Counter)  # sum by source, or by file without one
    counts: Counter[str] = field(default_factory=Counter)  # scored documents likewise
    selected: int | None = None
    scored: bool = False  # by this process; else it was finished before

    def take(self, part: Any) -> None:
        """Counts the rows of a table in."""
        columns = part.select(["source", "file", "weight", "position"]).to_pydict()
        for source, file, weight, position in zip(*columns.values(), strict=True):
            self.documents += 1
            if weight is None:
                self.unscored += 1
                continue
            first, last = self.positions or (position, position)
            self.positions = min(first, position), max(last, position)
            name = source or file
            if name in self.counts or len(self.counts) < _SOURCES_SHOWN:
                self.weights[name] += weight
                self.counts[name] += 1


def score_corpus(config: ScoreConfig, console: Console) -> Outcome:
    """Scores the input, and selects from it where that was asked for.

    Raises:
        WeighbridgeError: a mistake in settings or input; a service that refuses, or stays away for too long. What is
            scored by then is kept, and a scoring with `resume` goes on from there.
    """
    table = ScoreTable(Path(config.output))
    with table.alone():
        return _score_corpus(config, table, console)


def _score_corpus(config: ScoreConfig, table: ScoreTable, console: Console) -> Outcome:
    outcome = Outcome()
    fields = Fields(config.text_field, config.id_field, config.source_field)
    found = find_files(config.input)
    if not (config.resume or config.overwrite):
        table.check_free()
        if config.select and config.selection_path.exists():
            raise AlreadyExists(f"{config.selection_path} exists: replace it with --overwrite, or name a --selection")
    journal = table.journal() if config.resume else None
    if journal is not None:
        journal.check_same(config.lasting, found, str(table.output if table.finished else table.parts))
    if journal is None or not table.finished:
        journal = _score(config, table, found, fields, journal, outcome, console)
    table.tidy()
    if config.select:
        corpus = _corpus(config, journal, fields)
        with phase(console, "selecting", corpus.documents) as progress:
            outcome.selected = write_selection(
                table.output,
                corpus,
                config.selection_path,
                text_field=config.text_field,
                way=config.select,
                share=config.share,
                seed=config.seed,
                progress=progress,
            )
    return outcome


def _score(
    config: ScoreConfig,
    table: ScoreTable,
    found: list[FileState],
    fields: Fields,
    begun: Journal | None,
    outcome: Outcome,
    console: Console,
) -> Journal:
    """Scores what has no weight yet, and puts the table together; the journal of the scoring."""
    if begun is None:
        with phase(console, "counting", None) as progress:
            files = tuple(count_documents(found, fields, progress))
    else:
        files = begun.files
    with Weighing(config) as weighing:
        weighing.open()
        journal = Journal(
            config.lasting,
            weighing.reference.checksum,
            weighing.profile_checksum,
            weighing.statistic_names if config.statistics else (),
            files,
        )
        if begun is None:
            table.remove()
            table.begin(journal)
        elif begun != journal:
            raise FailedPrecondition(
                f"the scoring in {table.parts} was begun with another reference, target or kind of weighter under the "
                "same names: bring them back, or start anew with --overwrite"
            )
        corpus = _corpus(config, journal, fields)
        _score_blocks(config, weighing, corpus, table, journal, console)
    with phase(console, "writing", corpus.documents) as progress:
        for part in table.merge(journal, corpus.blocks, corpus.documents):
            outcome.take(part)
            progress(outcome.documents)
    outcome.scored = True
    return journal


def _score_blocks(
    config: ScoreConfig, weighing: Weighing, corpus: Corpus, table: ScoreTable, journal: Journal, console: Console
) -> None:
    first = table.parts_done()
    position, done = table.last_position(first), corpus.documents_before(first)
    most_batches = (config.shuffle + LANES) // config.batch + 2  # of a block
    blocks = tokenised_blocks(
        corpus,
        weighing.reference.tokenizer,
        length=weighing.reference.window,
        most=config.windows,
        first_block=first,
    )
    with phase(console, "scoring", corpus.documents, done) as progress, Ahead(blocks, "score-ahead") as ahead:

        def scored(documents: int) -> None:
            nonlocal done
            done += documents
            progress(done)

        for block in ahead:
            scores = weighing.score(block, scored)
            check_position(position, scores)
            position = max(position, int(scores.positions.max()))
            table.write(block, scores, journal, block.index * most_batches)


def _corpus(config: ScoreConfig, journal: Journal, fields: Fields) -> Corpus:
    return Corpus(journal.files, fields, block_documents=config.shuffle, seed=config.seed)
