"""Scoring ahead: what eight jobs get out of one service together, and what selection costs the training loop.

    python -m benchmarks.ahead [--size micro] [--steps 60] [--rounds 4]

The service is a process of its own with one CPU thread. First one job, then eight at once send the same small batches
of tokens, each waiting for its answer before the next. Then the same training with and without selection, in turns:
frozen, so that nothing is taught, with a look-ahead of two steps, and a service that has seen the candidates before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import describe, goal, goal_at_least, quantile
from benchmarks.score import start_service
from trainer_client import Client, Job, Timeouts, connect

JOBS, SAMPLES, TOKENS, CALLS = 8, 8, 65, 60
GOAL_TOGETHER, GOAL_OVERHEAD = 1.5, 0.02
PATIENT = Timeouts(score_s=60, meta_update_s=60, admin_s=60, close_s=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="micro", help="of the model that is trained; the demo's is nano")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        service, grpc_port, _ = start_service(Path(folder) / "state")
        try:
            url = f"grpc://127.0.0.1:{grpc_port}"
            together = measure_together(url)
            overhead = measure_overhead(url, Path(folder), given.size, given.steps, given.rounds)
        finally:
            service.terminate()
            service.wait()
    return int(together < GOAL_TOGETHER or overhead > GOAL_OVERHEAD)


def measure_together(url: str) -> float:
    """Prints both throughputs; their ratio."""
    with connect(url, timeouts=PATIENT, on_failure="raise") as client:
        client.create_weighter("bench", initial="pretaught")
        jobs = [open_job(client, f"bench-{i}") for i in range(JOBS)]
        score(jobs[0], 5)
        # In turns, so that whatever else the machine does meets both alike.
        rates = [(rate(jobs[:1]), rate(jobs)) for _ in range(5)]
    alone, all_of_them = (quantile([float(r[i]) for r in rates], 0.5) for i in (0, 1))
    ratio = all_of_them / alone
    print(
        f"batches of {SAMPLES} x {TOKENS} tokens: one job {alone:,.0f} tokens/s, {JOBS} jobs {all_of_them:,.0f} in all"
    )
    print(f"    ratio {ratio:.2f}", goal_at_least(ratio, GOAL_TOGETHER))
    return ratio


def open_job(client: Client, job_id: str) -> Job:
    documents = np.random.default_rng(0).integers(0, 1024, (16, TOKENS))
    return client.open_job(job_id, weighter="bench", role="frozen", reference="pretaught", profile=documents)


def rate(jobs: list[Job]) -> float:
    """Tokens a second of all jobs together."""
    threads = [threading.Thread(target=score, args=(job, CALLS)) for job in jobs]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(jobs) * CALLS * SAMPLES * TOKENS / (time.perf_counter() - started)


def score(job: Job, calls: int) -> None:
    own = np.random.default_rng([*job.job_id.encode(), time.time_ns()])
    for step in range(calls):
        tokens = own.integers(0, 1024, (SAMPLES, TOKENS)).astype(np.uint16)  # new ones: what is known is not computed
        job.score(tokens=tokens, step=step)


def measure_overhead(url: str, folder: Path, size: str, steps: int, rounds: int) -> float:
    """Prints what a training step takes with and without selection; the difference as a share."""
    alone = "--role frozen --probes 0 --select-warmup 0 --meta-first 0 --meta-every 1000000"  # nothing is taught
    frozen = (*alone.split(), "--weighter", url)
    flags = {"without": ("--method", "uniform"), "with": frozen}
    seconds: dict[str, list[float]] = {name: [] for name in flags}
    for turn in range(rounds + 1):
        for name, chosen in flags.items():
            out = folder / f"{name}-{turn}"
            shape = ("--model", size, "--steps", str(steps), "--eval-every", str(steps), "--eval-samples", "32")
            command = [sys.executable, "-m", "trainer_client.run", *shape, *chosen, "--out", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((out / "summary.json").read_text())
            if turn:  # the first of each trains the reference and fills caches
                seconds[name].append((summary["train_seconds"] - summary["meta_seconds"]) / steps)  # step 0 is taught
    without, selecting = (quantile(seconds[name], 0.5) for name in ("without", "with"))
    overhead = selecting / without - 1
    print(f"{size}: a training step {1e3 * without:.1f} ms, with selection of 1 in 5 ahead {1e3 * selecting:.1f} ms")
    print(f"    overhead {overhead:+.1%}", goal(overhead, GOAL_OVERHEAD, ".0%"))
    return overhead


if __name__ == "__main__":
    sys.exit(main())
