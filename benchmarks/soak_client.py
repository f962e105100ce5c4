"""One client that teaches a service that dies, and keeps the books. Knows no twin and no command.

It sends seeded updates in order, each until it is acknowledged, and scores now and then.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np

from benchmarks.forked import ForkedService
from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.tensors import to_message

NAMES = ("loss", "length", "gain", "spread")
SPEC = pb.WeighterSpec(
    features=pb.FeatureSpec(names=NAMES),
    head=pb.HeadSpec(width=8, attention_heads=2),
    learning=pb.LearningSpec(learning_rate=0.01),
)
SAMPLES = 16
WEIGHTER, JOB = "soak", "trainer"
REDIS = "redis-server"  # among the kinds of kills
SCORE_EVERY = 25  # updates

PATIENCE = 500  # updates that a life gets to come by its failpoint
ANSWER_S = 60.0  # longest that the client tries one call with a service that lives


class Redis(Protocol):
    """What a soak asks of a redis-server; `tests/redis_server.py` has one."""

    @property
    def url(self) -> str: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...


@dataclass(frozen=True)
class Death:
    """How one life of the service ends."""

    failpoint: str = ""  # killed by this one; empty: by the timer
    hit: int = 1  # the n-th time that it comes by
    after_s: float = 0.0  # timer: from the start of the process
    redis_after_s: float | None = None  # redis-server is killed too

    @property
    def kind(self) -> str:
        return self.failpoint or "timer"

    @property
    def armed(self) -> str:
        return f"{self.failpoint}=kill@{self.hit}" if self.failpoint else ""


@dataclass
class Trainer:
    """Teaches one weighter of `service`, whatever happens to it, and keeps the books."""

    service: ForkedService
    seed: int
    redis: Redis | None = None
    positions: list[int] = field(default_factory=list)  # acknowledged, by step
    scores: dict[int, bytes] = field(default_factory=dict)  # weights by the position of the state that gave them
    duplicates: int = 0  # acknowledgements that were lost, and given again
    kills: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)  # from a death to the next acknowledgement
    _died_at: float | None = None
    _redis_dead: threading.Event = field(default_factory=threading.Event)

    @property
    def lives(self) -> int:
        """Of the service, ended by a kill."""
        return self.kills.total() - self.kills[REDIS]

    def live(self, death: Death) -> None:
        """Starts the service and teaches until it is dead."""
        self._revive_redis()
        deaths_of_redis = self.kills[REDIS]
        self.service.start(death.armed)
        timers = []
        if not death.failpoint:
            timers.append(threading.Timer(death.after_s, self.service.strike))
        if death.redis_after_s is not None:
            timers.append(threading.Timer(death.redis_after_s, self._kill_redis))
        for timer in timers:
            timer.start()
        patience = len(self.positions) + PATIENCE
        if self._open():
            while len(self.positions) < patience and self._step():
                pass
        for timer in timers:
            timer.cancel()
            timer.join()
        not_reached = not self.service.ended.is_set()
        status = self.service.kill() if not_reached else self.service.wait()
        if status == -signal.SIGKILL:
            self.kills[f"{death.kind} (not reached)" if not_reached else death.kind] += 1
        elif self.kills[REDIS] == deaths_of_redis:  # without Redis it may refuse to start
            raise AssertionError(f"the service ended by itself, status {status}:\n{self.service.last_words()}")
        self._died_at = self.service.ended_at

    def begin(self, failpoint: str = "") -> None:
        """Starts the service for a life that nothing ends. Raises AssertionError where it does not come up."""
        self._revive_redis()
        self.service.start(failpoint)
        if not self._open():
            raise AssertionError(f"the service did not come up:\n{self.service.last_words()}")

    def teach(self, updates: int) -> None:
        """Goes on until `updates` are acknowledged and the scores that are due then are given."""
        while len(self.positions) < updates or self._score_is_due():
            if not self._step():
                raise AssertionError(f"the service died unasked:\n{self.service.last_words()}")

    def audit(self) -> list[int]:
        """Sends every update again; the steps of those that the service does not know, or at another position."""
        lost = []
        for step, position in enumerate(self.positions):
            answer = self._call("MetaUpdate", update(self.seed, step))
            if answer is None or (answer.position, answer.duplicate) != (position, True):
                lost.append(step)
        return lost

    def _open(self) -> bool:
        """Whether the service lives, and has weighter and job."""
        return (
            self.service.ready(meanwhile=self._revive_redis)  # without Redis it would wait for ever
            and self._call("CreateWeighter", pb.CreateWeighterRequest(name=WEIGHTER, spec=SPEC, exist_ok=True))
            is not None
            and self._call("OpenJob", pb.OpenJobRequest(weighter=WEIGHTER, job_id=JOB)) is not None
        )

    def _score_is_due(self) -> bool:
        taught = len(self.positions)
        return taught > 0 and taught % SCORE_EVERY == 0 and taught not in self.scores

    def _step(self) -> bool:
        """The next call; False where the service died on it."""
        if self._score_is_due():
            taught = len(self.positions)
            scores = self._call("Score", score(self.seed, taught, self.positions[-1]))
            if scores is not None:
                self.scores[taught] = b"%d:" % scores.position + scores.weights.data
            return scores is not None
        taught_at = self._call("MetaUpdate", update(self.seed, len(self.positions)))
        if taught_at is None:
            return False
        self.positions.append(taught_at.position)
        self.duplicates += taught_at.duplicate
        if self._died_at is not None:
            self.recovery_s.append(time.monotonic() - self._died_at)
            self._died_at = None
        return True

    def _call(self, method: str, request: Any) -> Any:
        """The answer, however often it takes; None where the service died. Raises grpc.RpcError for a refusal."""
        give_up = time.monotonic() + ANSWER_S
        while not self.service.ended.wait(0):
            try:
                return getattr(self.service.stub, method)(request, timeout=ANSWER_S / 4)
            except grpc.RpcError as exc:
                away = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if exc.code() not in (*away, grpc.StatusCode.RESOURCE_EXHAUSTED) or time.monotonic() > give_up:
                    raise
            self._revive_redis()
            self.service.ended.wait(0.02)
        return None

    def _kill_redis(self) -> None:
        assert self.redis is not None
        self.redis.kill()
        self.kills[REDIS] += 1
        self._redis_dead.set()

    def _revive_redis(self) -> None:
        if self.redis is not None and self._redis_dead.is_set():
            self.redis.restart()
            self._redis_dead.clear()


def inputs(seed: int, step: int) -> np.ndarray:
    """[SAMPLES, len(NAMES)] float32."""
    return np.random.default_rng((seed, step)).normal(size=(SAMPLES, len(NAMES))).astype(np.float32)


def update(seed: int, step: int) -> pb.MetaUpdateRequest:
    """The meta-update of a step: the first column helps."""
    rows = inputs(seed, step)
    noise = np.random.default_rng((seed, step, 1)).normal(size=SAMPLES)
    return pb.MetaUpdateRequest(
        job_id=JOB,
        step=step,
        inputs=pb.Inputs(features=to_message(rows)),
        cotangent=to_message((noise - rows[:, 0]).astype(np.float32)),
        scored_position=step,
    )


def score(seed: int, step: int, min_position: int) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        job_id=JOB, step=step, inputs=pb.Inputs(features=to_message(inputs(seed, step))), min_position=min_position
    )
