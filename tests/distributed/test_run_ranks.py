"""`torchrun -m trainer_client.run` equals one process, whatever the split; mistakes are told once, by all together.

pytest tests/distributed/test_run_ranks.py -s -k equal    shows the table of differences
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import Ended, ended, start, torchrun
from tests.integration.small_job import CANDIDATES, write_data
from tests.waiting import wait_for
from trainer_client.run.metrics import read_metrics
from trainer_client.run.recorder import read_records

STEPS, BATCH = 6, 16
CLOSE = 1e-5
# AdamW divides by the gradient's own size: where that is near 0, rounding moves a parameter by a share of the learning
# rate, be it on one process in two micro-batches. Less than the default keeps what is to be seen apart from that.
LEARNING_RATE = 5e-4
RUN = "trainer_client.run"


@dataclass(frozen=True)
class Split:
    """How a batch is shared out."""

    ranks: int
    accumulate: int
    parallel: str = "auto"
    more: str = ""  # further flags

    @property
    def name(self) -> str:
        way = self.parallel if self.ranks == 1 or self.parallel != "auto" else "ddp"
        return f"{way}-{self.ranks}-{self.accumulate}{self.more.replace(' ', '')}"

    def flags(self) -> list[str]:
        return f"--parallel {self.parallel} --accumulate {self.accumulate} {self.more}".split()


ONE = Split(1, 1)
SPLITS = [
    *(Split(ranks, accumulate) for ranks in (1, 2, 4) for accumulate in (1, 2, 4)),
    *(Split(ranks, accumulate, "fsdp2") for ranks, accumulate in ((2, 1), (2, 2), (4, 1))),
]
SELECTING = [ONE, Split(2, 2), Split(4, 1), Split(2, 1, "fsdp2")]  # weights of candidates are of whole batches anyway
LOWER = [
    Split(2, 2, more="--precision bf16 --recompute"),
    Split(2, 1, "fsdp2", more="--precision bf16 --recompute"),
]


@dataclass(frozen=True)
class Trained:
    """Where the runs of the splits are."""

    folder: Path

    def model(self, split: Split, label: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / split.name / label / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors")

    def difference(self, split: Split, label: str) -> float:
        """The largest one from one process in any parameter."""
        ours, theirs = self.model(split, label), self.model(ONE, label)
        assert ours.keys() == theirs.keys()
        return max(float((ours[n] - theirs[n]).abs().max()) for n in ours if n.startswith("model."))

    def weights(self, split: Split) -> np.ndarray:
        records = read_records(self.folder / split.name / "weight" / "weights.record", BATCH, BATCH)
        return np.stack([record.weights for record in records])

    def kept(self, split: Split) -> np.ndarray:
        path = self.folder / split.name / "select" / "selection.record"
        return np.stack([record.kept for record in read_records(path, BATCH, CANDIDATES * BATCH)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    short = f"--steps {STEPS} --batch-size {BATCH} --meta-batch 8 --meta-every 2 --eval-every 3 --checkpoint-every 4"
    short += f" --lr {LEARNING_RATE}"
    return [*write_data(tmp_path_factory.mktemp("data")), *short.split()]


@pytest.fixture(scope="module")
def trained(data: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All splits, in one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 4):
        plan = [
            [*data, "--mode", "weight", *_compared(split), "--out", str(folder / split.name), *split.flags()]
            for split in (*SPLITS, *LOWER)
            if split.ranks == ranks
        ]
        (folder / f"plan-{ranks}.json").write_text(json.dumps(plan))
        torchrun(ranks, "tests.distributed.train_ranks", str(folder / f"plan-{ranks}.json"), cache=cache)
    return Trained(folder)


def _compared(split: Split) -> list[str]:
    return ["--compare", "select"] if split in SELECTING else []


def test_splits_equal_one_process(trained: Trained) -> None:
    """Largest difference of a trained parameter, and of a weight (relative above 1), by ranks x accumulation steps."""
    table = {}
    for split in SPLITS:
        ours, theirs = trained.weights(split), trained.weights(ONE)
        found = [float((np.abs(ours - theirs) / np.maximum(theirs, 1)).max())]
        found += [trained.difference(split, label) for label in ("weight", "select")[: 1 + (split in SELECTING)]]
        table[split] = found
    print("\nranks x accumulation  way    weights  parameters, mode weight  mode select")
    for split, (weights, *parameters) in table.items():
        way = split.name.partition("-")[0].replace("auto", "one")
        numbers = "".join(f"{number:16.1e}" for number in parameters)
        print(f"{split.ranks:5} x {split.accumulate:<12} {way:6} {weights:7.1e} {numbers}")
    assert {split.name: found for split, found in table.items() if max(found) > CLOSE} == {}


@pytest.mark.parametrize("split", SELECTING, ids=lambda split: split.name)
def test_splits_select_the_same_samples(trained: Trained, split: Split) -> None:
    np.testing.assert_array_equal(trained.kept(split), trained.kept(ONE))


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_splits_have_the_same_metrics(trained: Trained, split: Split) -> None:
    ours, theirs = (read_metrics(trained.folder / s.name / "weight" / "metrics.jsonl") for s in (split, ONE))
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in {"loss", "weighted_loss", "gradient_norm", "val_loss", "test_loss", "position"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=CLOSE), (name, mine["step"])


@pytest.mark.parametrize("split", LOWER, ids=lambda split: split.name)
def test_other_ways_to_compute_train_and_teach(trained: Trained, split: Split) -> None:
    lines = read_metrics(trained.folder / split.name / "weight" / "metrics.jsonl")
    plain = read_metrics(trained.folder / ONE.name / "weight" / "metrics.jsonl")
    assert [line["position"] for line in lines] == [line["position"] for line in plain]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2)
    moved = trained.difference(split, "weight")
    assert moved < 0.02  # as far as AdamW goes in these steps the wrong way at most
    assert (moved > 0) == bool(split.more)


def test_a_run_goes_on_with_another_number_of_ranks(data: list[str], cache: Path, tmp_path: Path) -> None:
    """Stopped by a signal to one of its two ranks; one process continues, then FSDP2 on two."""
    out = tmp_path / "out"
    flags = [*data, "--mode", "weight", "--steps", "5000", "--checkpoint-every", "5000", "--out", str(out)]
    processes = start(2, RUN, flags, cache=cache)
    wait_for(lambda: _lines(out) >= 3, timeout_s=120)
    processes[1].send_signal(signal.SIGTERM)
    assert [rank.code for rank in ended(processes)] == [130, 143]
    (stopped,) = (out / "weight" / "checkpoints").glob("*.safetensors")
    assert _lines(out) == int(stopped.stem[-8:])

    resumed = start(2, RUN, ["--resume", "--out", str(out), "--parallel", "fsdp2"], cache=cache)
    wait_for(lambda: _lines(out) >= int(stopped.stem[-8:]) + 3, timeout_s=120)
    resumed[0].send_signal(signal.SIGINT)
    assert [rank.code for rank in ended(resumed)] == [130, 130]
    newest = max((out / "weight" / "checkpoints").glob("*.safetensors"))
    assert newest != stopped
    assert load_file(newest).keys() == load_file(stopped).keys()
    steps = [line["step"] for line in read_metrics(out / "weight" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--accumulate", "9"], "--batch-size is 16, expected 18 or more"),
        (["--steps", "0"], "--steps is 0, expected 1 or more"),
        (["--weighter", "embedded:///dev/null/state"], "/dev/null/state"),
    ],
)
def test_mistakes_are_told_once(data: list[str], cache: Path, tmp_path: Path, flags: list[str], sentence: str) -> None:
    both = ended(start(2, RUN, [*data, "--mode", "weight", "--out", str(tmp_path / "out"), *flags], cache=cache))
    _assert_one_sentence(both, sentence)


def test_ranks_with_other_flags(data: list[str], cache: Path, tmp_path: Path) -> None:
    mine = [*data, "--mode", "weight", "--out", str(tmp_path / "out")]
    both = ended(start(2, RUN, mine, [*mine, "--batch-size", "12"], cache=cache))
    _assert_one_sentence(both, "--batch-size is 16 on rank 0 and 12 on rank 1")


def _assert_one_sentence(ranks: list[Ended], sentence: str) -> None:
    assert [rank.code for rank in ranks] == [2] * len(ranks), [rank.err for rank in ranks]
    said = [rank.err.strip() for rank in ranks]
    assert sentence in said[0]
    assert said[0].startswith("trainer_client.run: ")
    assert "\n" not in said[0]
    assert said[1:] == [""] * (len(ranks) - 1)
    assert not any("Traceback" in rank.out for rank in ranks)


def _lines(out: Path) -> int:
    path = out / "weight" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
