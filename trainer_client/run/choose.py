"""Which samples a step trains on: as they are drawn, by a fixed likeness to the target, or by a job's weighter.

Knows nothing of models or optimisers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from trainer_client.cadence import Cadence
from trainer_client.job import Job
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder
from trainer_client.run.deliver import deliver
from trainer_client.run.preferences import UNKNOWN, loss_quarters
from trainer_client.run.recorder import Record, Recorder
from trainer_client.run.task import Task, to_tensor
from trainer_client.run.teach import MetaBatch
from trainer_client.select import Selection, Selector
from trainer_client.select.choice import evenly_in_warm_up, keep_highest
from trainer_client.select.seen import TimesSeen, content_keys
from weighting_contract.columns import COLUMNS
from weighting_contract.ngrams import ngram_log_ratio

_SAMPLES_AT_ONCE = 4096


@dataclass(frozen=True)
class Choice:
    """The samples of a step."""

    indices: np.ndarray  # [B] int64, of the training samples
    drawn: np.ndarray  # [D] int64, those that they were chosen from, in the order of the step
    probes: int  # of the batch, drawn evenly; they come first
    fallback: bool = False  # the first of those drawn, as the weighter did not answer
    computed: int = 0  # of those drawn, what a service's reference computed for the choice
    quarters: np.ndarray | None = None  # [B], as of `loss_quarters` among those drawn, -1: not known; None: nowhere
    metrics: dict[str, Any] = field(default_factory=dict)  # of the choice


class Chooser(Protocol):
    """Gives each step its samples."""

    def choose(self, step: int) -> Choice:
        """The samples of a step, the same ones every time it is asked about a step that was trained."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class LooksAhead(Protocol):
    """A chooser that asks somebody, which takes a while."""

    def look_ahead(self, step: int) -> None:
        """Sends for what later steps choose from; returns at once.

        Called within a step, best in its backward pass: while that runs, the thread that sends and reads answers has
        the interpreter to itself.
        """


class AsDrawn:
    """The batch as it is drawn."""

    def __init__(self, order: BatchOrder) -> None:
        self._order = order

    def choose(self, step: int) -> Choice:
        indices = self._order.indices(step)
        return Choice(indices, indices, probes=len(indices))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class MostAlike:
    """Of the step's candidates those most like the validation samples, by hashed n-grams; no service, nothing learned.

    A sample's likeness is the mean log ratio of its n-grams, validation against training samples (DSIR, Xie et al.
    2023, arXiv 2302.03169; without its resampling noise).
    """

    def __init__(self, task: Task, keep: int, warm_up: int = 0) -> None:
        """
        Args:
            keep: samples of a batch.
            warm_up: first steps, in which some are drawn evenly (`evenly_in_warm_up`).
        """
        self._task, self._keep, self._warm_up = task, keep, warm_up
        self._likeness = likeness(task)

    def choose(self, step: int) -> Choice:
        drawn = self._task.candidate_order.indices(step)
        evenly = evenly_in_warm_up(step, self._keep, self._warm_up)
        kept = keep_highest(self._likeness[drawn], self._keep, evenly, (self._task.seed, step))
        return Choice(drawn[kept], drawn, evenly)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def likeness(task: Task) -> np.ndarray:
    """[N] float32 mean n-gram log ratio of every training sample, validation against training samples."""
    parts, table = [], task.target_table(task.val.tokens)
    for start in range(0, len(task.train), _SAMPLES_AT_ONCE):
        tokens = to_tensor(task.train.tokens[start : start + _SAMPLES_AT_ONCE], torch.device("cpu"))
        parts.append(ngram_log_ratio(tokens, torch.ones_like(tokens, dtype=torch.bool), table).numpy())
    return np.concatenate(parts)


