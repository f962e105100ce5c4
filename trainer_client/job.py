"""One pretraining run attached to a weighter: what a training loop calls. Training never stops because of it.

Every method obeys `on_failure`. "uniform": whatever goes wrong, score answers uniform weights and meta_update answers
nothing; the failure is counted, and logged once per kind. "raise": failures are raised, for debugging.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import wire
from trainer_client.asking import Asking, Scores
from trainer_client.counters import Counters, Tally, unexpected
from trainer_client.link import Deadline, JobLink, checked_state
from trainer_client.pending import Background, Pending, finished
from trainer_client.sender import Sender
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import (
    FailedPrecondition,
    InvalidArgument,
    WeighbridgeError,
)

OnFailure = Literal["uniform", "raise"]
Estimator = Literal["vjp", "score_function"]
Answer = TypeVar("Answer")

__all__ = ["Estimator", "Job", "OnFailure", "Scores"]


class Job:
    """Made by `Client.open_job`. Methods may be called from any thread; `close` it, or use it as a context manager."""

    def __init__(
        self,
        link: JobLink,
        *,
        timeouts: Timeouts,
        limits: Limits,
        on_failure: OnFailure,
        read_your_writes: bool,
    ) -> None:
        self._link = link
        self._timeouts = timeouts
        self._on_failure = on_failure
        self._tally = Tally()
        self._before_close: list[Callable[[], None]] = []
        self._close_lock = threading.Lock()
        self._closed = False
        self._sender = Sender(link, timeouts, limits, self._tally)
        self._asking = Asking(link, self._sender, timeouts, limits, read_your_writes)
        self._background = Background(f"weighbridge-score-{link.job_id}")

    @property
    def job_id(self) -> str:
        return self._link.job_id

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def frozen(self) -> bool:
        """Whether it only scores; its meta-updates are for its trust alone."""
        return self._link.frozen

    @property
    def attached(self) -> bool:
        """Whether the service knows this job; while it doesn't, weights are uniform and attaching goes on."""
        return self._link.attached

    @property
    def away(self) -> bool:
        """Whether nothing can be delivered for now: not attached, or the service did not answer the last call."""
        return self._link.away

    @property
    def failure(self) -> WeighbridgeError | None:
        """Why the job is not attached; None while it is."""
        return None if self._link.attached else self._link.failure

    @property
    def last_step(self) -> int:
        """Highest step that the weighter was taught by this job, earlier runs of it included; -1: none."""
        return self._link.last_step

    @property
    def last_position(self) -> int:
        """Position of this job's last acknowledged meta-update, 0: none."""
        return self._link.last_position

    @property
    def counters(self) -> Counters:
        return self._tally.snapshot()

    def score(
        self,
        features: Any = None,
        step: int = 0,
        *,
        hidden: Any = None,
        tokens: Any = None,
        lengths: Any = None,
        texts: Any = None,
        min_position: int | None = None,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Scores:
        """Weights for the batch of an optimiser step; returns when they are there, or can't be.

        `score_soon` is the same and returns at once. Weights by tokens alone are fetched ahead of their step instead:
        `trainer_client.select`.

        Args:
            features: [B, F] floating, columns as in `feature_names`, or as in the weighter's spec.
            step: of the optimiser.
            hidden: [B, H] floating, a pooled hidden state.
            tokens: [B, T] integer ids, rows padded on the right.
            lengths: [B] integer, real tokens of each row; absent: T.
            texts: B strings, instead of tokens.
            min_position: the weights come from this position or a later one. None: with `read_your_writes` that of
                this job's last update, for which outstanding ones are awaited; else any.
            min_effective_share: least effective sample size / B, in place of the spec's.
            return_statistics: have what the job's reference gave sent back, for `meta_update` to be given as features.

        Returns:
            Weights of mean 1. On a failure all 1 with `fallback=True`; of shape [1], which broadcasts, where not even B
            can be told from the inputs.

        Raises:
            WeighbridgeError: only with `on_failure="raise"`.
        """
        batch = wire.Batch(features, hidden, tokens, lengths, texts)

        def score() -> Scores:
            scores = self.ask(batch, step, min_position, min_effective_share, return_statistics)
            self._tally.add("scored")
            return scores.like(batch)

        return self._guarded("score", "score_seconds", score, partial(self._fallback, batch, step))

    def score_soon(
        self,
        features: Any = None,
        step: int = 0,
        *,
        hidden: Any = None,
        tokens: Any = None,
        lengths: Any = None,
        texts: Any = None,
        min_position: int | None = None,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Pending[Scores]:
        """`score` that returns at once; `result()` of what it returns waits for the answer, or what takes its place.

        Calls go out one after the other, from a thread of the job; the inputs are read before this returns. `features`
        may also be a function that makes them: that thread calls it, so the caller needn't wait for statistics either.
        Weights are needed where the backward pass is halfway through the output layer:
        `trainer_client.late_weights.late_weights` takes them there. A meta-update waits for the calls before it, so
        that their weights never come from it.

        Args, Returns, Raises: as of `score`; errors are raised here or by `result()`.
        """

        def made(features: Any) -> wire.Batch:
            return wire.Batch(features, hidden, tokens, lengths, texts)

        def requested(batch: wire.Batch) -> pb.ScoreRequest:
            return self._request(batch, step, min_effective_share, return_statistics)

        def answered(batch: wire.Batch, request: Callable[[], pb.ScoreRequest]) -> Scores:
            def score() -> Scores:
                self._check_open()
                scores = self._asking.send(batch, request(), min_position)
                self._tally.add("scored")
                return scores.like(batch)

            return self._guarded("score", "ahead_seconds", score, partial(self._fallback, batch, step))

        def from_function() -> Scores:
            try:
                batch = made(features())
            except Exception as exc:
                return self._fallback(made(None), step, unexpected("features", exc))
            return answered(batch, partial(requested, batch))

        def send() -> Future[Scores]:
            if callable(features):
                return self._background.submit(from_function)
            batch = made(features)
            request = requested(batch)
            return self._background.submit(lambda: answered(batch, lambda: request))

        def failed(exc: WeighbridgeError) -> Future[Scores]:
            batch = made(None if callable(features) else features)
            return finished(partial(self._fallback, batch, step, exc))

        future = self._guarded("score", "score_seconds", send, failed)
        return Pending(future, lambda seconds: self._tally.add("score_seconds", seconds))

    def meta_update(
        self,
        cotangent: Any,
        features: Any = None,
        step: int = 0,
        *,
        hidden: Any = None,
        tokens: Any = None,
        lengths: Any = None,
        texts: Any = None,
        scored_position: int | None = None,
        estimator: Estimator = "vjp",
        update_id: str | None = None,
        probes: Any = None,
    ) -> None:
        """Teaches the weighter with the cotangent of a batch; delivered in the background, in order, exactly once.

        Args:
            cotangent: [B] dL_val/dw, finite and not constant.
            features, step, hidden, tokens, lengths, texts: as for `score`.
            scored_position: `Scores.position` of the step's weights; None: that of the last score.
            estimator: "vjp" for samples as they were drawn, "score_function" for samples selected by their weights.
            update_id: idempotency key within the job; None: the step.
            probes: [B] bool, the samples that were drawn evenly, whatever their weight: an update with two or more
                counts for the job's trust. A frozen job's with fewer are refused.

        Raises:
            WeighbridgeError: only with `on_failure="raise"`; there also for an earlier update that was refused.
        """
        batch = wire.Batch(features, hidden, tokens, lengths, texts)

        def teach() -> None:
            self._background.wait()
            self._raise_background_error()
            self._tally.add("updates_sent")
            request = self._update_request(batch, cotangent, step, scored_position, estimator, update_id)
            if probes is not None:
                request.probes.CopyFrom(wire.probes_message(probes, batch.rows() or 0))
            elif self.frozen:
                raise FailedPrecondition(
                    "this job is frozen, it scores only, and sends probes to earn its trust; open it with "
                    "role='learn' to teach"
                )
            self._sender.put(request)

        self._guarded("meta_update", "meta_seconds", teach, lambda exc: self._refused(step, exc))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Whether every meta-update was delivered or given up within `timeout_s` (None: `Timeouts.close_s`)."""
        done = self._sender.wait(self._timeouts.close_s if timeout_s is None else timeout_s)
        self._raise_background_error()
        return done

    def close(self) -> None:
        """Delivers what is outstanding within `Timeouts.close_s`, then closes the job; idempotent, never raises.

        It does not wait for a service that is away. Updates that are not delivered count as dropped.
        """
        deadline = Deadline(self._timeouts.close_s)
        for finish in self._before_close:
            finish()
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        self._background.close(deadline.left_s())
        self._sender.wait(deadline.left_s(), until=lambda: self._link.away)
        call_s = self._timeouts.score_s if self._link.away else self._timeouts.close_s
        self._sender.stop(min(deadline.left_s(), call_s))
        self._link.close(min(deadline.left_s(), self._timeouts.admin_s))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with this job, in plain JSON values.

        That is job_id, last_step, last_position, and as "kept" the newest acknowledged updates, for a service that was
        restored from a state before them (`connect`, on_older_service).
        """
        return {
            "job_id": self._link.job_id,
            "last_step": self._link.last_step,
            "last_position": self._link.last_position,
            "kept": self._sender.kept(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the job of a checkpoint; updates of steps that are replayed are duplicates and change nothing.

        Raises:
            InvalidArgument: `state` is not what `state_dict` returns.
            FailedPrecondition: with `on_older_service="stop"`, whatever `on_failure` says: the service is older than
                the checkpoint. Where that is found only later, as it is away now, `failure` says it.
            WeighbridgeError: with `on_failure="raise"`, where the job can't be attached.
        """
        job_id, last_step, last_position = checked_state(state)
        if job_id != self._link.job_id:
            deadline = Deadline(self._timeouts.close_s)
            self._sender.wait(deadline.left_s(), until=lambda: not self._link.usable)
            self._link.close(deadline.left_s())  # it was opened under an id that nobody goes on with
        self._sender.keep(state.get("kept", []))
        self._link.restore(job_id, last_step, last_position)
        try:
            self._link.attach(self._timeouts.admin_s)
        except WeighbridgeError:
            if self._on_failure == "raise" or self._link.stopped:
                raise
        finally:
            self._sender.wake()  # for the updates that waited

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- For what stands between a job and a training loop, such as a Selector ---------------------------------------

    @property
    def timeouts(self) -> Timeouts:
        return self._timeouts

    @property
    def on_failure(self) -> OnFailure:
        return self._on_failure

    @property
    def tally(self) -> Tally:
        return self._tally

    @property
    def position(self) -> int:
        """Of the weighter, as last heard."""
        return self._link.position

    def refuse(self, step: int, exc: WeighbridgeError) -> None:
        """Counts a meta-update that can't be sent, or, with `on_failure="raise"`, raises why."""
        self._tally.add("updates_sent")
        self._refused(step, exc)

    def before_close(self, finish: Callable[[], None]) -> None:
        """Has `close` call `finish` first, while updates can still be sent; it must be idempotent and never raise."""
        self._before_close.append(finish)

    def ask(
        self,
        batch: wire.Batch,
        step: int,
        min_position: int | None = None,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Scores:
        """`score` in numpy that counts nothing, and raises WeighbridgeError whatever `on_failure` says."""
        request = self._request(batch, step, min_effective_share, return_statistics)
        return self._asking.send(batch, request, min_position)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _request(self, batch: wire.Batch, *settings: Any) -> pb.ScoreRequest:
        self._raise_background_error()
        self._check_open()
        return self._asking.request(batch, *settings)

    def _guarded(
        self, method: str, seconds: str, work: Callable[[], Answer], otherwise: Callable[[WeighbridgeError], Answer]
    ) -> Answer:
        """The answer of `work`, or of `otherwise` to whatever went wrong; the time is added to a counter."""
        started = time.perf_counter()
        try:
            return work()
        except WeighbridgeError as exc:
            return otherwise(exc)
        except Exception as exc:
            return otherwise(unexpected(method, exc))
        finally:
            self._tally.add(seconds, time.perf_counter() - started)

    def _fallback(self, batch: wire.Batch, step: int, exc: WeighbridgeError) -> Scores:
        if self._on_failure == "raise":
            raise exc
        self._tally.fallback(exc.code)
        self._tally.warn_once(f"score {exc.code}", f"uniform weights at step {step} ({exc.code}): {exc.message}", exc)
        return Scores.uniform(batch.rows() or 1, self._link.position).like(batch)

    def _update_request(
        self,
        batch: wire.Batch,
        cotangent: Any,
        step: int,
        scored_position: int | None,
        estimator: str,
        update_id: str | None,
    ) -> pb.MetaUpdateRequest:
        self._check_open()
        self._link.check_not_stopped()
        if estimator not in wire.ESTIMATORS:
            raise InvalidArgument(f"estimator is {estimator!r}, expected one of {', '.join(wire.ESTIMATORS)}")
        return pb.MetaUpdateRequest(
            job_id=self._link.job_id,
            update_id=str(step) if update_id is None else update_id,
            step=step,
            inputs=batch.message(),
            cotangent=wire.cotangent_message(cotangent),
            scored_position=self._link.position if scored_position is None else scored_position,
            estimator=wire.ESTIMATORS[estimator],
            trust_only=self.frozen,
        )

    def _refused(self, step: int, exc: WeighbridgeError) -> None:
        if self._on_failure == "raise":
            raise exc
        self._tally.add("updates_refused")
        self._tally.warn_once(f"refused {exc.code}", f"the meta-update of step {step} was refused: {exc.message}", exc)

    def _raise_background_error(self) -> None:
        if self._on_failure == "raise" and (error := self._sender.take_error()):
            raise error

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition("the job is closed; open it again to go on")
