"""The cotangent of a batch: how the validation loss after the next optimiser step depends on each sample's weight.

    theta' = theta - eta P grad L(theta),  L = (1/B) sum_i w_i l_i
    c_i    = dL_val(theta')/dw_i = -(eta/B) <P grad L_val, grad l_i>      (Yu et al. 2025, arXiv 2507.16178)

Needs torch and a model, knows no service. A call leaves the model as it found it, bit for bit, also when it raises.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from weighting_contract.errors import InvalidArgument

Method = Literal["exact", "jvp", "finite_difference"]
METHODS: tuple[str, ...] = get_args(Method)

Preconditioner = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]

_Model = TypeVar("_Model", bound=nn.Module)
_Tensors = dict[str, Tensor]  # by parameter name


class DegenerateCotangent(InvalidArgument):
    """There is nothing to teach: the cotangent is all zero, equal for all samples, or not finite."""


def cotangent(
    model: _Model,
    sample_losses: Callable[[_Model, Any], Tensor],
    batch: Any,
    validation_batch: Any,
    *,
    learning_rate: float,
    weights: Tensor | None = None,
    method: str = "finite_difference",
    validation_loss: Callable[[_Model, Any], Tensor] | None = None,
    preconditioner: Preconditioner | None = None,
    unrolled: bool = False,
    two_sided: bool = True,
    alpha: float = 1e-3,
    base_losses: Tensor | None = None,
) -> Tensor:
    """c_i = dL_val(theta')/dw_i for every sample of a batch, [B] float32 (float64 if the losses are); detached.

    Negative where more weight on a sample lowers the validation loss. With F the cost of a forward pass of the batch
    and v = P grad L_val, one backward pass of the validation batch, the methods cost on top of v

    * `finite_difference`, 2F: (l_i(theta + eps v) - l_i(theta - eps v)) / 2 eps, eps = alpha |theta| / |v|; or with
      `two_sided=False` 1F: (l_i(theta + eps v) - l_i(theta)) / eps, if `base_losses` are at hand. Forward passes only,
      so any attention kernel will do.
    * `jvp`, about 3F: the forward-mode derivative of the losses along v; attention by the math kernel.
    * `exact`, most: autograd through the unrolled step, a second-order graph; for tests.

    `finite_difference` and `jvp` take v at the present parameters, one small step away from theta': that saves a
    backward pass of the batch. `unrolled=True` takes v at theta', as `exact` always does. In a training loop, call it
    between `backward()` and the optimiser's step, or right after the step.

    During the call all submodules are in eval mode, since dropout noise would drown the differences. Parameters, their
    `.grad`, buffers, training flags and random states are afterwards what they were.

    Args:
        model: whole on this process; inside of DistributedDataParallel it is `ddp.module`. Parameters with
            `requires_grad` are theta; tied ones count once.
        sample_losses: (model, batch) -> [B] float32 or float64, reduced in it (`trainer_client.loss`).
        batch: for `sample_losses`.
        validation_batch: for `validation_loss`.
        learning_rate: eta of the step, above 0.
        weights: [B], w of the step; None: ones. They matter only where the step is unrolled.
        validation_loss: (model, validation_batch) -> scalar; None: the mean of `sample_losses`.
        preconditioner: P, by parameter name: a diagonal as tensors, or a linear symmetric function (name, gradient)
            -> tensor. None: identity.
        alpha: length of the perturbation relative to |theta|, for `finite_difference`. 1e-3 is for float32 compute;
            bfloat16 resolves steps of 4e-3 and needs more.
        base_losses: [B], `sample_losses` at the present parameters without dropout, for the one-sided
            `finite_difference`; None: computed. Ignored elsewhere.

    Raises:
        InvalidArgument: arguments out of range, shapes that do not fit, losses that are not finite.
        DegenerateCotangent: the cotangent is all zero, constant or not finite; the message says what that points to.
    """
    _check_arguments(model, method, learning_rate, alpha)
    objective = validation_loss or (lambda model, batch: _losses(sample_losses(model, batch)).mean())
    step = _Step(
        model=model,
        parameters={name: p for name, p in model.named_parameters() if p.requires_grad},
        sample_losses=lambda: _losses(sample_losses(model, batch)),
        validation_loss=lambda: objective(model, validation_batch),
        learning_rate=learning_rate,
        weights=weights,
        preconditioner=preconditioner,
    )
    step.check()
    with _unchanged(model), torch.enable_grad():
        if method == "exact":
            result = _exact(step)
        else:
            v = _validation_direction(step, unrolled)
            if method == "jvp":
                slopes = _jvp(step, v)
            else:
                base = None if base_losses is None or two_sided else _losses(base_losses.detach(), "base_losses")
                slopes = _finite_difference(step, v, alpha, two_sided, base)
            step.weights_for(slopes)  # its shape is checked even where its values do not matter
            result = slopes * (-learning_rate / len(slopes))
    _check_result(result, method, alpha)
    return result


@dataclass(frozen=True)
class _Step:
    """The optimiser step that is differentiated."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    sample_losses: Callable[[], Tensor]
    validation_loss: Callable[[], Tensor]
    learning_rate: float
    weights: Tensor | None
    preconditioner: Preconditioner | None

    def check(self) -> None:
        if not self.parameters:
            raise InvalidArgument(
                "model has no parameter with requires_grad, so no step can change the validation loss"
            )
        if not isinstance(self.preconditioner, Mapping):
            return
        for name, parameter in self.parameters.items():
            if name not in self.preconditioner:
                raise InvalidArgument(f"preconditioner has no entry {name!r}, expected one for every trained parameter")
            if self.preconditioner[name].shape != parameter.shape:
                raise InvalidArgument(
                    f"preconditioner[{name!r}] has shape {list(self.preconditioner[name].shape)}, "
                    f"expected that of the parameter, {list(parameter.shape)}"
                )

    def weights_for(self, losses: Tensor) -> Tensor:
        """[B] detached, like `losses`."""
        if self.weights is None:
            return torch.ones_like(losses)
        if self.weights.shape != losses.shape:
            raise InvalidArgument(
                f"weights have shape {list(self.weights.shape)}, expected [{len(losses)}] as the losses"
            )
        if not bool(self.weights.isfinite().all()):
            raise InvalidArgument("weights hold values that are not finite")
        return self.weights.detach().to(losses)

    def precondition(self, gradients: _Tensors) -> _Tensors:
        """P times the gradients."""
        if self.preconditioner is None:
            return gradients
        if isinstance(self.preconditioner, Mapping):
            return {name: self.preconditioner[name].to(g) * g for name, g in gradients.items()}
        return {name: self.preconditioner(name, g) for name, g in gradients.items()}

    def gradients(self, loss: Tensor, what: str, create_graph: bool = False) -> _Tensors:
        """Of a scalar with respect to every trained parameter, zero where it does not matter."""
        if loss.ndim:
            raise InvalidArgument(f"{what} has shape {list(loss.shape)}, expected a scalar")
        parameters = list(self.parameters.values())
        found = (
            torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
            if loss.requires_grad
            else [None] * len(parameters)
        )
        if all(g is None for g in found):
            raise DegenerateCotangent(
                f"{what} does not depend on the model's trained parameters; "
                "compute it with the given model and without detach() or no_grad()"
            )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self.parameters.items(), found, strict=True)
        }

    def update(self, create_graph: bool = False) -> tuple[_Tensors, Tensor]:
        """(theta', the weights [B] that it came from)."""
        losses = self.sample_losses()
        weights = self.weights_for(losses).requires_grad_(create_graph)
        gradients = self.gradients((weights * losses).sum() / len(losses), "the batch's loss", create_graph)
        moved = self.precondition(gradients)
        return {name: p - self.learning_rate * moved[name] for name, p in self.parameters.items()}, weights


