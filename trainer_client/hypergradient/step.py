"""The optimiser step that is differentiated: its losses, its weights, and gradients over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer_client.hypergradient.errors import DegenerateCotangent
from trainer_client.hypergradient.in_place import gradients_aside, own_memory
from trainer_client.hypergradient.shards import is_sharded, local, reshard
from trainer_client.hypergradient.shares import Shares
from trainer_client.loss import check_not_reduced
from weighting_contract.errors import InvalidArgument

Preconditioner = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]

Tensors = dict[str, Tensor]  # by parameter name; of a sharded parameter this rank's part, as a plain tensor


@dataclass
class Step:
    """What a method needs to know. Passes are collective: all ranks make the same ones in the same order."""

    model: nn.Module
    sample_losses: Callable[[], Tensor]
    validation_loss: Callable[[], Tensor]
    learning_rate: float
    weights: Tensor | None
    preconditioner: Preconditioner | None
    shares: Shares
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        reshard(self.model)  # what is whole after a forward pass is not what an optimiser steps
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._check()

    def _check(self) -> None:
        if not self.parameters:
            raise InvalidArgument(
                "model has no parameter with requires_grad, so no step can change the validation loss"
            )
        for name, p in self.parameters.items():
            if is_sharded(p) and getattr(p, "_post_accumulate_grad_hooks", None):
                raise InvalidArgument(
                    f"parameter {name!r} is sharded and has a post-accumulate-grad hook, which the backward pass of "
                    "the validation loss would call as if it were a training step: take the hook off for the call"
                )
        if not isinstance(self.preconditioner, Mapping):
            return
        for name, parameter in self.parameters.items():
            if name not in self.preconditioner:
                raise InvalidArgument(f"preconditioner has no entry {name!r}, expected one for every trained parameter")
            entry = self.preconditioner[name]
            if entry.shape != parameter.shape or local(entry).shape != local(parameter).shape:
                raise InvalidArgument(
                    f"preconditioner[{name!r}] has shape {list(local(entry).shape)}, "
                    f"expected that of the parameter, {list(local(parameter).shape)}"
                    + (" of this rank's shard, as a DTensor" if is_sharded(parameter) else "")
                )

    def local_parameters(self) -> Tensors:
        return {name: local(p) for name, p in self.parameters.items()}

    @contextmanager
    def fresh_copies(self) -> Iterator[None]:
        """No pass after this uses what one in here has gathered or cast."""
        try:
            yield
        finally:
            self._forget_copies()

    def _forget_copies(self) -> None:
        """FSDP2 keeps gathered parameters and autocast keeps cast ones; neither sees it when theirs change in place."""
        reshard(self.model)
        torch.clear_autocast_cache()

    def losses(self, graph: bool = False) -> Tensor:
        """[b] of this rank's rows at what the parameters now hold."""
        self._forget_copies()
        with torch.set_grad_enabled(graph):
            return self.shares.together(self.sample_losses)

    def weights_for(self, losses: Tensor) -> Tensor:
        """[b] detached, like `losses`."""
        if self.weights is None:
            return torch.ones_like(losses)
        if self.weights.shape != losses.shape:
            raise InvalidArgument(
                f"weights have shape {list(self.weights.shape)}, expected [{len(losses)}] as the losses"
            )
        if not bool(self.weights.isfinite().all()):
            raise InvalidArgument("weights hold values that are not finite")
        return self.weights.detach().to(losses)

    def precondition(self, gradients: Tensors) -> Tensors:
        """P times the gradients, which it takes out of their dictionary one by one: there is never a second copy."""
        return {name: self._preconditioned(name, gradients.pop(name)) for name in list(gradients)}

    def _preconditioned(self, name: str, gradient: Tensor) -> Tensor:
        if self.preconditioner is None:
            return gradient
        if isinstance(self.preconditioner, Mapping):
            factor = local(self.preconditioner[name]).to(gradient)
            return factor * gradient if gradient.requires_grad else gradient.mul_(factor)
        result = self.preconditioner(name, gradient)
        return result if result is gradient or result.requires_grad else result.clone()  # it may be the caller's own

    def preconditioned_gradients(self, loss: Callable[[], Tensor], what: str) -> Tensors:
        """P times `gradients`."""
        found = self.gradients(loss, what)
        return self.shares.together(lambda: self.precondition(found))

    def gradients(self, loss: Callable[[], Tensor], what: str) -> Tensors:
        """Of the mean over the ranks of a scalar, with respect to every trained parameter; detached, to be written on.

        Raises:
            InvalidArgument: it is no scalar.
            DegenerateCotangent: it does not depend on the parameters.
        """
        self._forget_copies()
        value = self.shares.together(lambda: check_scalar(loss(), what))
        sharded = any(is_sharded(p) for p in self.parameters.values())
        found = self.shares.together(lambda: (self._backward if sharded else self.autograd)(value, what))
        own_memory(found, self.local_parameters())
        # FSDP2 has averaged what it shards.
        self.shares.average(found[name] for name, p in self.parameters.items() if not is_sharded(p))
        return found

    def autograd(self, loss: Tensor, what: str, create_graph: bool = False) -> Tensors:
        """Of a scalar of this rank, by torch.autograd.grad."""
        parameters = list(self.parameters.values())
        found = (
            torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
            if loss.requires_grad
            else (None,) * len(parameters)
        )
        return self._all_of(found, what)

    def _backward(self, loss: Tensor, what: str) -> Tensors:
        """The same into `.grad`, where the hooks of FSDP2 leave the mean over the ranks."""
        with gradients_aside(self.parameters):
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            reshard(self.model)
            return self._all_of([None if p.grad is None else local(p.grad) for p in self.parameters.values()], what)

    def _all_of(self, found: tuple[Tensor | None, ...] | list[Tensor | None], what: str) -> Tensors:
        """Gradients by name, zero where there is none."""
        if all(g is None for g in found):
            raise DegenerateCotangent(
                f"{what} does not depend on the model's trained parameters; "
                "compute it with the given model and without detach() or no_grad()"
            )
        return {
            name: torch.zeros_like(local(p)) if g is None else g
            for (name, p), g in zip(self.parameters.items(), found, strict=True)
        }


def check_scalar(loss: Tensor, what: str) -> Tensor:
    """The loss itself, checked."""
    if loss.ndim:
        raise InvalidArgument(f"{what} has shape {list(loss.shape)}, expected a scalar")
    return loss


def check_losses(losses: Tensor, what: str = "sample_losses") -> Tensor:
    """The losses themselves, [b], checked."""
    check_not_reduced(losses, what)
    if losses.ndim != 1 or not len(losses):
        raise InvalidArgument(f"{what} have shape {list(losses.shape)}, expected [B] with B of 1 or more")
    if losses.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"{what} are {str(losses.dtype).removeprefix('torch.')}, expected float32 or float64: "
            "reduce token losses in float32, as trainer_client.loss does"
        )
    values = losses.detach()
    if not bool(values.isfinite().all()):
        sample = int((~values.isfinite()).nonzero()[0])
        raise InvalidArgument(f"{what}[{sample}] is {float(values[sample])}, expected a finite loss of every sample")
    return losses
