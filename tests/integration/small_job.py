"""A job that trains in seconds, and how two runs of it are compared."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.waiting import wait_for
from trainer_client.run.metrics import read_metrics
from trainer_client.run.recorder import Record, read_records

BATCH, CANDIDATES, STEPS = 8, 3, 24
WARM_UP = 4  # steps, so that it ends before a run is interrupted
WORDS = {
    "prose": "the weights of a batch say how much each sample counts when the loss of the model is taken".split(),
    "tables": [str(n) for n in range(100, 140)],
}


def write_data(folder: Path) -> list[str]:
    """Writes documents into a folder; the flags of a job on them."""
    rng = random.Random(0)

    def document(source: str) -> str:
        return json.dumps({"text": " ".join(rng.choices(WORDS[source], k=120)), "source": source}) + "\n"

    (folder / "train.jsonl").write_text("".join(document(s) for _ in range(30) for s in WORDS))
    (folder / "val.jsonl").write_text("".join(document("prose") for _ in range(6)))
    (folder / "test.jsonl").write_text("".join(document("prose") for _ in range(6)))
    files = {"--data": "train.jsonl", "--val": "val.jsonl", "--test": "test.jsonl"}
    flags = [item for flag, name in files.items() for item in (flag, str(folder / name))]
    small = f"--vocab-size 300 --seq-len 16 --batch-size {BATCH} --steps {STEPS} --meta-batch 4 --val-batch 4"
    select = f"--candidates {CANDIDATES} --probes 2 --select-warmup {WARM_UP} --meta-first 0 --meta-every 4"
    rest = "--warmup-steps 2 --eval-every 6 --checkpoint-every 7 --threads 1"
    return [*flags, *small.split(), *select.split(), *rest.split()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def final(out: Path, label: str) -> dict[str, torch.Tensor]:
    return load_file(out / label / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors")


def selected(out: Path, label: str) -> list[Record]:
    return read_records(out / label / "selection.record", BATCH, CANDIDATES * BATCH)


def weighed(out: Path, label: str) -> list[Record]:
    return read_records(out / label / "weights.record", BATCH, BATCH)


def exported_weighter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weighter-export" / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_run(a: Path, b: Path, label: str = "both") -> None:
    """Parameters, optimiser, samples, weights and metrics of two runs are the same, bit by bit; only costs differ."""
    assert_same_tensors(final(a, label), final(b, label))
    for records in (selected, weighed):
        for x, y in zip(*(records(out, label) for out in (a, b)), strict=True):
            x, y = vars(x).copy(), vars(y).copy()
            for name in ("weights", "kept", "quarters"):
                np.testing.assert_array_equal(x.pop(name), y.pop(name))
            for record in (x, y):
                record.pop("computed")  # less by a service that knows the samples
            assert x == y
    lines = [[{**line, "seconds": 0} for line in read_metrics(out / label / "metrics.jsonl")] for out in (a, b)]
    assert lines[0] == lines[1]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer_client.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns once the condition holds; fails where the process ends before."""

    def holds() -> bool:
        met = condition()
        assert met or process.poll() is None, f"ended early: {process.communicate()}"
        return met

    wait_for(holds, timeout_s=120)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
