"""Ways to compute a forward pass give the same losses and gradients; settings that don't fit are refused."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from trainer_client.ranks import Ranks
from trainer_client.run.config import RunConfig
from trainer_client.run.models import build_model
from trainer_client.run.parallel import Replica, check_parallel, way
from weighting_contract.errors import FailedPrecondition, InvalidArgument

TOKENS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def _trained(**settings) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model after a backward pass, and its losses."""
    model = build_model("tiny", 64, 8, seed=0).eval()
    names = [name for name, _ in model.named_parameters()]
    replica = Replica(RunConfig(**settings), model, Ranks.alone())
    losses = replica.losses(TOKENS)
    losses.mean().backward()
    assert [name for name, _ in model.named_parameters()] == names  # checkpoints go by them
    return model, losses.detach()


@pytest.mark.parametrize(
    ("settings", "close"),
    [
        ({"recompute": True}, 1e-6),
        ({"precision": "bf16"}, 3e-2),
        ({"precision": "bf16", "recompute": True}, 3e-2),
        pytest.param(
            {"compile": True}, 1e-5, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # of torch.compile
def test_other_ways_to_compute_are_close(settings, close):
    plain, losses = _trained()
    model, found = _trained(**settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses, rtol=close, atol=close)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert float((ours.grad - theirs.grad).norm()) <= close * float(theirs.grad.norm()), name
    assert (close < 1e-4) or not torch.equal(found, losses)  # bf16 is not the same


def test_recomputing_keeps_less_for_the_backward_pass():
    def kept(**settings) -> int:
        model = build_model("tiny", 64, 8, seed=0).eval()
        replica, sizes = Replica(RunConfig(**settings), model, Ranks.alone()), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            replica.losses(TOKENS)
        return sum(sizes)

    assert kept(recompute=True) < 0.6 * kept()


def test_one_process_is_no_ranks():
    assert way(RunConfig(), Ranks.alone()) == "none"
    check_parallel(RunConfig(), Ranks.alone())
    for parallel in ("ddp", "fsdp2"):
        with pytest.raises(FailedPrecondition, match=f"--parallel is {parallel}, but this is one process: start it"):
            check_parallel(RunConfig(parallel=parallel), Ranks.alone())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 16, "accumulate": 17}, "--batch-size is 16, expected 17 or more"),
        ({"hypergradient": "jvp", "recompute": True}, "--hypergradient is jvp, which does not go with --recompute"),
        ({"hypergradient": "exact", "compile": True}, "--hypergradient is exact, which does not go with --compile"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        check_parallel(dataclasses.replace(RunConfig(), **settings), Ranks.alone())
