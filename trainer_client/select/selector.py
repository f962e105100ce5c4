"""Scores the candidates of coming steps in the background, and teaches with what was kept of them.

Knows a job and arrays of tokens; nothing of loaders, and needs no torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from trainer_client import wire
from trainer_client.counters import FEW_CANDIDATES, unexpected
from trainer_client.job import Job
from trainer_client.select.choice import Selection, choose
from trainer_client.select.seen import worn
from weighting_contract.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, WeighbridgeError
from weighting_contract.tensors import as_array


@dataclass
class _Asked:
    """The candidates of a step on their way to a selection."""

    step: int
    rows: int
    probes: int = 0
    batch: wire.Batch | None = None  # None: not to be scored
    wear: np.ndarray | None = None
    answer: Selection | WeighbridgeError | None = None
    forgotten: bool = False  # nobody waits for the answer any more


class Selector:
    """Chooses the batches of a job's steps from candidates, ahead of time.

        selector.submit(step + 2, tokens)           # returns at once
        selection = selector.result(step)           # waits only where the service is slower than the training
        selector.teach(step, cotangent, selection)  # returns at once

    One thread executes submits and teaches strictly in the order they came, and each step's candidates are answered
    before the next operation begins. So with a job that reads its own writes, the weights of a step come from exactly
    the updates that were taught before its submit, and a run is reproducible although it scores ahead.

    With `on_failure="uniform"` nothing here raises into training: a step that can't be scored in time takes its first
    candidates, and is counted. With "raise", errors surface in `result` and `teach`. Closing the job closes it, too.
    """

    def __init__(
        self,
        job: Job,
        *,
        keep: int,
        probes: int = 4,
        min_effective_share: float = 0.1,
        seed: int = 0,
        from_first: bool = False,
    ) -> None:
        """
        Args:
            keep: samples of a batch, B.
            probes: of these, drawn evenly from all candidates; an update with two or more counts for the job's trust.
                Only steps that are taught need them: see `submit`. 0: nothing counts, trust stays whole.
            min_effective_share: least effective sample size of the weights over the candidates / their number.
            seed: of the draws, together with the step: a resumed run with the same weights keeps the same samples.
            from_first: candidates are in random order, and the first B are the batch without a choice: until the job's
                trust is whole, choices stay near it (`choose`).

        Raises:
            InvalidArgument: numbers that can't be right.
        """
        check_settings(probes, min_effective_share, seed)
        check_whole("keep", keep, 1)
        _check_probes(probes, keep)
        self.keep = keep
        self._job, self._probes, self._min_effective_share, self._seed = job, probes, min_effective_share, seed
        self._from_first = from_first
        self._changed = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()
        self._asked: dict[int, _Asked] = {}  # by step, until its result is taken
        self._error: WeighbridgeError | None = None  # of a teach, for on_failure="raise"
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"weighbridge-select-{job.job_id}", daemon=True)
        self._thread.start()
        job.before_close(self.close)

    def submit(
        self, step: int, tokens: Any, lengths: Any = None, *, probes: int | None = None, wear: np.ndarray | None = None
    ) -> None:
        """Queues the candidates of a step to be scored; returns at once.

        Args:
            step: of the optimiser.
            tokens: [N, T] integer ids, rows padded on the right, or N texts; they are read later, by another thread.
            lengths: [N] integer, real tokens of each row; None: T.
            probes: in place of the selector's, 0 to B: none in a step that will not be taught, more while the model is
                new (`evenly_in_warm_up`).
            wear: [N], 0 or more, taken off the logs of their weights (`TimesSeen.wear`); None: nothing.

        Raises:
            InvalidArgument: a number of probes that can't be right, whatever `on_failure` says.
        """
        probes = self._probes if probes is None else probes
        _check_probes(probes, self.keep)
        texts = tokens if isinstance(tokens, list) and all(isinstance(t, str) for t in tokens) else None
        batch = wire.Batch(tokens=None if texts else tokens, lengths=lengths, texts=texts)
        rows = batch.rows()
        if rows is None:
            self.refuse(step, self.keep, InvalidArgument(f"the candidates of step {step} are {type(tokens).__name__}"))
        elif rows <= self.keep:
            self._put(_Asked(step, rows), None)
        else:
            asked = _Asked(step, rows, probes, batch, wear)
            self._put(asked, partial(self._score, asked))

    def refuse(self, step: int, rows: int, error: WeighbridgeError) -> None:
        """In place of `submit`, for candidates that can't be scored: the step's result is what follows from `error`."""
        self._put(_Asked(step, rows, answer=error), None)

    def result(self, step: int) -> Selection:
        """What to keep of a step's candidates; waits for it at most `Timeouts.score_s`. A later answer is dropped.

        Raises:
            WeighbridgeError: only with `on_failure="raise"`: what went wrong with this step, or with a teach.
        """
        started = time.perf_counter()
        with self._changed:
            asked = self._asked.pop(step, None) or _Asked(step, self.keep, answer=_not_submitted(step))
            if asked.batch is not None:
                self._changed.wait_for(lambda: asked.answer or self._closing, self._job.timeouts.score_s)
            asked.forgotten = True
            answer = asked.answer
        self._job.tally.add("score_seconds", time.perf_counter() - started)
        self._raise_error()
        if isinstance(answer, Selection):
            self._job.tally.add("selected")
            return answer
        if answer is None and asked.batch is None:
            self._job.tally.unselected(FEW_CANDIDATES)
            self._job.tally.warn_once(
                FEW_CANDIDATES,
                f"step {step} is unselected: its {asked.rows} candidates are no more than the {self.keep} samples of a "
                "batch, as at the end of an epoch",
            )
        else:
            late = FailedPrecondition if self._closing else DeadlineExceeded
            self._failed(
                step, answer or late(f"the candidates were not scored {'any more' if self._closing else 'in time'}")
            )
        return self._unselected(step, asked.rows)

    def teach(self, step: int, cotangent: Any, selection: Selection, *, update_id: str | None = None) -> bool:
        """Teaches the weighter with the cotangent of the first n samples that a step kept; returns at once.

        Args:
            step: of the optimiser.
            cotangent: [n] dL_val/dw of the samples kept[:n], which the probes lead; n from 2 to B.
            selection: of the step.
            update_id: idempotency key within the job; None: the step.

        Returns:
            Whether there was something to teach: not where the step is unselected, as it has no statistics then.

        Raises:
            WeighbridgeError: only with `on_failure="raise"`; there also for an earlier teach that failed.
        """
        self._raise_error()
        if selection.statistics is None:
            if not selection.fallback:
                self._job.tally.warn_once(
                    "no statistics", "nothing is taught: the service gives no statistics to teach"
                )
            return False
        try:
            values = _copied(cotangent, len(selection.kept))
            with self._changed:
                if self._closing:
                    raise FailedPrecondition("the selector is closed; make another one to go on")
                self._work.append(partial(self._teach, step, values, selection, update_id))
                self._changed.notify_all()
        except Exception as exc:
            self._job.refuse(step, exc if isinstance(exc, WeighbridgeError) else unexpected("teach", exc))
            return False
        return True

    def forget(self, step: int) -> None:
        """The result of a step that was submitted will not be asked for."""
        with self._changed:
            if asked := self._asked.pop(step, None):
                asked.forgotten = True

    def close(self) -> None:
        """Hands over what is still to be taught, and ends the thread; idempotent, never raises.

        Before a `Job.flush` that is to deliver everything. A score that is under way ends by its own deadline.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._job.timeouts.close_s)

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._closing)
                if not self._work:
                    return
                work = self._work.popleft()
            work()

    def _score(self, asked: _Asked) -> None:
        if asked.forgotten or asked.batch is None or self._closing:
            return
        started = time.perf_counter()
        answer: Selection | WeighbridgeError
        try:
            answer = self._selected(asked, asked.batch)
        except WeighbridgeError as exc:
            answer = exc
        except Exception as exc:
            answer = unexpected("a selector", exc)
        self._job.tally.add("ahead_seconds", time.perf_counter() - started)
        with self._changed:
            asked.answer = answer
            self._changed.notify_all()

    def _selected(self, asked: _Asked, batch: wire.Batch) -> Selection:
        step = asked.step
        scores = self._job.ask(batch, step, min_effective_share=self._min_effective_share, return_statistics=True)
        weights = scores.weights if asked.wear is None else worn(scores.weights, asked.wear)
        near = self._from_first and scores.trust < 1
        kept, probes = choose(weights, self.keep, asked.probes, (self._seed, step), from_first=near)
        return Selection(
            step=step,
            kept=kept,
            probes=probes,
            statistics=None if scores.statistics is None else scores.statistics[kept],
            position=scores.position,
            fallback=False,
            trust=scores.trust,
            weights=weights[kept],
            all_statistics=scores.statistics,
            computed_samples=scores.computed_samples,
        )

    def _teach(self, step: int, cotangent: np.ndarray, selection: Selection, update_id: str | None) -> None:
        assert selection.statistics is not None
        probes = selection.probes[: len(cotangent)]
        if not self._probes:  # then those of a warm-up don't count either: trust would stay as that left it
            probes = np.zeros_like(probes)
        try:
            self._job.meta_update(
                cotangent,
                selection.statistics[: len(cotangent)],
                step,
                scored_position=selection.position,
                estimator="score_function",
                update_id=update_id,
                probes=probes,
            )
        except WeighbridgeError as exc:  # with on_failure="raise"
            self._error = self._error or exc

    # ---- Endings ----------------------------------------------------------------------------------------------------

    def _put(self, asked: _Asked, work: Callable[[], None] | None) -> None:
        with self._changed:
            self._asked[asked.step] = asked
            if work is not None and not self._closing:
                self._work.append(work)
                self._changed.notify_all()

    def _unselected(self, step: int, rows: int) -> Selection:
        kept = np.arange(min(rows, self.keep), dtype=np.int64)
        none, ones = np.zeros(len(kept), np.bool_), np.ones(len(kept), np.float32)
        return Selection(step, kept, none, None, self._job.position, True, 0.0, ones)

    def _failed(self, step: int, error: WeighbridgeError) -> None:
        if self._job.on_failure == "raise":
            raise error
        self._job.tally.unselected(error.code)
        self._job.tally.warn_once(
            f"select {error.code}", f"step {step} is unselected ({error.code}): {error.message}", error
        )

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises InvalidArgument, naming the setting, for anything but a whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name} is {value!r}, expected a whole number from {least}")


def check_settings(probes: Any, min_effective_share: Any, seed: Any) -> None:
    """Raises InvalidArgument for settings of a Selector that are wrong whatever the size of a batch."""
    check_whole("probes", probes, 0)
    check_whole("seed", seed, 0)
    if not isinstance(min_effective_share, int | float) or not 0 <= min_effective_share <= 1:
        raise InvalidArgument(f"min_effective_share is {min_effective_share!r}, expected a number from 0 to 1")


def _check_probes(probes: Any, keep: int) -> None:
    check_whole("probes", probes, 0)
    if probes > keep:
        raise InvalidArgument(f"probes is {probes}, but a batch has {keep} samples; expected at most as many")


def _copied(cotangent: Any, samples: int) -> np.ndarray:
    """[n] of its own, as it is sent later, when the caller may have changed it."""
    values = np.array(as_array(cotangent, "cotangent"))
    if values.ndim != 1 or len(values) > samples:
        raise InvalidArgument(
            f"cotangent has shape {list(values.shape)}, expected [n] for the first n of the {samples} samples that "
            "the step kept"
        )
    return values


def _not_submitted(step: int) -> InvalidArgument:
    return InvalidArgument(f"no candidates were submitted for step {step}, or their result was taken before")
