"""The ways to <grad l_i, v>, and to the cotangent by autograd through the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer_client.hypergradient.errors import DegenerateCotangent
from trainer_client.hypergradient.in_place import Perturbation
from trainer_client.hypergradient.step import Step, Tensors, check_losses, check_scalar
from weighting_contract.errors import InvalidArgument


def exact(step: Step) -> Tensor:
    """The cotangent, [B]; of one process."""
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        losses = step.sample_losses()
        weights = step.weights_for(losses).requires_grad_()
        batch_loss = (weights * losses).sum() / len(losses)
        moved = step.precondition(step.autograd(batch_loss, "the batch's loss", create_graph=True))
        updated = {name: p - step.learning_rate * moved[name] for name, p in step.parameters.items()}
        loss = check_scalar(_call_with(step.model, updated, step.validation_loss), "validation_loss")
        if loss.requires_grad:
            (result,) = torch.autograd.grad(loss, [weights], allow_unused=True)
            if result is not None:
                return result
    raise DegenerateCotangent(
        "the validation loss after the step does not depend on the weights; compute both losses with the given model "
        "and without detach() or no_grad()"
    )


def validation_direction(step: Step, unrolled: bool) -> Tensors:
    """v = P grad L_val, at theta' if `unrolled`, else at theta; to be written on."""

    def direction() -> Tensors:
        return step.preconditioned_gradients(step.validation_loss, "validation_loss")

    if not unrolled:
        return direction()
    to_updated = Perturbation(step.local_parameters(), _batch_direction(step))
    try:
        to_updated.move(-step.learning_rate)
        return direction()
    finally:
        to_updated.restore()


def _batch_direction(step: Step) -> Tensors:
    """P times the gradient of L, the weighted mean over the rows of all ranks."""
    losses = step.losses(graph=True)
    mean_share = step.shares.total(len(losses)) / step.shares.world  # the ranks' gradients are averaged
    return step.preconditioned_gradients(
        lambda: (step.weights_for(losses) * losses).sum() / mean_share, "the batch's loss"
    )


def forward_derivative(step: Step, v: Tensors) -> Tensor:
    """<grad l_i, v>, [b], by forward mode."""

    def slopes() -> Tensor:
        # The fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
            dual_losses = _call_with(step.model, _duals(step.parameters, v), step.sample_losses)
            losses, tangents = forward_ad.unpack_dual(dual_losses)  # type: ignore[no-untyped-call]
            return torch.zeros_like(losses) if tangents is None else tangents.clone()

    return step.shares.together(slopes)


def _duals(parameters: Mapping[str, Tensor], v: Tensors) -> Tensors:
    """The parameters with v as tangents."""
    with warnings.catch_warnings():
        # The first dual tensor of a process makes torch compile its own derivatives with its own deprecated compiler.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return {
            name: forward_ad.make_dual(p.detach(), v[name].to(p))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
        }


def finite_difference(step: Step, v: Tensors, alpha: float, two_sided: bool, base: Tensor | None) -> Tensor:
    """<grad l_i, v> by differences, [b]; v is used up."""
    perturbation, eps = _perturbation(step, v, alpha)
    try:
        perturbation.move(eps)
        ahead = step.losses()
        if two_sided:
            perturbation.mirror()
            return (ahead - step.losses()) / (2 * eps)
    finally:
        perturbation.restore()

    def checked(losses: Tensor) -> Tensor:
        if losses.shape != ahead.shape:
            raise InvalidArgument(
                f"base_losses have shape {list(losses.shape)}, expected [{len(ahead)}] as sample_losses"
            )
        return check_losses(losses, "base_losses").to(ahead)

    known = step.losses() if base is None else base
    return (ahead - step.shares.together(lambda: checked(known))) / eps


def _perturbation(step: Step, v: Tensors, alpha: float) -> tuple[Perturbation, float]:
    """(the parameters' way along v, eps)."""
    length = step.shares.norm(step.parameters, v)
    if not math.isfinite(length) or length == 0:
        raise DegenerateCotangent(
            f"the gradient of the validation loss has norm {length}, expected a positive number: "
            + ("the parameters do not matter to it" if length == 0 else "the training has diverged, or v overflows")
        )
    parameters = step.local_parameters()
    eps = alpha * step.shares.norm(step.parameters, parameters) / length
    if eps == 0:
        raise DegenerateCotangent(
            f"all trained parameters are zero, so a step of {alpha:g} of their norm leads nowhere; use method 'jvp'"
        )
    return Perturbation(parameters, v), eps


class _Call(nn.Module):
    """A function that uses a model, as a module: `functional_call` takes nothing else."""

    def __init__(self, model: nn.Module, function: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function()


def _call_with(model: nn.Module, parameters: Tensors, function: Callable[[], Tensor]) -> Tensor:
    """`function()` while the model's parameters are other tensors, graph included; tied ones change together."""
    named = {f"model.{name}": tensor for name, tensor in parameters.items()}
    result: Tensor = torch.func.functional_call(_Call(model, function), named, ())
    return result