class Selected:
    """Of the step's candidates those that a job's weighter prefers, scored some steps ahead, on record before use.

    A step that is on record is not scored again. That makes a resumed run exact also where the weighter went on
    learning: whatever was scored ahead is on record before a later meta-update can reach the weighter's log.
    """

    def __init__(
        self,
        job: Job,
        recorder: Recorder,
        config: RunConfig,
        task: Task,
        cadence: Cadence,
        columns: tuple[str, ...] = COLUMNS,
    ) -> None:
        """
        Args:
            columns: what the weighter reads of each sample, in its order.
        """
        self._job, self._recorder, self._task, self._cadence = job, recorder, task, cadence
        self._columns = columns
        self._steps, self._ahead = config.steps, config.ahead
        self._keep, self._probes = config.batch_size, config.probes
        self._warm_up = config.warm_up_of("dwm")
        self._selector = Selector(
            job,
            keep=self._keep,
            probes=self._probes,
            min_effective_share=config.select_min_share,
            seed=config.seed,
            from_first=True,
        )
        self._contents = _contents(task)
        self._seen = TimesSeen(config.ahead, config.wear)
        self._next = 0  # step to be submitted next
        self._taught = 0  # meta-updates handed over by this run
        self._taught_before: dict[int, int] = {}  # their number when a step was submitted
        self._selections: dict[int, Selection] = {}  # of steps not yet trained
        self.wait_seconds = 0.0  # that training has waited for selections
        self.computed_again = 0  # samples that a reference computed beside those of the choices

    def choose(self, step: int) -> Choice:
        self._next = max(self._next, step)
        self._submit_to(step + self._ahead - (self._ahead > 1))  # then the last one by `look_ahead`
        record = self._on_record(step)
        for trained in [s for s in self._selections if s < step]:
            del self._selections[trained]
        drawn = self._task.candidate_order.indices(step)
        kept = drawn[record.kept]
        self._seen.trained(step, self._contents[kept])
        metrics = {
            "selected": int(not record.fallback),
            "position": record.position,
            "staleness": max(0, self._taught - record.taught),  # records of an older cadence know of more
            "trust": record.trust,
        }
        return Choice(kept, drawn, record.probes, record.fallback, record.computed, record.quarters, metrics)

    def look_ahead(self, step: int) -> None:
        self._submit_to(step + self._ahead)

    def learn(self, batch: MetaBatch) -> bool:
        """Teaches with the first samples of the step's batch; whether there was something to teach."""
        self._submit_to(batch.step + self._ahead)
        for step in range(batch.step + 1, self._next):
            self._on_record(step)
        if self._on_record(batch.step).fallback:
            return False
        if batch.step > self._job.last_step:  # else it is in the weighter's log since before a resume
            selection = self._selections.get(batch.step) or self._selected_again(batch.step)
            if not self._selector.teach(batch.step, batch.cotangent, selection):
                return False
        self._taught += 1
        return True

    def flush(self, step: int) -> None:
        """Delivers the meta-updates of the steps before `step`, as far as the service is there to take them."""
        if step < self._steps:  # the selector works in order: what was submitted after a meta-update comes after it
            self._next = max(self._next, step)
            self._submit_to(step + self._ahead)
            for ahead in range(step, self._next):
                self._on_record(ahead)
        else:
            self._selector.close()
        deliver(self._job)

    def state_dict(self) -> dict[str, Any]:
        return {
            "job": self._job.state_dict(),
            "taught": self._taught,
            "wait_seconds": self.wait_seconds,
            "computed_again": self.computed_again,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._job.load_state_dict(state["job"])
        self._taught, self.wait_seconds = state["taught"], state["wait_seconds"]
        self.computed_again = state["computed_again"]

    def _submit_to(self, last: int) -> None:
        """Has everything up to step `last` scored that is not on record."""
        for step in range(self._next, min(last, self._steps - 1) + 1):
            if self._recorder.get(step) is None:
                drawn = self._task.candidate_order.indices(step)
                taught = self._probes if self._cadence.due(step) else 0
                self._selector.submit(
                    step,
                    self._task.train.tokens[drawn],
                    probes=max(taught, evenly_in_warm_up(step, self._keep, self._warm_up)),
                    wear=self._seen.wear(step, self._contents[drawn]),
                )
                self._taught_before[step] = self._taught
            self._next = step + 1

    def _on_record(self, step: int) -> Record:
        known = self._recorder.get(step)
        if known is not None:
            return known
        started = time.perf_counter()
        selection = self._selector.result(step)
        self.wait_seconds += time.perf_counter() - started
        self._selections[step] = selection
        record = Record(
            step=step,
            weights=np.ones(len(selection.kept), np.float32),
            kept=selection.kept,
            probes=int(selection.probes.sum()),
            position=selection.position,
            fallback=selection.fallback,
            trust=selection.trust,
            taught=self._taught_before.pop(step),
            computed=0 if selection.fallback else self._computed(selection.computed_samples),
            quarters=_quarters(selection, self._columns),
        )
        self._recorder.append(record)
        return record

    def _selected_again(self, step: int) -> Selection:
        """The selection of a step on record, scored once more for its statistics: they are the reference's alone."""
        record = self._on_record(step)
        tokens = self._task.train.tokens[self._task.candidate_order.indices(step)]
        scores = self._job.score(tokens=tokens, step=step, return_statistics=True)
        self.computed_again += 0 if scores.fallback else self._computed(scores.computed_samples)
        return Selection(
            step=step,
            kept=record.kept,
            probes=np.arange(len(record.kept)) < record.probes,
            statistics=None if scores.statistics is None else scores.statistics[record.kept],
            position=record.position,
            fallback=record.fallback,
            trust=record.trust,
            weights=record.weights,
        )

    def _computed(self, said: int | None) -> int:
        """Samples of one score that the reference computed; all candidates where an older service doesn't say."""
        return self._task.candidate_order.batch_size if said is None else said


def _contents(task: Task) -> np.ndarray:
    """[N] uint64 of all training samples."""
    tokens = task.train.tokens
    parts = range(0, len(tokens), _SAMPLES_AT_ONCE)
    return np.concatenate([content_keys(tokens[start : start + _SAMPLES_AT_ONCE]) for start in parts])


def _quarters(selection: Selection, columns: tuple[str, ...]) -> np.ndarray:
    """[B] int8: by the reference's loss among the candidates, where the weighter reads it."""
    if selection.all_statistics is None or "loss_z" not in columns:
        return np.full(len(selection.kept), UNKNOWN, np.int8)
    quarters = loss_quarters(selection.all_statistics[:, columns.index("loss_z")])
    return np.asarray(quarters[selection.kept])
