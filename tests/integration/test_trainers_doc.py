"""docs/trainers.md, done: its blocks run in their order, each section after the first, against a real service.

Blocks marked `ranks=2` run under torch.distributed.run, all in one launch. torchtitan is not installed: a stand-in with
the hooks that its recipe names takes its place.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import Address, ServiceThread
from trainer_client import connect
from trainer_client.cadence import CADENCE_INSIDE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
URL = "grpc://localhost:50051"
SMALL = "--vocab-size 280 --seq-len 16 --batch-size 8 --meta-batch 4 --val-batch 4 --steps 4"

SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")}
START = next(iter(SECTIONS))

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", SECTIONS[section], re.DOTALL)


def with_blocks(kind: str) -> list[str]:
    return [name for name in SECTIONS if name != START and blocks(name, kind)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    running = ServiceThread(tmp_path_factory.mktemp("service") / "state")
    yield running.address
    running.stop()


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(section: str, service: Address) -> dict[str, Any]:
    """What the section's names stand for in the end."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in (*blocks(START, "python"), *blocks(section, "python")):
        exec(compile(block.replace(URL, service.grpc_url), section, "exec"), names)
    return names


def position(service: Address, weighter: str) -> int:
    with connect(service.grpc_url) as client:
        return client.get_weighter(weighter).position


def updates(steps: int) -> int:
    """Meta-updates of so many steps of a recipe that weighs inside the batch."""
    due = [step for step in range(steps) if CADENCE_INSIDE.due(step)]
    assert len(due) > 1
    return len(due)


def environment(folder: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **own, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}


