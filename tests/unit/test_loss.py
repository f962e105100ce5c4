"""Token, sample and weighted losses against a naive reference, and what they say to wrong input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer_client.loss import (
    causal_token_losses,
    per_sample_loss,
    token_losses,
    weighted_loss,
)
from weighting_contract.errors import InvalidArgument

B, T, V = 3, 5, 11


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, V, generator=generator), torch.randint(V, (B, T + 1), generator=generator)


def naive_loss(logits: Tensor, label: Tensor) -> float:
    values = [float(x) for x in logits]
    return math.log(sum(math.exp(x) for x in values)) - values[int(label)]


def test_token_losses_are_negative_log_likelihoods() -> None:
    logits, ids = draw()
    labels = ids[:, :T].clone()
    labels[1, 2:] = -100
    losses, mask = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert torch.equal(mask, labels != -100)
    expected = [[naive_loss(logits[i, t], labels[i, t]) if mask[i, t] else 0.0 for t in range(T)] for i in range(B)]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_another_ignore_index() -> None:
    logits, ids = draw()
    labels = ids[:, :T].clone()
    labels[0, 0] = 7
    losses, mask = token_losses(logits, labels, ignore_index=7)
    assert torch.equal(mask, labels != 7)
    assert not losses[~mask].any()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_reduced_in_float32_or_wider(given: torch.dtype, expected: torch.dtype) -> None:
    logits, ids = draw()
    logits = logits.to(given)
    losses, mask = token_losses(logits, ids[:, 1:].int())
    assert losses.dtype == per_sample_loss(losses, mask).dtype == expected
    assert torch.equal(losses, token_losses(logits.to(expected), ids[:, 1:])[0])
    assert per_sample_loss(losses.bfloat16()).dtype == torch.float32


def test_causal_losses_take_the_next_token_as_label() -> None:
    logits, ids = draw()
    losses, mask = causal_token_losses(logits, ids)
    assert mask.all()
    torch.testing.assert_close(losses[1, 3], torch.tensor(naive_loss(logits[1, 3], ids[1, 4])))
    assert torch.equal(losses, token_losses(logits, ids[:, 1:])[0])


def test_causal_losses_leave_padding_out() -> None:
    logits, ids = draw()
    lengths = torch.tensor([T + 1, 3, 1])
    losses, mask = causal_token_losses(logits, ids, lengths)
    assert mask.sum(1).tolist() == [T, 2, 0]
    assert torch.equal(losses, causal_token_losses(logits, ids)[0] * mask)


def test_sample_loss_is_the_mean_over_real_tokens() -> None:
    losses = torch.tensor([[1.0, 2.0, 6.0], [4.0, math.nan, 5.0], [math.inf, 1.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    got = per_sample_loss(losses, mask)
    assert got.tolist() == [3.0, 4.0, 0.0]
    (gradient,) = torch.autograd.grad(got.sum(), losses)
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3] * 3, [1.0, 0.0, 0.0], [0.0] * 3]))
    assert per_sample_loss(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [3.0]


def test_weighted_loss_is_the_weighted_sum_over_b() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    weights = torch.tensor([0.5, 2.0, 0.5], dtype=torch.float64)
    loss = weighted_loss(losses, weights)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx((0.5 + 4.0 + 2.0) / 3)
    (gradient,) = torch.autograd.grad(loss, losses)
    torch.testing.assert_close(gradient, weights.float() / 3)
    assert float(weighted_loss(losses, torch.ones(3)).detach()) == pytest.approx(float(losses.detach().mean()))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3).long(), r"logits have shape \[2, 3\] and labels \[2, 3\], expected"),
        (torch.ones(2, 3, V), torch.ones(2, 4).long(), r"labels \[2, 4\], expected \[B, T, V\] and \[B, T\]"),
        (torch.ones(2, 3, V), torch.ones(2, 3), "labels are float32, expected integer token ids"),
        (torch.ones(1, 2, V), torch.tensor([[1, V]]), f"labels hold ids from 1 to {V}, expected 0 to {V - 1}"),
        (torch.ones(1, 2, V), torch.tensor([[-1, 0]]), "labels hold ids from -1 to 0, expected 0 to"),
    ],
)
def test_wrong_logits_and_labels_are_errors(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        token_losses(logits, labels)


@pytest.mark.parametrize("shape", [(B, T), (B, T + 2), (B + 1, T + 1), (T + 1,)])
def test_ids_that_do_not_fit_the_logits_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="expected \\[B, T\\+1\\] and \\[B, T, V\\]: the logits of ids"):
        causal_token_losses(draw()[0], torch.zeros(shape, dtype=torch.int64))


def test_lengths_of_another_batch_are_an_error() -> None:
    logits, ids = draw()
    with pytest.raises(InvalidArgument, match=r"lengths have shape \[2\], expected \[3\]"):
        causal_token_losses(logits, ids, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("losses", "mask", "message"),
    [
        (torch.ones(3), None, r"token_losses have shape \[3\], expected \[B, T\]"),
        (torch.ones(2, 3), torch.ones(3).bool(), r"mask is bool of shape \[3\], expected bool of the shape"),
        (torch.ones(2, 3), torch.ones(2, 3), r"mask is float32 of shape \[2, 3\], expected bool"),
    ],
)
def test_wrong_masks_are_errors(losses: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        per_sample_loss(losses, mask)


def test_a_loss_that_is_reduced_already_is_an_error_that_says_what_to_do() -> None:
    message = r"is one number for the whole batch \(shape \[\]\), as models return .* Call the model without labels"
    with pytest.raises(InvalidArgument, match=f"token_losses {message}"):
        per_sample_loss(torch.tensor(2.0))
    with pytest.raises(InvalidArgument, match=f"sample_losses {message}"):
        weighted_loss(torch.tensor(2.0), torch.ones(1))


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), r"sample_losses have shape \[2, 3\], expected \[B\]"),
        (torch.ones(0), torch.ones(0), r"sample_losses have shape \[0\]"),
        (torch.ones(3), torch.ones(2), r"weights have shape \[2\], expected \[3\]"),
        (torch.ones(3), torch.ones(3, 1), r"weights have shape \[3, 1\], expected \[3\]"),
        (
            torch.ones(3),
            torch.tensor([1.0, math.nan, 1.0]),
            r"weights\[1\] is nan, expected finite values of 0 or more",
        ),
        (torch.ones(3), torch.tensor([1.0, 1.0, math.inf]), r"weights\[2\] is inf"),
        (torch.ones(3), torch.tensor([-0.5, 1.0, 1.0]), r"weights\[0\] is -0.5"),
    ],
)
def test_wrong_weights_are_errors(losses: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        weighted_loss(losses, weights)


def test_one_weight_counts_for_all_samples() -> None:
    """As a fallback has it that can't even tell the size of the batch: training goes on."""
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert weighted_loss(losses, torch.ones(1)).item() == weighted_loss(losses, torch.ones(3)).item() == 3
