"""What `test_hypergradient_ranks.py` has every rank do: each check in turn, its outcome into a file of the rank.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed.hypergradient_ranks FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.launch import checks_of, run_checks
from tests.numerics.test_hypergradient import (
    BATCH,
    LEARNING_RATE,
    VALIDATION,
    WEIGHTS,
    SmallTransformer,
    diagonal,
    relative_error,
    sample_losses,
)
from trainer_client.hypergradient import DegenerateCotangent, cotangent
from trainer_client.hypergradient.precision import compute_dtype
from weighting_contract.errors import FailedPrecondition, InvalidArgument

WAYS: list[dict[str, Any]] = [
    {},
    {"two_sided": False},
    {"unrolled": True, "weights": WEIGHTS},
    {"unrolled": True, "weights": WEIGHTS, "two_sided": False},
]


def plain() -> SmallTransformer:
    """In eval mode: what batch normalisation learns of a rank's rows would be that rank's alone."""
    torch.manual_seed(0)
    return SmallTransformer().double().eval()


def ddp() -> SmallTransformer:
    """As inside of DistributedDataParallel, after a training step's backward pass."""
    wrapped = DistributedDataParallel(plain())
    sample_losses(wrapped, my_rows(BATCH)).mean().backward()  # type: ignore[no-untyped-call]
    inner: SmallTransformer = wrapped.module
    return inner


def sharded(model: SmallTransformer, **options: Any) -> SmallTransformer:
    for part in (*model.layers, model):
        fully_shard(part, **options)
    return model


def fsdp(dtype: torch.dtype = torch.float64) -> SmallTransformer:
    """Sharded, after a training step's backward pass and a forward pass that left parameters whole."""
    model = sharded(plain().to(dtype))
    sample_losses(model, my_rows(BATCH)).mean().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        sample_losses(model, my_rows(BATCH))
    assert any(not isinstance(p, DTensor) for p in model.parameters()), "nothing is whole, so this tests less"
    return model


def my_rows(rows: Tensor, first: int | None = None) -> Tensor:
    """This rank's part of all rows: `first` of them for rank 0, the rest for rank 1."""
    cut = len(rows) // 2 if first is None else first
    return rows[:cut] if dist.get_rank() == 0 else rows[cut:]


def shared(model: nn.Module, first: int | None = None, **changes: Any) -> Tensor:
    """The cotangent of this rank's rows."""
    arguments: dict[str, Any] = {"learning_rate": LEARNING_RATE, "group": dist.group.WORLD, **changes}
    losses, batch = arguments.pop("sample_losses", sample_losses), arguments.pop("batch", BATCH)
    if arguments.get("weights") is not None:
        arguments["weights"] = my_rows(arguments["weights"], first)
    return cotangent(model, losses, my_rows(batch, first), my_rows(VALIDATION), **arguments)


def alone(**changes: Any) -> Tensor:
    """The cotangent of all rows, by one process."""
    return cotangent(plain(), sample_losses, BATCH, VALIDATION, learning_rate=LEARNING_RATE, **changes)