def _exact(step: _Step) -> Tensor:
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        updated, weights = step.update(create_graph=True)
        loss = _call_with(step.model, updated, step.validation_loss)
        if loss.ndim:
            raise InvalidArgument(f"validation_loss has shape {list(loss.shape)}, expected a scalar")
        if loss.requires_grad:
            (result,) = torch.autograd.grad(loss, [weights], allow_unused=True)
            if result is not None:
                return result
    raise DegenerateCotangent(
        "the validation loss after the step does not depend on the weights; compute both losses with the given model "
        "and without detach() or no_grad()"
    )


def _validation_direction(step: _Step, unrolled: bool) -> _Tensors:
    """v = P grad L_val, at theta' if `unrolled`, else at theta; detached."""
    at = {name: p.detach() for name, p in step.parameters.items()}
    if unrolled:
        updated, _ = step.update()
        at = {name: t.detach() for name, t in updated.items()}
    with _swapped(step.parameters, at):
        return {
            name: v.detach()
            for name, v in step.precondition(step.gradients(step.validation_loss(), "validation_loss")).items()
        }


def _jvp(step: _Step, v: _Tensors) -> Tensor:
    """<grad l_i, v>, [B]."""
    # The fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
        dual_losses = _call_with(step.model, _duals(step.parameters, v), step.sample_losses)
        losses, slopes = forward_ad.unpack_dual(dual_losses)  # type: ignore[no-untyped-call]
        return torch.zeros_like(losses) if slopes is None else slopes.clone()


