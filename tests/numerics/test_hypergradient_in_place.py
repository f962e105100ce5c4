"""Moving parameters in their own memory: interrupts, memory, torch.compile, autocast and the choice of alpha."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.hypergradient import Transformer, plain_losses, spearman, trained_transformer
from tests.numerics.test_hypergradient import (
    SmallTransformer,
    assert_unchanged,
    compute,
    relative_error,
    sample_losses,
    snapshot,
    trained,
)
from trainer_client.hypergradient import cotangent, in_place
from trainer_client.hypergradient.in_place import Perturbation, own_memory
from trainer_client.hypergradient.precision import alpha_for, compute_dtype


@pytest.fixture
def model() -> SmallTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallTransformer().double()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "PIECE", 100)  # the largest parameter here has 512 values


# ---- Taking it back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing_call", [2, 3])
def test_an_interrupt_half_way_changes_nothing(model: SmallTransformer, failing_call: int) -> None:
    before = snapshot(trained(model))
    calls = 0

    def interrupted(model: SmallTransformer, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return sample_losses(model, ids)

    with pytest.raises(KeyboardInterrupt):
        compute(model, sample_losses=interrupted)
    assert_unchanged(model, before)


class InterruptedAt(TorchDispatchMode):
    """Raises KeyboardInterrupt before the n-th operation from now."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self.left = operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupt_between_any_two_copies_changes_nothing() -> None:
    original = {"a": torch.randn(7, 30), "b": torch.randn(30, 7).T, "c": torch.randn(())}
    completed = False
    for operation in range(1, 100):
        parameters = {name: t.clone() for name, t in original.items()}
        perturbation = Perturbation(parameters, {name: torch.randn(t.shape) for name, t in original.items()})
        interruption = InterruptedAt(operation)
        try:
            with interruption:
                perturbation.move(0.1)
                perturbation.mirror()
            completed = True
            assert not any(torch.equal(parameters[name], t) for name, t in original.items())
        except KeyboardInterrupt:
            pass
        with pytest.raises(KeyboardInterrupt) if operation % 2 else nullcontext():  # a second one while restoring
            interruption.left = 1 + operation // 2 if operation % 2 else 0
            with interruption:
                perturbation.restore()
            if operation % 2:
                raise KeyboardInterrupt  # nothing was left to interrupt
        assert all(torch.equal(parameters[name], t) for name, t in original.items()), operation
        if completed:
            return
    pytest.fail("the moves have more operations than were tried")


