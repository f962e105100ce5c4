"""`select`: any loader's batches, chosen from several times as many candidates that are scored ahead.

Knows loaders as iterables that may have a state, and a Selector that does the rest.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np

from trainer_client.cadence import Cadence, usual_cadence
from trainer_client.counters import unexpected
from trainer_client.job import Job
from trainer_client.select.choice import WARM_UP, Selection, evenly_in_warm_up
from trainer_client.select.collate import Tokens, count_rows, find_tokens, join, pick
from trainer_client.select.seen import TIMES_TO_WEAR, TimesSeen, keys_of
from trainer_client.select.selector import Selector, check_settings, check_whole
from weighting_contract.errors import InvalidArgument, WeighbridgeError


def select(
    loader: Iterable[Any],
    job: Job,
    *,
    candidates: int = 4,
    probes: int = 4,
    ahead: int = 2,
    min_effective_share: float = 0.1,
    seed: int = 0,
    tokens: Tokens = None,
    start_step: int = 0,
    cadence: Cadence | None = None,
    wear: float = TIMES_TO_WEAR,
    warm_up: int = WARM_UP,
) -> SelectedBatches:
    """Batches of the loader's own structure and size B, each chosen from `candidates` successive ones.

    Args:
        loader: any iterable of batches as torch's `default_collate` makes them: a tensor, dict, list, (named) tuple or
            nesting of these, lists of strings among them. Its first batch decides B.
        job: opened with a reference, or with a weighter that reads tokens.
        candidates: M, batches that one is chosen from.
        probes: samples of a batch that is to be taught with which are drawn evenly, whatever their weight; with two or
            more it counts for the job's trust.
        ahead: steps whose candidates are read and being scored while a step is trained on.
        min_effective_share: least effective sample size of the weights over the candidates / their number.
        seed: of the draws, together with the step.
        tokens: where the token ids are: None: "input_ids", or the first integer tensor of two dimensions; a key; or a
            callable that takes a batch and returns the ids [N, T], padded on the right, or ids and lengths, or texts.
        start_step: of the first batch, where a run goes on that keeps no `state_dict` of this.
        cadence: the steps to be taught in, None: `Cadence()`, or `CADENCE_TAUGHT` of a frozen job.
            `SelectedBatches.due` says when one has come.
        wear: times that a content is trained on, beyond twice the usual, that divide its weight by e
            (`TimesSeen.wear`); 0: never.
        warm_up: first steps of a new model, in which a falling share of each batch is drawn evenly
            (`evenly_in_warm_up`); 0 for a model that was trained before.

    Raises:
        InvalidArgument: numbers that can't be right; while iterating, batches that nothing can be chosen from.
    """
    return SelectedBatches(
        loader,
        job,
        candidates,
        probes,
        ahead,
        min_effective_share,
        seed,
        tokens,
        start_step,
        cadence or usual_cadence(chooses=True, frozen=job.frozen),
        wear,
        warm_up,
    )


@dataclass(frozen=True)
class _Group:
    """The candidates of a step."""

    batch: Any
    rows: int
    loader_state: Any  # of the loader once it had given them; None: it has none
    contents: np.ndarray | None  # [rows] uint64; None: not known


class SelectedBatches:
    """Made by `select`. Iterate it once an epoch, as the loader; `close` it, or close the job.

    Every batch counts as a step. At the end of an epoch there may be fewer than M batches to choose from: that is fine
    as long as they hold more than B samples; else they come as they are, counted as unselected.

    Attributes:
        current: the Selection of the batch that was given last; None before the first.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        job: Job,
        candidates: int,
        probes: int,
        ahead: int,
        min_effective_share: float,
        seed: int,
        tokens: Tokens,
        start_step: int,
        cadence: Cadence,
        wear: float,
        warm_up: int,
    ) -> None:
        check_whole("candidates", candidates, 1)
        check_whole("warm_up", warm_up, 0)
        check_whole("ahead", ahead, 0)
        check_whole("start_step", start_step, 0)
        check_settings(probes, min_effective_share, seed)
        if not isinstance(wear, int | float) or not 0 <= wear < math.inf:
            raise InvalidArgument(f"wear is {wear!r}, expected a finite number of times, or 0 for none")
        self.current: Selection | None = None
        self._loader, self._job, self._tokens = loader, job, tokens
        self._candidates, self._ahead = candidates, ahead
        self._probes, self._min_effective_share, self._seed = probes, min_effective_share, seed
        self._cadence, self._warm_up = cadence, warm_up
        self._seen = TimesSeen(ahead, wear)
        self._selector: Selector | None = None  # made once the first batch has shown its size
        self._submitted = False
        self._looked_ahead = False  # in the present step, so the next one may be expected to do so, too
        self._groups: Iterator[list[Any]] = iter(())  # of candidates, of this epoch
        self._waiting: deque[_Group] = deque()  # being scored, the step that comes next first
        self._step = start_step  # of the next batch
        self._batch_size: int | None = None  # B: of the very first batch, as the first after a resume may be short
        self._given = False  # whether the state below is that of the last batch given, or was loaded
        self._loader_state: Any = None

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch. Raises InvalidArgument where the loader's batches do not fit together."""
        self._forget_waiting()
        self._groups = groups = self._grouped(iter(self._loader))
        try:
            while True:
                later = self._looked_ahead and self._ahead > 1  # the last one by `look_ahead`, before the backward pass
                self._looked_ahead = False
                self._submit_to(self._ahead + 1 - later)
                if not self._waiting:
                    return
                yield self._take(self._waiting.popleft())
        finally:
            if self._groups is groups:  # else the next epoch has begun
                self._forget_waiting()

    def look_ahead(self) -> None:
        """Has the last of the candidates that are scored ahead sent here, not when the step's batch is taken.

        For right before the backward pass: while that runs, the thread that sends them and reads the answer has the
        interpreter to itself; else it shares it with the forward pass, which then takes longer. The batches are the
        same, called or not. It reads the loader, as taking a batch does. With an `ahead` below 2 nothing is left for
        it, as the answer would have the backward pass alone to come in.

        Raises:
            InvalidArgument: as iterating.
        """
        self._looked_ahead = True
        self._submit_to(self._ahead)

    @property
    def due(self) -> bool:
        """Whether the batch that was given last is to be taught with; its probes lead it."""
        return self.current is not None and self._cadence.due(self.current.step)

    def teach(self, cotangent: Any, *, update_id: str | None = None) -> bool:
        """Teaches the weighter with the cotangent of the first n samples of the batch that was given last.

        Args and Returns: as of `Selector.teach`. Raises InvalidArgument before the first batch.
        """
        if self.current is None:
            raise InvalidArgument("there is no batch to teach with yet; teach inside of the loop over the batches")
        self._submit_to(self._ahead)  # before it: what the weights of a step have learned depends on that order
        return self._made_selector().teach(self.current.step, cotangent, self.current, update_id=update_id)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are as of the last one that was given: what was read ahead of it will be read again.

        "step" is that of the next batch, "batch_size" B, or None before the first batch, "loader" the loader's own
        `state_dict()`, or None where it has none: then whoever goes on brings the loader to its place himself. The job
        has a state of its own.
        """
        loader = self._loader_state if self._given else self._snapshot()
        seen = self._seen.state_dict()
        return {"step": self._step, "batch_size": self._batch_size, "loader": loader, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that was given last when the state was taken; call it before iterating.

        Raises:
            InvalidArgument: no such state, or one of a loader that has a state for a loader that has none.
        """
        if not isinstance(state, dict) or "loader" not in state or not isinstance(state.get("step"), int):
            raise InvalidArgument(f"state must be what SelectedBatches.state_dict returned, got {state!r}")
        self._forget_waiting()
        if "seen" in state:  # not of a version that did not count
            self._seen.load_state_dict(state["seen"])
        if state["loader"] is not None:
            load = getattr(self._loader, "load_state_dict", None)
            if load is None:
                raise InvalidArgument(
                    f"the state has one of the loader, but a {type(self._loader).__name__} takes none; expected a "
                    "loader with load_state_dict, such as a StatefulDataLoader"
                )
            load(copy.deepcopy(state["loader"]))
        self._step, self._given, self._loader_state = state["step"], True, state["loader"]
        self._batch_size = state.get("batch_size")

    def close(self) -> None:
        """Hands over what is still to be taught, and ends the scoring; idempotent."""
        if self._selector is not None:
            self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _forget_waiting(self) -> None:
        """After a loop that was left early."""
        for step in range(self._step, self._step + len(self._waiting)):
            self._made_selector().forget(step)
        self._groups = iter(())
        self._waiting.clear()

    def _submit_to(self, waiting: int) -> None:
        """Has so many steps wait, as far as there are candidates for them."""
        while len(self._waiting) < waiting and (batches := next(self._groups, None)):
            self._waiting.append(self._submit(self._step + len(self._waiting), batches))

    def _grouped(self, source: Iterator[Any]) -> Iterator[list[Any]]:
        while batches := list(islice(source, self._candidates)):
            yield batches
            if len(batches) < self._candidates:
                return

    def _submit(self, step: int, batches: list[Any]) -> _Group:
        batch = join(batches)
        rows = count_rows(batch)
        if self._selector is None:
            self._batch_size = self._batch_size or count_rows(batches[0])
            self._selector = Selector(
                self._job,
                keep=self._batch_size,
                probes=self._probes,
                min_effective_share=self._min_effective_share,
                seed=self._seed,
            )
        contents = None
        try:
            tokens, lengths = find_tokens(batch, self._tokens)
            contents = keys_of(tokens, lengths)
        except Exception as exc:
            if not self._submitted or self._job.on_failure == "raise":
                raise  # a mistake in the settings, before anything was trained
            error = exc if isinstance(exc, WeighbridgeError) else unexpected("tokens", exc)
            self._selector.refuse(step, rows, error)
        else:
            probes = self._probes if self._cadence.due(step) else 0
            probes = max(probes, evenly_in_warm_up(step, self._selector.keep, self._warm_up))
            wear = None if contents is None else self._seen.wear(step, contents)
            self._selector.submit(step, tokens, lengths, probes=probes, wear=wear)
            self._submitted = True
        return _Group(batch, rows, self._snapshot(), contents)

    def _take(self, group: _Group) -> Any:
        self.current = self._made_selector().result(self._step)
        self._loader_state, self._given = group.loader_state, True
        if group.contents is not None:
            self._seen.trained(self._step, group.contents[self.current.kept])
        self._step += 1
        if self.current.fallback and len(self.current.kept) == group.rows:
            return group.batch
        return pick(group.batch, self.current.kept)

    def _snapshot(self) -> Any:
        state_dict = getattr(self._loader, "state_dict", None)
        return None if state_dict is None else copy.deepcopy(state_dict())  # it may be a view of what moves on

    def _made_selector(self) -> Selector:
        assert self._selector is not None  # by the first batch
        return self._selector