def _duals(parameters: Mapping[str, Tensor], v: _Tensors) -> _Tensors:
    """The parameters with v as tangents."""
    with warnings.catch_warnings():
        # The first dual tensor of a process makes torch compile its own derivatives with its own deprecated compiler.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return {
            name: forward_ad.make_dual(p.detach(), v[name].to(p))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
        }


def _finite_difference(step: _Step, v: _Tensors, alpha: float, two_sided: bool, base: Tensor | None) -> Tensor:
    """<grad l_i, v> by differences, [B]."""
    length = _norm(v)
    if not math.isfinite(length) or length == 0:
        raise DegenerateCotangent(
            f"the gradient of the validation loss has norm {length}, expected a positive number: "
            + ("the parameters do not matter to it" if length == 0 else "the training has diverged, or v overflows")
        )
    eps = alpha * _norm(step.parameters) / length
    if eps == 0:
        raise DegenerateCotangent(
            f"all trained parameters are zero, so a step of {alpha:g} of their norm leads nowhere; use method 'jvp'"
        )

    @torch.no_grad()
    def losses_at(distance: float) -> Tensor:
        moved = {name: torch.add(p.detach(), v[name].to(p), alpha=distance) for name, p in step.parameters.items()}
        with _swapped(step.parameters, moved):
            return step.sample_losses()

    ahead = losses_at(eps)
    if two_sided:
        return (ahead - losses_at(-eps)) / (2 * eps)
    if base is None:
        with torch.no_grad():
            base = step.sample_losses()
    if base.shape != ahead.shape:
        raise InvalidArgument(f"base_losses have shape {list(base.shape)}, expected [{len(ahead)}] as sample_losses")
    return (ahead - base.to(ahead)) / eps


@contextmanager
def _swapped(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the parameters hold other values; then they get back the very tensors that they held."""
    held = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = values[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = held[name]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode and buffers to write on; afterwards each submodule has its own mode and the buffers that it had.

    The flag is set directly: `eval()` of some modules does more than that, such as merging adapters into parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}  # modules may share one
        for module, name, buffer in buffers:
            module._buffers[name] = copies[id(buffer)]
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, mode in modes:
            module.training = mode


class _Call(nn.Module):
    """A function that uses a model, as a module: `functional_call` takes nothing else."""

    def __init__(self, model: nn.Module, function: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function()


def _call_with(model: nn.Module, parameters: _Tensors, function: Callable[[], Tensor]) -> Tensor:
    """`function()` while the model's parameters are other tensors, graph included; tied ones change together."""
    named = {f"model.{name}": tensor for name, tensor in parameters.items()}
    result: Tensor = torch.func.functional_call(_Call(model, function), named, ())
    return result


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all tensors together; squares are summed in float32, or float64 for float64."""
    norms = [
        torch.linalg.vector_norm(t.detach(), dtype=None if t.dtype == torch.float64 else torch.float32)
        for t in tensors.values()
    ]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms])))


def _check_arguments(model: nn.Module, method: str, learning_rate: float, alpha: float) -> None:
    if method not in METHODS:
        raise InvalidArgument(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InvalidArgument(
            f"learning_rate is {learning_rate}, expected a finite number above 0: a step of length 0 teaches nothing"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise InvalidArgument(f"alpha is {alpha}, expected a finite number above 0, such as 1e-3")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidArgument("model is a DistributedDataParallel, expected the module inside of it: pass model.module")


def _losses(losses: Tensor, what: str = "sample_losses") -> Tensor:
    """The losses themselves, [B], checked."""
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


def _check_result(result: Tensor, method: str, alpha: float) -> None:
    if not bool(result.isfinite().all()):
        raise DegenerateCotangent(
            "the cotangent is not finite: a gradient overflowed; look at the validation batch, at the preconditioner "
            "and at whether the training has diverged"
        )
    largest = float(result.abs().max())
    if largest == 0:
        hint = (
            f"moving the parameters by {alpha:g} of their norm changed no loss. Either the losses do not come from the "
            "given model (cached, or of another copy of it), or alpha is too small for its dtype; bfloat16 needs more"
            if method == "finite_difference"
            else "no loss depends on the given model's trained parameters along the validation gradient. Compute "
            "sample_losses with that model and without detach()"
        )
        raise DegenerateCotangent(f"the cotangent is zero for all {len(result)} samples: {hint}")
    if float(result.max() - result.min()) <= 4 * torch.finfo(result.dtype).eps * largest:
        raise DegenerateCotangent(
            f"the cotangent is {float(result[0]):g} for all {len(result)} samples, so it prefers none of them: "
            "the batch needs at least two different samples, and sample_losses must keep them apart"
        )