@pytest.mark.usefixtures("small_pieces")
def test_pieces_do_not_change_the_values(model: SmallTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces = compute(model)
    monkeypatch.setattr(in_place, "PIECE", 1 << 22)
    assert relative_error(in_pieces, compute(model)) < 1e-10


def test_the_way_back_is_as_long_as_the_way_there() -> None:
    theta, v = torch.randn(1000), torch.randn(1000)
    parameters = {"p": theta.clone()}
    perturbation = Perturbation(parameters, {"p": v.clone()})
    perturbation.move(1e-3)
    there = (parameters["p"].double() - theta.double()).clone()
    assert torch.equal(parameters["p"], torch.add(theta, v, alpha=1e-3))
    perturbation.mirror()
    torch.testing.assert_close(theta.double() - parameters["p"].double(), there, rtol=0, atol=2e-7)
    perturbation.restore()
    assert torch.equal(parameters["p"], theta)


def test_directions_that_share_memory_are_taken_apart() -> None:
    one = torch.randn(4)
    flat = torch.randn(8)
    directions = {"a": one, "b": one, "c": torch.randn(()).expand(4), "d": flat[:4], "e": flat[4:], "f": flat[2:6]}
    values = {name: t.clone() for name, t in directions.items()}
    parameters = {name: torch.zeros(4) for name in directions} | {"g": one.clone()}
    directions["g"] = values["g"] = parameters["g"]
    own_memory(directions, parameters)
    for number, t in enumerate(directions.values()):
        t.fill_(number)
    assert [float(t.sum()) / 4 for t in directions.values()] == list(range(len(directions)))
    assert directions["d"].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "copied without need"
    assert torch.equal(parameters["g"], values["g"])


def test_a_preconditioner_keeps_what_it_returns(model: SmallTransformer) -> None:
    own = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = {name: t.clone() for name, t in own.items()}
    compute(model, preconditioner=lambda name, g: own[name])
    assert all(torch.equal(t, before[name]) for name, t in own.items())


# ---- Memory ----------------------------------------------------------------------------------------------------------


class CountsBytes(TorchDispatchMode):
    """Bytes of tensors that came to be inside of it and live; the most at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage(), known)
        return result

    def _count(self, storage: Any, known: set[int]) -> None:
        place = storage.data_ptr()
        if id(storage) in known or place in self.live or not place:
            return
        self.live[place] = storage.nbytes()
        self.most = max(self.most, sum(self.live.values()))
        weakref.finalize(storage, self.live.pop, place, None)


class Wide(nn.Module):
    """Parameters of 3 MB, and activations of a few kB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def squares(model: nn.Module, x: Tensor) -> Tensor:
    losses: Tensor = model(x).square().mean(1)
    return losses


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("preconditioned", [None, "diagonal", "function"])
def test_memory_is_one_copy_of_the_parameters(
    monkeypatch: pytest.MonkeyPatch, two_sided: bool, preconditioned: str | None
) -> None:
    monkeypatch.setattr(in_place, "PIECE", 1 << 12)
    wide = Wide()
    size = sum(p.nbytes for p in wide.parameters())
    table = {name: torch.ones_like(p) for name, p in wide.named_parameters()}
    given: dict[str | None, Any] = {"diagonal": table, "function": lambda name, g: g * table[name]}
    with CountsBytes() as counted:
        cotangent(
            wide,
            squares,
            torch.randn(4, 512),
            torch.randn(4, 512),
            learning_rate=1e-2,
            two_sided=two_sided,
            preconditioner=given.get(preconditioned),
        )
    # What a function gives may be its own and is copied, one parameter (a third) after the other.
    beside = 0.67 if preconditioned == "function" else 0.0
    assert size <= counted.most <= (1.06 + beside) * size, counted.most / size


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_not_compiled_again() -> None:
    model = Transformer(width=16, layers=1)
    batch, validation = (
        torch.randint(256, (rows, 9), generator=torch.Generator().manual_seed(rows)) for rows in (6, 4)
    )
    expected = cotangent(model, plain_losses, batch, validation, learning_rate=1e-3)
    compiled = torch.compile(model, backend="eager")  # only traces: no compiler of C++ is needed
    optimiser = torch.optim.SGD(compiled.parameters(), 0.0)

    def step() -> Tensor:
        optimiser.zero_grad()
        plain_losses(compiled, batch).mean().backward()  # type: ignore[no-untyped-call]
        taught = cotangent(compiled, plain_losses, batch, validation, learning_rate=1e-3)
        optimiser.step()
        return taught

    assert relative_error(step(), expected) < 1e-2  # compiled for both sizes, and for training and eval mode
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert relative_error(step(), expected) < 1e-2


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_under_bfloat16_autocast_ranks_are_those_of_float32(seed: int) -> None:
    # The hardest moment that was found: the rules have just begun to be learned, and the curvature is high.
    model, batch, validation = trained_transformer(seed, steps=20)
    given: tuple[Any, ...] = (model, plain_losses, batch, validation)
    exact = cotangent(*given, learning_rate=2e-3, method="exact")
    with torch.autocast("cpu", torch.bfloat16):
        found = [cotangent(*given, learning_rate=2e-3, two_sided=two_sided) for two_sided in (True, False)]
    assert min(spearman(f, exact) for f in found) >= 0.95
    assert all(spearman(f, exact) < 1 for f in found), "autocast has done nothing"


@pytest.mark.parametrize("where", ["around the call", "around the call and in the losses"])
def test_what_autocast_has_cast_before_is_not_used_again(where: str) -> None:
    model, batch, validation = trained_transformer(0, steps=0)

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain_losses(model, ids)

    chosen: Callable[[Any, Any], Tensor] = plain_losses if where == "around the call" else losses
    alone = cotangent(model, losses, batch, validation, learning_rate=2e-3, alpha=alpha_for(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        before = plain_losses(model, batch).detach()  # leaves its casts in autocast's cache
        got = cotangent(model, chosen, batch, validation, learning_rate=2e-3)
        assert torch.equal(plain_losses(model, batch).detach(), before), "casts of moved parameters are left"
    torch.testing.assert_close(got, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()))


def test_alpha_follows_the_coarsest_precision_in_sight(model: SmallTransformer) -> None:
    assert compute_dtype(model) == torch.float64
    assert compute_dtype(model.float()) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(model) == torch.bfloat16
    model.layers[0].bfloat16().requires_grad_(False)  # frozen, as below adapters
    assert compute_dtype(model) == torch.bfloat16
    chosen = {d: alpha_for(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    assert list(chosen.values()) == [1e-3, 1e-3, 1e-3, 2.15e-3]
    assert alpha_for(torch.float8_e4m3fn) == 2.15e-3