def run_shell(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=240, env=environment(folder)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_texts(folder: Path) -> None:
    for name, words in (("pool", "one two three"), ("target", "a few other words")):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            for i in range(40):
                file.write(json.dumps({"text": f"{words} {i} " * 20}) + "\n")


def test_every_block_is_of_a_kind_that_runs_here() -> None:
    assert set(re.findall(r"```(\S.*)\n", PAGE)) == {"python", "python ranks=2", "bash"}
    links = set(re.findall(r"\]\(#([a-z0-9-]+)\)", PAGE))
    assert links <= {re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}


@pytest.mark.parametrize("section", [name for name in with_blocks("python") if name != "torchtitan"])
def test_python(section: str, service: Address, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_python(section, service)
    steps = names["STEPS"]
    taught = {"Own loop": "mine", "Gradient accumulation": "accumulated", "Hugging Face": "default"}
    taught |= {"Lightning": "lightning", "Packed sequences": "packed"}
    if section in taught:
        assert position(service, taught[section]) == updates(steps)
    if section == "Own loop":
        assert position(service, "late") == updates(steps)
        assert names["job"].counters.scored == steps
    if section == "Own loop with selection":
        assert position(service, "chosen") == names["job"].counters.selected == steps // 2
    if section == "Hugging Face":
        assert (names["folder"] / f"checkpoint-{steps}" / "weighbridge.safetensors").is_file()
        assert names["job"].counters.selected >= 2
    if section == "Fused linear cross-entropy":
        torch.testing.assert_close(names["losses"].losses, names["plain"].losses)
    if section == "Lightning":
        assert names["trainer"].callback_metrics["weighbridge/updates"] == updates(steps - 1)


def test_python_on_two_ranks(service: Address, tmp_path: Path) -> None:
    sections = with_blocks("python ranks=2")
    assert sections == ["DDP", "FSDP2"]
    start, end = "dist.init_process_group(", "dist.destroy_process_group()"
    lines = [line for name in sections for block in blocks(name, "python ranks=2") for line in block.splitlines()]
    # One process group for all recipes: torch waits for ever for a second one in the same processes.
    starts, ends = ([i for i, line in enumerate(lines) if line.startswith(word)] for word in (start, end))
    assert len(starts) == len(ends) == len(sections)
    recipes = "\n".join(line for i, line in enumerate(lines) if i not in {*starts[1:], *ends[:-1]})
    script = "\n".join([*blocks(START, "python"), recipes]).replace(URL, service.grpc_url)
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    run_shell("python -m torch.distributed.run --standalone --nproc-per-node 2 train.py", tmp_path)
    assert position(service, "ddp") == position(service, "fsdp") == updates(12)


def test_the_trainer_that_comes_along(tmp_path: Path) -> None:
    (command,) = blocks("The trainer that comes along", "bash")
    write_texts(tmp_path)
    launched = command.replace("torchrun", "python -m torch.distributed.run").rstrip()
    run_shell(f"{launched} {SMALL}", tmp_path)
    summary = json.loads((tmp_path / "runs" / "two-ranks" / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("dwm", 4)


def test_scores_of_a_corpus(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (command,) = blocks("Scores of a corpus", "bash")
    write_texts(tmp_path)
    run_shell(command, tmp_path)
    assert pq.read_table(tmp_path / "weights.parquet").num_rows == 40
    with gzip.open(tmp_path / "weights.selected.jsonl.gz", "rt") as file:
        assert len(file.readlines()) == 8


# ---- torchtitan's hooks, as its recipe names them --------------------------------------------------------------------


class TitanTrainer:
    """The order and the arguments of the hooks of torchtitan 0.2.2's Trainer, for one process."""

    def __init__(self, model: torch.nn.Module, micro_batches: list[Any], accumulate: int) -> None:
        self.device, self.step, self.gradient_accumulation_steps = torch.device("cpu"), 0, accumulate
        self.model_parts, self.maybe_enable_amp = [model], nullcontext()
        self.parallel_dims = SimpleNamespace(dp_enabled=False)
        self._micro_batches, self.losses, self.closed = micro_batches, [], False
        self.optimizers = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizers, 1.0)
        self.lr_schedulers = SimpleNamespace(schedulers=[schedule])

    def post_dataloading_process(self, input_dict: dict[str, Any], labels: Any) -> tuple[Any, Any, Any, Any]:
        return input_dict["input"], labels, {}, {}

    def forward_backward_step(self, *, input_dict: Any, labels: Any, global_valid_tokens: Any) -> Any:
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        (model,) = self.model_parts
        loss = self.loss_fn(model(inputs, **extra_inputs, **extra_kwargs), labels) / global_valid_tokens
        loss.backward()
        return loss

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self.optimizers.zero_grad()
        micro_batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        tokens = torch.tensor(sum(int((labels != -100).sum()) for _, labels in micro_batches))
        given = [{"input_dict": inputs, "labels": labels} for inputs, labels in micro_batches]
        losses = [self.forward_backward_step(**each, global_valid_tokens=tokens) for each in given]
        self.losses.append(float(sum(loss.detach() for loss in losses)))
        self.optimizers.step()

    def train(self) -> None:
        data_iterator = iter(self._micro_batches)
        for _ in range(len(self._micro_batches) // self.gradient_accumulation_steps):
            self.step += 1
            self.train_step(data_iterator)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def close(self) -> None:
        self.closed = True


def test_torchtitan(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_client.integrations.steps import Weighting

    monkeypatch.setitem(sys.modules, "torchtitan", ModuleType("torchtitan"))
    module = ModuleType("torchtitan.train")
    module.Trainer = TitanTrainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchtitan.train", module)
    names = run_python("torchtitan", service)
    data, validation, steps = names["data"], names["validation"], names["STEPS"]
    micro_batches = [({"input": ids[:, :-1]}, ids[:, 1:]) for batch in data for ids in batch.split(4)]
    weighting = Weighting(service.grpc_url, weighter="titan", meta_batch=4)

    def trainer() -> Any:
        made = names["WeightedTrainer"](names["Model"](), micro_batches, accumulate=2)
        made.weigh_by(weighting, [({"input": ids[:-1]}, ids[1:]) for ids in validation])
        return made

    first = trainer()
    first.train()
    state = first.state_dict()  # which waits for the meta-updates
    assert len(first.losses) == steps
    assert position(service, "titan") == updates(steps)
    weights = first.steps.scores.weights
    assert len(weights) == 8
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert weights.std() > 1e-4
    first.close()
    assert first.closed
    second = trainer()
    second.load_state_dict(state)
    assert second.state_dict()["weighbridge"]["job"] == state["weighbridge"]["job"]
    second.close()