def held(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """By parameter: which tensor it is, where, its values, its gradient and that one's values."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()

    def values(tensor: Tensor | None) -> bytes:
        if tensor is None:
            return b""
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.detach().contiguous().view(torch.uint8).numpy().tobytes()

    return {n: (id(p), values(p), id(p.grad), values(p.grad)) for n, p in model.named_parameters()}


def equal_one_process(model: nn.Module, ways: list[dict[str, Any]], bound: float) -> None:
    before = held(model)
    for way in ways:
        expected = alone(**way)
        for first in (3, 1):
            got = shared(model, first, **way)
            assert got.shape == my_rows(BATCH, first).shape[:1]
            assert relative_error(got, my_rows(expected, first)) < bound, (way, first, got, expected)
            assert held(model) == before, way


def failing_on_rank_1(failing_call: int) -> Callable[[nn.Module, Tensor], Tensor]:
    calls = 0

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found = sample_losses(model, ids)
        if calls == failing_call and dist.get_rank() == 1:
            raise RuntimeError("out of memory, say")
        return found

    return losses


def failure_of_one_rank_is_one_of_all(model: nn.Module) -> None:
    before = held(model)
    expected = shared(model)
    for failing_call in (1, 2, 3):  # at theta for v, at theta + eps v, at theta - eps v
        mine, message = (
            (RuntimeError, "^out of memory, say$")
            if dist.get_rank() == 1
            else (FailedPrecondition, "^rank 1 could not compute its part.*: RuntimeError: out of memory, say$")
        )
        with pytest.raises(mine, match=message):
            shared(model, sample_losses=failing_on_rank_1(failing_call))
        assert held(model) == before
        assert torch.equal(shared(model), expected)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def check_ddp_equals_one_process() -> None:
    equal_one_process(ddp(), [*WAYS, {"method": "jvp"}, {"preconditioner": diagonal(plain())}], 1e-9)


def check_fsdp_equals_one_process() -> None:
    equal_one_process(fsdp(), WAYS, 1e-9)


def check_fsdp_with_a_sharded_preconditioner() -> None:
    model, table = fsdp(), diagonal(plain())
    held(model)  # shards its parameters again
    shards = {
        name: torch.distributed.tensor.distribute_tensor(table[name], p.device_mesh, p.placements)
        for name, p in model.named_parameters()
    }
    expected = my_rows(alone(preconditioner=table))
    assert relative_error(shared(model, preconditioner=shards), expected) < 1e-9
    assert relative_error(shared(model, preconditioner=lambda name, g: 1.0 * g), my_rows(alone())) < 1e-9
    with pytest.raises(InvalidArgument, match="of this rank's shard, as a DTensor"):
        shared(model, preconditioner=table)


def check_known_losses_are_this_ranks() -> None:
    known = sample_losses(plain(), BATCH).detach()
    got = shared(ddp(), 2, two_sided=False, base_losses=my_rows(known, 2))
    assert relative_error(got, my_rows(alone(two_sided=False), 2)) < 1e-9


def check_ddp_failure_of_one_rank() -> None:
    failure_of_one_rank_is_one_of_all(ddp())


def check_fsdp_failure_of_one_rank() -> None:
    failure_of_one_rank_is_one_of_all(fsdp())


def check_losses_that_are_not_finite_on_one_rank() -> None:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return sample_losses(model, ids) * (float("nan") if dist.get_rank() == 1 else 1.0)

    text = r"sample_losses\[0\] is nan, expected a finite loss of every sample"
    with pytest.raises(InvalidArgument, match=text if dist.get_rank() else f"^rank 1 could not compute .*{text}"):
        shared(fsdp(), sample_losses=losses)


def check_degenerate_is_a_verdict_on_all_rows() -> None:
    two = BATCH[:2]
    assert relative_error(shared(ddp(), batch=two), my_rows(alone()[:2] * (len(BATCH) / 2))) < 1e-9
    with pytest.raises(DegenerateCotangent, match="for all 2 samples, so it prefers none"):
        shared(ddp(), batch=BATCH[:1].expand(2, -1))


def check_fsdp_under_autocast() -> None:
    model = fsdp(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(model) == torch.bfloat16
        got = shared(model)
    expected = alone()
    everyone = [torch.empty_like(got) for _ in range(2)]
    dist.all_gather(everyone, got)
    found = torch.corrcoef(torch.stack([torch.cat(everyone).double(), expected]))[0, 1]
    assert found > 0.8, (found, everyone, expected)


def check_fsdp_precision_shows() -> None:
    assert compute_dtype(sharded(plain())) == torch.float64
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert compute_dtype(sharded(plain(), mp_policy=policy)) == torch.bfloat16


def check_what_fsdp_cannot_do_is_refused() -> None:
    model = fsdp()
    for changes, message in (
        ({"method": "jvp"}, "method is 'jvp' and the model is sharded by fully_shard"),
        ({"method": "exact"}, "method 'exact' was given a group"),
        ({"method": "exact", "group": None}, "method is 'exact' and the model is sharded"),
        ({"group": None}, "so one rank alone has no gradient: pass the ranks"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            shared(model, **changes)
    held(model)
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InvalidArgument, match="has a post-accumulate-grad hook"):
        shared(model)


CHECKS = checks_of(globals())

if __name__ == "__main__":
    run_checks(CHECKS)
