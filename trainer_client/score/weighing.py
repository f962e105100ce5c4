"""The service's part in a scoring: the reference and its tokenizer, a frozen job, and the weights of a block.

No weight is ever made up: while the service is away, this waits for it. Knows nothing of files of a scoring.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from trainer_client import wire
from trainer_client.breaker import Backoff
from trainer_client.client import Client, connect
from trainer_client.job import Job, Scores
from trainer_client.run.tokenizer import Tokenizer
from trainer_client.score.blocks import Block
from trainer_client.score.config import ScoreConfig
from trainer_client.score.corpus import Fields, count_documents, find_files
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from weighting_contract.profile import documents_checksum
from weighting_contract.reference import check_reference, reference_files
from weighting_contract.rows import padded

logger = logging.getLogger(__name__)

T = TypeVar("T")

PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)  # over soon, perhaps; all else is somebody's mistake
TIMEOUTS = Timeouts(score_s=120.0, meta_update_s=60.0, admin_s=120.0, close_s=10.0)
LIMITS = Limits(breaker_period_s=0.5, breaker_max_period_s=5.0)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_TARGET_TOKENS = 10_000_000  # a profile needs no more, and a message takes no more


@dataclass(frozen=True)
class ScoreReference:
    """What is known here of the reference that reads the documents."""

    name: str  # at the service
    checksum: str
    tokenizer_checksum: str
    tokenizer: Tokenizer
    window: int  # longest sample that it reads whole, in tokens
    files: Mapping[str, bytes] | None  # to give to the service; None: it has them


@dataclass(frozen=True)
class BlockScores:
    """The scores of a block's n documents; NaN, and batch and position -1, for those that can't be scored."""

    weights: np.ndarray  # [n] float32, mean 1 over the documents of each batch
    logits: np.ndarray  # [n] float32
    batches: np.ndarray  # [n] int64, within the block
    positions: np.ndarray  # [n] int64, of the weighter
    statistics: np.ndarray | None  # [n, F] float32; None: not asked for


class Weighing:
    """A connection that waits: to the reference, and, once `open` was called, to a job; a context manager.

    Attributes:
        reference: that reads the documents.
        statistic_names: columns of the weighter's spec, once it is open.
    """

    def __init__(self, config: ScoreConfig) -> None:
        """Raises WeighbridgeError: no such reference, or a service that stays away for `patience_s`."""
        self._config = config
        self._client: Client = connect(config.weighter, **config.credentials, timeouts=TIMEOUTS, limits=LIMITS)
        self._job: Job | None = None
        self.statistic_names: tuple[str, ...] = ()
        try:
            self.reference = self._find_reference()
            self._profile, self.profile_checksum = self._find_profile()
        except BaseException:
            self._client.close()
            raise

    def open(self) -> None:
        """Opens the job. Raises WeighbridgeError where the weighter does not go with reference and profile."""
        config, reference = self._config, self.reference
        job = self._job = self._client.open_job(
            weighter=config.weighter_name,
            role="frozen",
            initial=config.start_from,
            reference=reference.name,
            reference_checksum=reference.checksum,
            reference_files=reference.files,
            tokenizer_checksum=reference.tokenizer_checksum,
            profile=self._profile,
        )

        def attached() -> None:  # it goes on trying by itself
            if job.failure is not None:
                raise job.failure

        self._persist(attached)
        weighter = self._persist(lambda: self._client.get_weighter(config.weighter_name))
        self.statistic_names = tuple(weighter.spec.features.names)

    def score(self, block: Block, scored: Callable[[int], None] = lambda documents: None) -> BlockScores:
        """The scores of a block's documents, in batches that are drawn from the block by the seed.

        One call at a time is under way: a service packs calls together, and floats round by what is packed together.
        So a scoring that was interrupted ends as one that was not.

        Args:
            scored: called with the number of documents after each batch.
        """
        size, scorable = len(block), block.scorable
        weights, logits = np.full((2, size), np.nan, np.float32)
        batches, positions = np.full((2, size), -1, np.int64)
        statistics = np.full((size, len(self.statistic_names)), np.nan, np.float32) if self._config.statistics else None
        mixed = np.random.default_rng([self._config.seed, block.index]).permutation(scorable)
        count = max(1, round(len(mixed) / self._config.batch))  # of nearly the same size: none is a small rest
        for number, batch in enumerate(np.array_split(mixed, count) if len(mixed) else ()):
            windows = [block.windows[i] for i in batch]
            scores = self._asked(windows)
            starts = np.cumsum([0, *map(len, windows[:-1])])
            sizes = np.array([len(each) for each in windows], np.float32)
            means = np.add.reduceat(scores.weights, starts) / sizes
            weights[batch] = means / means.mean()
            logits[batch] = np.add.reduceat(scores.logits, starts) / sizes
            batches[batch], positions[batch] = number, scores.position
            if statistics is not None:
                statistics[batch] = np.add.reduceat(scores.statistics, starts, axis=0) / sizes[:, None]
            scored(len(batch))
        scored(size - len(scorable))
        return BlockScores(weights, logits, batches, positions, statistics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._client.close()  # closes the job first

    def _asked(self, windows: list[list[np.ndarray]]) -> Scores:
        """The scores of the windows of several documents, one after the other."""
        assert self._job is not None
        job, rows = self._job, [window for each in windows for window in each]
        tokens, lengths = padded(rows, rows[0].dtype)
        samples = wire.Batch(tokens=tokens, lengths=lengths)
        try:  # `ask` raises where `score` would answer uniform weights
            return self._persist(lambda: job.ask(samples, 0, return_statistics=self._config.statistics))
        except InvalidArgument as exc:
            raise InvalidArgument(
                f"{exc.message} ({len(rows)} windows of up to {tokens.shape[1]} tokens, of {len(windows)} documents; "
                "a smaller --batch or fewer --windows make less of them)"
            ) from exc

    # ---- Reference and profile --------------------------------------------------------------------------------------

    def _find_reference(self) -> ScoreReference:
        name = self._config.reference
        if Path(name).is_dir():
            files = reference_files(name)
            info = check_reference(files, name)
            checksum, tokenizer_checksum, seq_len = info.checksum, info.tokenizer_checksum, info.seq_len
            return ScoreReference(
                f"score-{checksum[:16]}",
                checksum,
                tokenizer_checksum,
                _tokenizer(files["tokenizer.json"], name),
                seq_len + 1,
                files,
            )
        try:
            found = self._persist(lambda: self._client.get_reference(name, ["tokenizer.json"]))
        except NotFound as exc:
            raise InvalidArgument(
                f"--reference {name} is no folder, and unknown to the service: {exc.message}"
            ) from exc
        where = f"--reference {name}, as the service {self._config.weighter} has it"
        content = found.files.get("tokenizer.json", b"")
        if hashlib.sha256(content).hexdigest() != found.tokenizer_checksum:
            raise InvalidArgument(f"{where}, has a tokenizer.json of another checksum than it says: it can't be used")
        tokenizer = _tokenizer(content, where)
        return ScoreReference(name, found.checksum, found.tokenizer_checksum, tokenizer, found.seq_len + 1, None)

    def _find_profile(self) -> tuple[Any, str]:
        """What the job hands over of its target, and what tells it from others; (None, "") without a target."""
        if self._config.profile:
            from trainer_client.profile import load_profile  # needs torch

            profile = load_profile(
                self._config.profile,
                reference_checksum=self.reference.checksum,
                tokenizer_checksum=self.reference.tokenizer_checksum,
            )
            return profile, hashlib.sha256(profile.log_ratios.tobytes()).hexdigest()
        if not self._config.target:
            return None, ""
        rows = self._target_rows()
        if not rows:
            raise InvalidArgument("--target holds no text: a profile is made of at least one document")
        return rows, documents_checksum(rows)

    def _target_rows(self) -> list[np.ndarray]:
        """[T] int32 token ids of every document of the target that has any."""
        from trainer_client.score.corpus import Corpus

        fields = Fields(self._config.text_field, "", "")
        files = count_documents(find_files(self._config.target), fields)
        corpus = Corpus(files, fields, block_documents=1 << 62, seed=0)
        rows: list[np.ndarray] = []
        tokens = 0
        for record in next(corpus.read()):
            rows.append(np.array(self.reference.tokenizer.encode_batch([record.text])[0], np.int32))
            tokens += len(rows[-1])
            if tokens > _TARGET_TOKENS:
                raise InvalidArgument(
                    f"--target has more than {_TARGET_TOKENS:,} tokens: give fewer documents, or make a profile of "
                    "them with python -m trainer_client.profile"
                )
        return [row for row in rows if len(row)]

    # ---- Waiting ----------------------------------------------------------------------------------------------------

    def _persist(self, call: Callable[[], T]) -> T:
        """The answer of `call`, which is made again while the service is away, for `patience_s`."""
        away_since: float | None = None
        waits = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        while True:
            try:
                answer = call()
            except PASSING as exc:
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    logger.warning("waiting for the weighting service: %s", exc.message)
                patience_s = self._config.patience_s
                if patience_s and now - away_since > patience_s:
                    raise type(exc)(
                        f"the weighting service has been away for {patience_s:g} s (--patience): {exc.message}; what "
                        "is scored is kept, go on with --resume"
                    ) from exc
                time.sleep(waits.next_s())
                continue
            if away_since is not None:
                logger.warning("the weighting service answers again after %.0f s", time.monotonic() - away_since)
            return answer


def check_position(before: int, scores: BlockScores) -> None:
    """Raises FailedPrecondition where the weighter is an earlier one than that of the blocks `before`; -1: none."""
    now = scores.positions.max(initial=-1, where=scores.positions >= 0)
    if 0 <= now < before:
        raise FailedPrecondition(
            f"the weighter is at position {now}, but earlier documents were scored at {before}: it was made anew or "
            "put back, and its weights are of another kind now; score anew with --overwrite"
        )


def _tokenizer(content: bytes, where: str) -> Tokenizer:
    try:
        return Tokenizer.from_json(content.decode())
    except ValueError as exc:
        raise InvalidArgument(f"{where}: tokenizer.json can't be read: {exc}") from exc
