"""A training loop as small as can be: a linear model whose losses a job weighs. Every step that it trains is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from trainer_client import Job
from trainer_client.select import Selector

SAMPLES, COLUMNS, KEEP, TOKENS = 6, 3, 3, 9
TAUGHT_EVERY = 4  # steps
SPEC = {"features": {"names": ["a", "b", "c"]}, "head": {"width": 8, "attention_heads": 2}}
DOCUMENTS = [np.arange(i, i + 2 * TOKENS, dtype=np.uint16) for i in range(4)]


class Loop:
    """Steps of training, from `step` on.

    Attributes:
        seconds: that each step took, all that it asked of the job included.
        fallbacks: whether each had no weights of the weighter.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.step = 0
        self.seconds: list[float] = []
        self.fallbacks: list[bool] = []
        self.parameters = np.zeros(COLUMNS)
        self._teaches = True

    def run(self, steps: int, before: Callable[[str], None] = lambda call: None) -> None:
        """Trains. `before` is told the calls of the first step."""
        for i in range(steps):
            started = time.perf_counter()
            self.fallbacks.append(self._train(before if i == 0 else lambda call: None))
            self.seconds.append(time.perf_counter() - started)
            self.step += 1

    def until_weighed(self, timeout_s: float = 20.0) -> None:
        """Trains, without teaching, until the weighter's weights are there and a step that teaches is next."""
        until, self._teaches = time.monotonic() + timeout_s, False
        while True:
            self.run(1)
            if not self.fallbacks[-1] and self.step % TAUGHT_EVERY == 0:
                self._teaches = True
                return
            assert time.monotonic() < until, f"no weights any more: {self.job.failure}, {self.job.counters}"
            time.sleep(0.01)  # as a step with a real model has something to do

    def hand_over(self) -> None:
        """Sees to it that a flush of the job means all that was taught."""

    def close(self) -> None:
        self.job.close()

    def _train(self, before: Callable[[str], None]) -> bool:
        inputs = np.random.default_rng(self.step).normal(size=(SAMPLES, COLUMNS)).astype(np.float32)
        errors = inputs @ self.parameters - inputs.sum(1)  # [B]
        before("score")
        scores = self.job.score(inputs, self.step)
        check_weights(scores.weights)
        self.parameters -= 0.1 * (scores.weights * errors) @ inputs / SAMPLES
        before("meta_update")
        if self._teaches and self.step % TAUGHT_EVERY == 0:
            self.job.meta_update(errors.astype(np.float32), inputs, self.step)
        return scores.fallback


class SelectingLoop(Loop):
    """Each step's batch is chosen from candidates that were scored ahead."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._selector = Selector(job, keep=KEEP, probes=2)
        self._submit(0)

    def _train(self, before: Callable[[str], None]) -> bool:
        before("look-ahead")
        self._submit(self.step + 1)
        selection = self._selector.result(self.step)
        assert sorted(set(selection.kept)) == sorted(selection.kept)
        assert np.isfinite(selection.weights).all()
        if self._teaches and self.step % TAUGHT_EVERY == 0:
            self._selector.teach(self.step, np.arange(KEEP) - 1.0 + self.step % 2, selection)
        return selection.fallback

    def _submit(self, step: int) -> None:
        tokens = np.random.default_rng(step).integers(0, 1024, (SAMPLES, TOKENS)).astype(np.uint16)
        self._selector.submit(step, tokens)

    def hand_over(self) -> None:
        self._selector.close()

    def close(self) -> None:
        self._selector.forget(self.step)
        super().close()


def check_weights(weights: np.ndarray) -> None:
    """All that may ever reach a loss."""
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert abs(weights.mean() - 1) < 1e-2
