"""What a weighter costs the training step, in the demo's setting, beside no weighter at all.

    python -m benchmarks.overhead [--size nano] [--rounds 16]

The service is a process of its own with one CPU thread, and scores by a reference of the demo's recipe; the training
has a thread, too. Every kind of training goes on in turns, in blocks of steps, so that whatever else the machine does
meets all alike, and with one model, as where its parameters lie in memory makes up to a hundredth. A figure is the
median over rounds of a block's time over that of the block without a weighter beside it. `learn` teaches at the cadence
of a fresh weighter, `frozen` sends what a job's trust is earned by, as often as `run` does once the first steps are
over, with the samples that the demo takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, goal
from benchmarks.score import start_service
from trainer_client import Client, Job, Limits, Timeouts, connect
from trainer_client.cadence import CADENCE_INSIDE, CADENCE_TAUGHT
from trainer_client.features import batch_features
from trainer_client.hypergradient import cotangent
from trainer_client.late_weights import late_weights
from trainer_client.loss import per_sample_loss
from trainer_client.reference.__main__ import main as make_reference
from trainer_client.run.forward import sample_losses, token_losses
from trainer_client.run.models import build_model
from trainer_client.select import Selector
from weighting_contract.columns import COLUMNS
from weighting_contract.errors import Unavailable
from weighting_contract.memory import keep_freed_memory
from weighting_contract.ngrams import count_ngrams, log_ratios, profile_table

REFERENCE = "demo"
VOCABULARY, TOKENS, BATCH, CANDIDATES, AHEAD, PROBES = 1024, 64, 32, 5, 2, 4
TAUGHT, VALIDATION, LEARNING_RATE = 12, 4, 2e-3
NEW = 5  # one candidate in so many has not been scored before, as in the demo: its pool is passed five times
BLOCK = 50  # steps, a multiple of all cadences
GOALS = {"frozen": 0.02, "learn": 0.08}
PATIENT = Timeouts(score_s=60, meta_update_s=60, admin_s=60, close_s=60)
EVERY = {"learn": CADENCE_INSIDE.every, "frozen": CADENCE_TAUGHT.every}  # steps, once the first are over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="nano", help="of the model that is trained")
    parser.add_argument("--rounds", type=int, default=16)
    given = parser.parse_args()
    print(describe())
    keep_freed_memory()  # as `run` does
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        if make_reference(["--threads", "1", "--out", str(models / REFERENCE)]):
            return 1
        service, port, _ = start_service(Path(folder) / "state", "--models", str(models))
        try:
            url, limits = f"grpc://127.0.0.1:{port}", Limits(breaker_period_s=0.5, breaker_max_period_s=0.5)
            with connect(url, timeouts=PATIENT, limits=limits, on_failure="raise") as client:
                trained = Trained(given.size)
                trainings: dict[str, Training] = {"no weighter": Training(trained)}
                for kind, training in (("weight", Weighting), ("select", Selecting)):
                    trainings |= {f"{kind}, {role}": training(trained, client, role) for role in GOALS}
                seconds = measure({name: each.block for name, each in trainings.items()}, given.rounds)
        finally:
            service.terminate()
            service.wait()
    return report(seconds, given.size)


def measure(blocks: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each block by round; in each round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for block in blocks.values():
        block()  # fills caches
    for turn in range(rounds):
        for name in np.random.default_rng(turn).permutation(list(blocks)):
            started = time.perf_counter()
            blocks[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: dict[str, list[float]], size: str) -> int:
    """Prints the ratios; 1 where a goal is missed."""
    without = seconds["no weighter"]
    step_ms = 1e3 * statistics.median(without) / BLOCK
    print(f"{size}, batches of {BATCH} x {TOKENS} tokens: a step without a weighter {step_ms:.1f} ms")
    missed = False
    for name, values in seconds.items():
        if name == "no weighter":
            continue
        overhead = statistics.median(w / v for w, v in zip(values, without, strict=True)) - 1
        most = GOALS[name.rpartition(" ")[2]]
        missed |= overhead > most
        print(f"    {name:<15}{overhead:+.1%}", goal(overhead, most, ".0%"))
    return int(missed)


class Trained:
    """A model and its optimiser."""

    def __init__(self, size: str) -> None:
        self.model = build_model(size, VOCABULARY, TOKENS, seed=0).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)


class Training:
    """Steps without a weighter."""

    def __init__(self, trained: Trained) -> None:
        self.model, self.optimizer = trained.model, trained.optimizer
        self.step = 0

    def block(self) -> None:
        for _ in range(BLOCK):
            self.train(self.batch())
            self.step += 1

    def batch(self) -> torch.Tensor:
        """[B, T+1] token ids of the step."""
        return samples(self.step, BATCH)

    def train(self, tokens: torch.Tensor) -> None:
        losses = self.losses(tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss = per_sample_loss(losses).mean()
        self.ask(tokens, losses.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        self.teach(tokens, losses.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] token losses, with a graph."""
        return token_losses(self.model, tokens)

    def ask(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        """Right before the backward pass, which leaves the interpreter to others."""

    def teach(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        pass

    def cotangent(self, tokens: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """[TAUGHT] of the first samples, as the demo computes it."""
        return cotangent(
            self.model,
            sample_losses,
            tokens[:TAUGHT],
            samples(10**6 + self.step, VALIDATION),
            learning_rate=LEARNING_RATE,
            two_sided=False,
            base_losses=per_sample_loss(losses[:TAUGHT]),
        )


class Weighting(Training):
    """The samples of each batch are weighted by statistics of their losses and against the target, as `run` does."""

    def __init__(self, trained: Trained, client: Client, role: Any) -> None:
        super().__init__(trained)
        spec = {"features": {"names": list(COLUMNS)}}
        self.job = opened(client, weighter=f"weight-{role}", role=role, spec=spec)
        self.every = EVERY[role]
        self.unigram_nll = torch.full((VOCABULARY,), float(np.log(VOCABULARY)))
        target, pool = (count_ngrams(samples(10**6, count).numpy()) for count in (64, 2048))
        self.profile = profile_table(log_ratios(target, pool))

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        with late_weights(self.model.lm_head, lambda: self.pending.result().weights):
            return super().losses(tokens)

    def ask(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        self.pending = self.job.score_soon(lambda: self.features(tokens, losses), self.step)

    def teach(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        if self.step % self.every == 0:
            taught = self.features(tokens[:TAUGHT], losses[:TAUGHT])
            self.job.meta_update(self.cotangent(tokens, losses), taught, self.step, probes=np.ones(TAUGHT, np.bool_))

    def features(self, tokens: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        unigram_nll = self.unigram_nll[tokens[:, 1:]]
        return batch_features(losses, unigram_nll, names=COLUMNS, tokens=tokens, profile=self.profile)


class Selecting(Training):
    """Each batch is chosen from candidates that were scored ahead."""

    def __init__(self, trained: Trained, client: Client, role: Any) -> None:
        super().__init__(trained)
        self.every = EVERY[role]
        self.new = 10**5 * (1 + list(EVERY).index(role))  # candidates of its own, as those of others are known
        documents = list(samples(10**6, 64).numpy())
        self.job = opened(
            client, weighter=f"select-{role}", role=role, initial="pretaught", reference=REFERENCE, profile=documents
        )
        self.selector = Selector(self.job, keep=BATCH, probes=PROBES)
        self.pool = samples(10**7, CANDIDATES * BATCH)
        self.drawn: dict[int, torch.Tensor] = {}  # candidates of steps to come
        for step in range(AHEAD):
            self.submit(step)

    def ask(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        self.submit(self.step + AHEAD)

    def batch(self) -> torch.Tensor:
        self.selection = self.selector.result(self.step)
        return self.drawn.pop(self.step)[torch.from_numpy(self.selection.kept)]

    def submit(self, step: int) -> None:
        new = samples(self.new + step, CANDIDATES * BATCH // NEW)
        self.drawn[step] = torch.cat([new, self.pool[len(new) :]])
        candidates = self.drawn[step].numpy().astype(np.uint16)
        self.selector.submit(step, candidates, probes=PROBES if step % self.every == 0 else 0)

    def teach(self, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        if self.step % self.every == 0:
            self.selector.teach(self.step, self.cotangent(tokens, losses), self.selection)


def opened(client: Client, **arguments: Any) -> Job:
    """A job, once the service has loaded what it needs."""
    until = time.monotonic() + PATIENT.admin_s
    while True:
        try:
            return client.open_job(**arguments)
        except Unavailable:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def samples(step: int, count: int) -> torch.Tensor:
    """[count, T+1] token ids."""
    return torch.from_numpy(np.random.default_rng(step).integers(0, VOCABULARY, (count, TOKENS + 1)))


if __name__ == "__main__":
    raise SystemExit(main())
