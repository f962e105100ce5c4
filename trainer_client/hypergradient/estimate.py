"""`cotangent`: checks what it is given, takes one of the methods, checks what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from trainer_client.hypergradient.errors import DegenerateCotangent
from trainer_client.hypergradient.in_place import unchanged
from trainer_client.hypergradient.methods import exact, finite_difference, forward_derivative, validation_direction
from trainer_client.hypergradient.precision import alpha_for, compute_dtype
from trainer_client.hypergradient.shards import sharded_modules
from trainer_client.hypergradient.shares import Shares
from trainer_client.hypergradient.step import Preconditioner, Step, check_losses
from weighting_contract.errors import InvalidArgument

Method = Literal["exact", "jvp", "finite_difference"]
METHODS: tuple[str, ...] = get_args(Method)

_Model = TypeVar("_Model", bound=nn.Module)


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
    alpha: float | None = None,
    base_losses: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """c_i = dL_val(theta')/dw_i for every sample of a batch, [B] float32 (float64 if the losses are); detached.

    Negative where more weight on a sample lowers the validation loss. With F the cost of a forward pass of the batch
    and v = P grad L_val, one backward pass of the validation batch, the methods cost on top of v

    * `finite_difference`, 2F: (l_i(theta + eps v) - l_i(theta - eps v)) / 2 eps, eps = alpha |theta| / |v|; or with
      `two_sided=False` 1F: (l_i(theta + eps v) - l_i(theta)) / eps, if `base_losses` are at hand. Forward passes only,
      so any attention kernel will do. Memory: v, which is one copy of the (local) trained parameters, and 4 Mi values.
      The moved parameters stand where the parameters stood, and theta where v was.
    * `jvp`, about 3F: the forward-mode derivative of the losses along v; attention by the math kernel.
    * `exact`, most: autograd through the unrolled step, a second-order graph; for tests.

    `finite_difference` and `jvp` take v at the present parameters, one small step away from theta': that saves a
    backward pass of the batch and a second copy of the parameters. `unrolled=True` takes v at theta', as `exact` always
    does. In a training loop, call it between `backward()` (of the last micro-batch) and the optimiser's step, or right
    after the step.

    During the call all submodules are in eval mode, since dropout noise would drown the differences. Parameters, their
    `.grad`, buffers, training flags and random states are afterwards what they were.

    With a `group`, all its ranks call at once, each with its own rows of the batch and with as many validation samples
    as every other. The validation gradient is averaged over the ranks once, norms and checks are of all rows, and each
    rank gets c of its own rows, with B the number of all rows. Where one rank fails, all raise, with that rank named on
    the others; but not where FSDP2 had begun to gather parameters that a rank failed before it asked for.

    Args:
        model: inside of DistributedDataParallel it is `ddp.module`; plain, compiled or `fully_shard`ed as it is.
            Parameters with `requires_grad` are theta; tied ones count once.
        sample_losses: (model, batch) -> [B] float32 or float64, reduced in it (`trainer_client.loss`).
        batch: for `sample_losses`.
        validation_batch: for `validation_loss`.
        learning_rate: eta of the step, above 0.
        weights: [B], w of the step; None: ones. They matter only where the step is unrolled.
        validation_loss: (model, validation_batch) -> scalar; None: the mean of `sample_losses`.
        preconditioner: P, by parameter name: a diagonal as tensors, or a linear symmetric function (name, gradient)
            -> tensor. None: identity. With FSDP2 a diagonal is sharded as the parameters are, such as the state of
            their optimiser, and a function sees this rank's shard.
        alpha: length of the perturbation relative to |theta|, for `finite_difference`. None: by the precision that the
            call sees, 1e-3, or 2.15e-3 for bfloat16, be it the parameters' or that of autocast around the call or of
            FSDP2's `MixedPrecisionPolicy`. An autocast inside of `sample_losses` is not seen from here: put one around
            the call too, or say alpha.
        base_losses: [B], `sample_losses` at the present parameters without dropout, for the one-sided
            `finite_difference`; None: computed. Ignored elsewhere.
        group: the ranks that share out the batch, such as `torch.distributed.group.WORLD`; None: this process has all
            of it. Not for `exact`; FSDP2 needs one, and `finite_difference`.

    Raises:
        InvalidArgument: arguments out of range, shapes that do not fit, losses that are not finite.
        DegenerateCotangent: the cotangent is all zero, constant or not finite; the message says what that points to.
        FailedPrecondition: another rank of the group failed, for a reason of its own.
    """
    _check_arguments(model, method, learning_rate, alpha, group)
    objective = validation_loss or (lambda model, batch: check_losses(sample_losses(model, batch)).mean())
    step = Step(
        model=model,
        sample_losses=lambda: check_losses(sample_losses(model, batch)),
        validation_loss=lambda: objective(model, validation_batch),
        learning_rate=learning_rate,
        weights=weights,
        preconditioner=preconditioner,
        shares=Shares(group, next((p.device for p in model.parameters()), torch.device("cpu"))),
    )
    if alpha is None:
        alpha = alpha_for(compute_dtype(model))
    with unchanged(model), step.fresh_copies(), torch.enable_grad():
        if method == "exact":
            result = exact(step)
        else:
            v = validation_direction(step, unrolled)
            if method == "jvp":
                slopes = forward_derivative(step, v)
            else:
                base = None if base_losses is None or two_sided else base_losses.detach()
                slopes = finite_difference(step, v, alpha, two_sided, base)
            # The weights' shape is checked even where their values do not matter.
            step.shares.together(lambda: step.weights_for(slopes))
            result = slopes * (-learning_rate / step.shares.total(len(slopes)))
    _check_result(result, step.shares, method, alpha)
    return result


def _check_arguments(
    model: nn.Module,
    method: str,
    learning_rate: float,
    alpha: float | None,
    group: torch.distributed.ProcessGroup | None,
) -> None:
    if method not in METHODS:
        raise InvalidArgument(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InvalidArgument(
            f"learning_rate is {learning_rate}, expected a finite number above 0: a step of length 0 teaches nothing"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InvalidArgument(f"alpha is {alpha}, expected a finite number above 0, such as 1e-3")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidArgument("model is a DistributedDataParallel, expected the module inside of it: pass model.module")
    if group is not None and method == "exact":
        raise InvalidArgument(
            "method 'exact' was given a group, but it needs the whole batch in one process: take 'finite_difference', "
            "or 'jvp', or call it without a group"
        )
    if not sharded_modules(model):
        return
    if method != "finite_difference":
        raise InvalidArgument(
            f"method is {method!r} and the model is sharded by fully_shard, whose hooks let neither tangents nor "
            "second derivatives through: take 'finite_difference'"
        )
    if group is None:
        raise InvalidArgument(
            "the model is sharded by fully_shard, so one rank alone has no gradient: pass the ranks that share the "
            "batch, such as group=torch.distributed.group.WORLD"
        )


def _check_result(result: Tensor, shares: Shares, method: str, alpha: float) -> None:
    """That the cotangent of all rows says something; the verdict is the same on all ranks."""
    smallest, largest, finite = shares.extremes(result)
    if not finite:
        raise DegenerateCotangent(
            "the cotangent is not finite: a gradient overflowed; look at the validation batch, at the preconditioner "
            "and at whether the training has diverged"
        )
    samples = shares.total(len(result))
    size = max(abs(smallest), abs(largest))
    if size == 0:
        hint = (
            f"moving the parameters by {alpha:g} of their norm changed no loss. Either the losses do not come from the "
            "given model (cached, or of another copy of it), or alpha is too small for its dtype; bfloat16 needs more"
            if method == "finite_difference"
            else "no loss depends on the given model's trained parameters along the validation gradient. Compute "
            "sample_losses with that model and without detach()"
        )
        raise DegenerateCotangent(f"the cotangent is zero for all {samples} samples: {hint}")
    if largest - smallest <= 4 * torch.finfo(result.dtype).eps * size:
        raise DegenerateCotangent(
            f"the cotangent is {smallest:g} for all {samples} samples, so it prefers none of them: "
            "the batch needs at least two different samples, and sample_losses must keep them apart"
        )
