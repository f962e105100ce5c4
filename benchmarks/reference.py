"""Token scoring by a reference model on one CPU thread, against a bare loop over the same packs in this process.

    python -m benchmarks.reference [--rounds 7] [--size tiny]

The bare loop is what one would write by hand: the model's logits of a pack, and their cross entropy. `raw_statistics`
checks and packs the samples and computes their statistics besides. Two sets of samples from the built-in corpus: the
windows that a run scores, all of one length, and whole documents of any length. Then the same samples come a second
time, and are known.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe, goal_at_least, quantile
from trainer_client.reference.config import ReferenceConfig
from trainer_client.reference.train import load_pool, save_reference
from trainer_client.run.data import make_samples
from trainer_client.run.tokenizer import Tokenizer, cached_tokenizer
from weighting_service.reference import Reference, load_reference
from weighting_service.reference.packing import Pack, pack_rows

SAMPLES = 1024
GOAL_SHARE = 0.85
GOAL_AGAIN = 10.0  # times the throughput of samples that are new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="tiny")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    documents = load_pool(ReferenceConfig())
    texts = [document.text for document in documents]
    tokenizer = cached_tokenizer(texts, ReferenceConfig.vocab_size)
    shuffled = np.random.default_rng(0)
    windows = make_samples(documents, tokenizer, 64).tokens
    rows: dict[int, list[np.ndarray]] = {
        64: list(windows[shuffled.permutation(len(windows))[:SAMPLES]]),
        512: [np.array(ids) for ids in tokenizer.encode_batch(texts) if len(ids) > 1][:SAMPLES],
    }
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(Path(folder), documents, tokenizer, n, rows[n], given.size, given.rounds) for n in rows]
    return int(any(share < GOAL_SHARE or again < GOAL_AGAIN for share, again in found))


def measure(
    parent: Path,
    documents: Sequence[Any],
    tokenizer: Tokenizer,
    seq_len: int,
    rows: list[np.ndarray],
    size: str,
    n: int,
) -> tuple[float, float]:
    """Prints the throughputs for one set of samples.

    Returns:
        (the share of the bare loop's that is reached, how many times that of new samples the second time has).
    """
    folder = parent / str(seq_len)
    samples = make_samples(documents, tokenizer, seq_len)
    config = ReferenceConfig(size=size, steps=0)  # speed does not depend on what it has learned
    save_reference(samples, tokenizer, folder, config, trained_on="nothing", command="benchmark")
    reference = load_reference(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packs = pack_rows([row[: reference.max_tokens] for row in rows], reference.tokens_per_pack)
    # In turns, so that whatever else the machine does meets both alike.
    bare, ours = zip(
        *((timed(lambda: bare_loop(model, packs)), timed(lambda: score(reference, rows))) for _ in range(n + 1)),
        strict=True,
    )
    report = reference.last_report
    share = quantile(bare[1:], 0.5) / quantile(ours[1:], 0.5)
    print(
        f"{size}, {len(rows)} samples of up to {seq_len} tokens: {report.packs} packs of up to "
        f"{reference.tokens_per_pack} tokens, packing efficiency {report.efficiency:.3f}"
    )
    for name, times in (("bare loop", bare), ("raw_statistics", ours)):
        print(f"    {name:15} {report.real_tokens / quantile(times[1:], 0.5):10,.0f} tokens/s")
    print(f"    share           {share:10.2f}", goal_at_least(share, GOAL_SHARE))
    remembering = load_reference(folder, cached_samples=len(rows))
    new, known = zip(*(twice(remembering, rows, str(turn)) for turn in range(n + 1)), strict=True)
    again = quantile(new[1:], 0.5) / quantile(known[1:], 0.5)
    print(f"    a second time   {again:10.0f} times as many", goal_at_least(again, GOAL_AGAIN))
    return share, again


def twice(reference: Reference, rows: Sequence[np.ndarray], scope: str) -> tuple[float, float]:
    """Seconds for samples that are new in this scope, and once more."""
    first, second = (timed(lambda: reference.raw_statistics_of([rows], scopes=[scope])) for _ in range(2))
    return first, second


@torch.no_grad()
def bare_loop(model: Any, packs: Sequence[Pack]) -> None:
    for pack in packs:
        tokens = torch.from_numpy(pack.tokens)
        logits = model(input_ids=tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def score(reference: Reference, rows: Sequence[np.ndarray]) -> None:
    reference.raw_statistics(rows)


def timed(what: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
