"""The Trainers of others with weights: whatever the split, through checkpoints, and without a service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Address
from tests.integration.trainer_runs import BATCH, STEPS, huggingface, lightning, samples, tiny_llama, weighting
from trainer_client import connect
from trainer_client.cadence import Cadence
from trainer_client.integrations.huggingface import STATE_FILE, WeighbridgeTrainer
from weighting_contract.errors import InvalidArgument

ROOT = Path(__file__).parents[2]
NOWHERE = "grpc://127.0.0.1:9"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


def on_two_ranks(kind: str, folder: Path, url: str, weighter: str) -> list[dict[str, torch.Tensor]]:
    """What each rank had."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.integration.trainer_runs", kind, str(folder), url, weighter]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def position(service: Address, weighter: str) -> int:
    with connect(service.grpc_url) as client:
        return client.get_weighter(weighter).position


@pytest.mark.parametrize("kind", ["huggingface", "lightning"])
def test_two_ranks_have_the_weights_and_the_parameters_of_one(tmp_path: Path, service: Address, kind: str) -> None:
    run = {"huggingface": huggingface, "lightning": lightning}[kind]
    _, one = run(tmp_path / "one", weighting(service.grpc_url, "one"))
    ranks = on_two_ranks(kind, tmp_path, service.grpc_url, "two")
    weights = torch.cat([rank.pop("weights") for rank in ranks], 1)
    assert weights.shape == (STEPS, BATCH)
    assert weights[1:].std(1).min() > 1e-4, "a fresh weighter's are equal"
    torch.testing.assert_close(weights.mean(1), torch.ones(STEPS))
    assert_same({"weights": weights, **ranks[0]}, one, 1e-5)
    assert position(service, "one") == position(service, "two") == STEPS


def test_accumulation_changes_nothing(tmp_path: Path, service: Address) -> None:
    huggingface(tmp_path / "taught", weighting(service.grpc_url, "taught"))
    # Frozen and hardly probed: a meta-update is made of the first micro-batch, which depends on how a batch is split.
    frozen = weighting(service.grpc_url, "taught", role="frozen", cadence=Cadence(1000, first=0))
    _, whole = huggingface(tmp_path / "whole", frozen)
    _, split = huggingface(tmp_path / "split", frozen, batch=BATCH // 4, gradient_accumulation_steps=4)
    assert_same(split, whole, 1e-5)
    assert whole["weights"].std(1).min() > 1e-4


def test_losses_without_logits_are_the_same(tmp_path: Path, service: Address) -> None:
    _, plain = huggingface(tmp_path / "plain", weighting(service.grpc_url, "plain"))
    _, fused = huggingface(tmp_path / "fused", weighting(service.grpc_url, "fused", fused=True))
    assert_same(fused, plain, 1e-5)


def test_packed_documents_are_weighted_as_rows_of_their_own(tmp_path: Path, service: Address) -> None:
    from transformers import DataCollatorWithFlattening

    def packed(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return DataCollatorWithFlattening()([{name: row[name].tolist() for name in row} for row in rows])

    _, apart = huggingface(tmp_path / "apart", weighting(service.grpc_url, "apart"))
    by = weighting(service.grpc_url, "packed", packed=True)
    _, together = huggingface(tmp_path / "packed", by, collator=packed)
    assert_same(together, apart, 1e-4)


def test_a_run_without_a_service_is_the_trainers_own(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    given = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3, "use_cpu": True, "seed": 3}
    given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": "none"}
    args = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **given)
    plain = Trainer(tiny_llama(), args, train_dataset=samples(1))
    weighted = WeighbridgeTrainer(
        tiny_llama(), args, train_dataset=samples(1), eval_dataset=samples(2, 8), weighbridge=NOWHERE
    )
    for trainer in (plain, weighted):
        trainer.train()
    assert_same(dict(weighted.model.state_dict()), dict(plain.model.state_dict()), 1e-6)
    assert weighted._steps.metrics()["weighbridge/fallback_steps"] == 3


def test_a_checkpoint_goes_on_as_the_same_job(tmp_path: Path, service: Address) -> None:
    _, through = huggingface(tmp_path / "through", weighting(service.grpc_url, "through"))
    by = weighting(service.grpc_url, "stopped")
    saving = {"save_strategy": "steps", "save_steps": 3}
    huggingface(tmp_path / "stopped", by, steps=3, **saving)
    trainer, rest = huggingface(tmp_path / "stopped", by, resume=True, **saving)
    expected = {**through, "weights": through["weights"][3:], "loss": through["loss"][3:]}
    assert_same(rest, expected, 1e-6)
    assert position(service, "stopped") == STEPS
    folders = [tmp_path / "stopped" / f"checkpoint-{step}" for step in (3, 6)]
    assert all((folder / STATE_FILE).is_file() for folder in folders)
    last = trainer.state.log_history[-2]
    assert last["weighbridge/position"] == STEPS - 1
    assert 1 <= last["weighbridge/effective_sample_size"] <= BATCH


def test_lightning_goes_on_as_the_same_job(tmp_path: Path, service: Address) -> None:
    _, through = lightning(tmp_path / "through", weighting(service.grpc_url, "through"))
    by = weighting(service.grpc_url, "stopped")
    lightning(tmp_path, by, steps=3)
    _, rest = lightning(tmp_path / "rest", by, resume=str(tmp_path / "last.ckpt"))
    assert_same(rest, {**through, "weights": through["weights"][3:]}, 1e-6)
    assert position(service, "stopped") == STEPS


def test_lightning_without_a_service_ends_normally(tmp_path: Path) -> None:
    weighbridge, had = lightning(tmp_path, weighting(NOWHERE, "away"), steps=2)
    assert torch.equal(had["weights"], torch.ones(2, BATCH))
    assert weighbridge._steps.metrics()["weighbridge/fallback_steps"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor can't be combined with weights"),
        ({"eval_dataset": {"a": samples(2, 2), "b": samples(3, 2)}}, r"eval_dataset holds several \(a, b\)"),
        ({"eval_dataset": None}, "taught towards are a NoneType, expected a dataset"),
        ({"train_dataset": [{"input_ids": torch.arange(4)}] * 8}, "expected labels, too"),
    ],
)
def test_what_cannot_be_weighted_is_said(tmp_path: Path, given: dict[str, object], message: str) -> None:
    from transformers import TrainingArguments

    data = {"train_dataset": samples(1), "eval_dataset": samples(2, 4)}
    data |= {name: given[name] for name in data.keys() & given.keys()}
    settings = {name: given[name] for name in given.keys() - data.keys()}
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    with pytest.raises(InvalidArgument, match=message):
        WeighbridgeTrainer(tiny_llama(), args, weighbridge=NOWHERE, **data).train()
