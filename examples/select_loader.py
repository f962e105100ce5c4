"""Batches chosen from candidates in a training loop of one's own: what it adds to a plain one are the lines marked (n).

    python examples/select_loader.py                            # the weighter lives in this process
    python examples/select_loader.py grpc://localhost:50051     # or in a service: python -m weighting_service

A torch DataLoader with two workers reads samples of very different use: the target are Python's help topics; most
samples are source code and tables of character sets. The weighter and the small reference model that it reads the
samples with come with the package, so it has a say from the first step on; what it is taught here refines it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer_client import connect
from trainer_client.hypergradient import cotangent
from trainer_client.loss import causal_token_losses, per_sample_loss
from trainer_client.select import CADENCE_TAUGHT, select

TOKENS, BATCH, CANDIDATES, LEARNING_RATE = 32, 16, 4, 3e-3
TAUGHT = 8  # samples of a batch: the first, which its probes are among
WARM_UP = 16  # steps; as few as this run has, leave it out in a real one
SHARES = {"topics": 0.2, "code": 0.4, "tables": 0.4}


class OwnModel(torch.nn.Module):
    """A small recurrent language model."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 32)
        self.rnn = torch.nn.GRU(32, 64, batch_first=True)
        self.head = torch.nn.Linear(64, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.embed(ids))
        logits: torch.Tensor = self.head(states)
        return logits


def sample_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B] mean loss of each sample."""
    return per_sample_loss(*causal_token_losses(model(ids[:, :-1]), ids))


class OwnData(IterableDataset[dict[str, Any]]):
    """Samples without end; each worker draws its own."""

    def __init__(self, windows: dict[str, list[list[int]]]) -> None:
        self._windows = windows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        rng = random.Random(worker.id if worker else 0)
        while True:
            (source,) = rng.choices(list(SHARES), list(SHARES.values()))
            yield {"input_ids": torch.tensor(rng.choice(self._windows[source])), "source": source}


def own_text() -> tuple[dict[str, list[str]], list[str]]:
    """Texts to train on by source, and validation texts of the target."""
    names = sorted(topics)
    validation, wanted = [topics[name] for name in names[::4]], [topics[name] for i, name in enumerate(names) if i % 4]
    library = Path(random.__file__).parent
    code = [library / name for name in ("argparse.py", "inspect.py", "random.py", "ast.py")]
    tables = sorted((library / "encodings").glob("cp12*.py"))
    texts = {"code": code, "tables": tables}
    read = {source: [path.read_text(encoding="utf-8") for path in paths] for source, paths in texts.items()}
    return {"topics": wanted, **read}, validation


def windows_of(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Samples of TOKENS + 1 ids."""
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [row[i : i + TOKENS + 1] for row in rows for i in range(0, len(row) - TOKENS, TOKENS)]


def train(url: str, steps: int) -> Counter[str]:
    """Trains; how many samples of each source were kept."""
    torch.manual_seed(0)
    texts, validation_texts = own_text()
    kept: Counter[str] = Counter()
    with connect(url) as client:
        reference = client.get_reference("pretaught", ["tokenizer.json"])  # (1) its tokenizer is ours, too
        tokenizer = Tokenizer.from_str(reference.files["tokenizer.json"].decode())
        described, judged = (windows_of(validation_texts[part], tokenizer) for part in (slice(0, -4), slice(-4, None)))
        judges = torch.tensor(judged)  # other documents than the profile's: what resembles those looks useful to them
        dataset = OwnData({source: windows_of(own, tokenizer) for source, own in texts.items()})
        loader = DataLoader(dataset, BATCH, num_workers=2)
        model = OwnModel(tokenizer.get_vocab_size())
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        with client.open_job(  # (2) validation samples say what we care about
            weighter="select-loader",
            initial="pretaught",
            reference="pretaught",
            tokenizer_checksum=reference.tokenizer_checksum,
            profile=described,
        ) as job:
            batches = select(  # (3) instead of the loader
                loader, job, candidates=CANDIDATES, warm_up=WARM_UP, cadence=CADENCE_TAUGHT
            )
            for step, batch in zip(range(steps), batches, strict=False):
                ids = batch["input_ids"]
                loss = sample_losses(model, ids).mean()
                optimizer.zero_grad()
                batches.look_ahead()  # (4) or leave it out: then candidates are sent for as a batch is taken
                loss.backward()
                if batches.due:
                    towards = judges[torch.randint(len(judges), (BATCH,))]
                    taught = cotangent(model, sample_losses, ids[:TAUGHT], towards, learning_rate=LEARNING_RATE)
                    batches.teach(taught)  # (5)
                optimizer.step()
                kept.update(batch["source"])
                if step % 10 == 0:
                    print(f"step {step}: loss {loss.item():.3f}, kept {dict(Counter(batch['source']))}")
            job.close()
            counters = job.counters
    print(
        f"{counters.selected} steps selected, {counters.unselected} not, {counters.updates_acknowledged} updates taught"
    )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches chosen from candidates in a training loop of one's own.")
    parser.add_argument(
        "weighter", nargs="?", default="embedded", help="embedded, grpc://HOST:PORT or http://HOST:PORT"
    )
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps (default: 80)")
    arguments = parser.parse_args()
    kept = train(arguments.weighter, arguments.steps)
    for source, share in SHARES.items():
        print(f"{source}: {kept[source] / kept.total():.2f} of the samples kept, {share:.2f} of the candidates")


if __name__ == "__main__":
    main()
