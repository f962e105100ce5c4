"""Checkpoints: a restored loop goes on bit by bit, damaged files are passed over, other models are refused."""

from __future__ import annotations

import pytest
import torch

from trainer_client.run import checkpoint
from weighting_contract.errors import InvalidArgument


class _Tied(torch.nn.Module):
    """Input and output share a matrix, as in language models; a buffer changes as it trains."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(16, width, generator=generator))
        self.head = torch.nn.Linear(width, 16, bias=True)
        self.head.weight = self.table
        torch.nn.init.zeros_(self.head.bias)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.table[ids])


def _pair(seed: int = 0, width: int = 8):
    model = _Tied(seed, width)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def _train(model, optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 16, (4,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()


def _assert_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def test_a_restored_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_optimizer = _pair()
    _train(whole, whole_optimizer, range(10))
    first, first_optimizer = _pair()
    _train(first, first_optimizer, range(6))
    checkpoint.save(tmp_path, 6, first, first_optimizer, {"note": [1, 2]})

    second, second_optimizer = _pair(seed=1)
    state = checkpoint.load_newest(tmp_path, second, second_optimizer)
    assert state == {"step": 6, "note": [1, 2]}
    _assert_equal(second, first)
    _train(second, second_optimizer, range(6, 10))
    _assert_equal(second, whole)


def test_the_newest_two_are_kept(tmp_path):
    model, optimizer = _pair()
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-00000020.safetensors",
        "checkpoint-00000100.safetensors",
    ]


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "missing", *_pair()) is None


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog):
    model, optimizer = _pair()
    _train(model, optimizer, range(2))
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    newest = checkpoint.save(tmp_path, 2, model, optimizer, {})
    newest.write_bytes(newest.read_bytes()[:-100])
    state = checkpoint.load_newest(tmp_path, *_pair(seed=1))
    assert state == {"step": 1}
    assert "can't be read" in caplog.text


def test_only_damaged_ones_are_an_error(tmp_path):
    path = checkpoint.save(tmp_path, 1, *_pair(), {})
    path.write_bytes(b"nothing")
    with pytest.raises(InvalidArgument, match="none of the 1 checkpoints"):
        checkpoint.load_newest(tmp_path, *_pair())


def test_another_model_s_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, *_pair(), {})
    with pytest.raises(InvalidArgument, match="another model"):
        checkpoint.load_newest(tmp_path, *_pair(width=4))


def test_another_job_s_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, *_pair(), {"job_id": "mine"})
    assert checkpoint.load_newest(tmp_path, *_pair(), "mine") == {"step": 1, "job_id": "mine"}
    with pytest.raises(InvalidArgument, match=r"of another job \('mine', expected 'yours'\)"):
        checkpoint.load_newest(tmp_path, *_pair(), "yours")


def test_the_model_alone_can_be_loaded(tmp_path):
    model, optimizer = _pair()
    checkpoint.save(tmp_path, 3, model, optimizer, {})
    other, _ = _pair(seed=1)
    assert checkpoint.load_model(tmp_path, other) == 3
    _assert_equal(other, model)
    with pytest.raises(InvalidArgument, match="there is no checkpoint in"):
        checkpoint.load_model(tmp_path / "missing", other)
