"""Documents in packed rows against loops over the documents alone, and a packed training step with a real weighter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trainer_client import Timeouts, connect
from trainer_client.features import FEATURE_NAMES, batch_features
from trainer_client.linear_loss import weighted_token_sum
from trainer_client.loss import causal_token_losses, per_sample_loss, token_losses, weighted_loss
from trainer_client.packed import (
    Documents,
    document_labels,
    document_shares,
    document_token_losses,
    document_token_weights,
    document_tokens,
    document_weighted_loss,
    documents_of,
    per_document_loss,
)
from weighting_contract.errors import InvalidArgument
from weighting_contract.statistics import unigram_nll_table

# Documents of 3 and 4 tokens and one of a single token; one cut by the row's end before, one of 5, and padding.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [4, 5, 0, 1, 2, 3, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, -1]])
PLACES = [(0, 0, 3), (0, 3, 4), (1, 0, 2), (1, 2, 5)]  # row, start, length
IDS = torch.arange(10, 26).view(2, 8)
LOSSES = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 0.0])


def documents() -> Documents:
    return documents_of(position_ids=POSITIONS, mask=MASK)


def places_of(found: Documents) -> list[tuple[int, int, int]]:
    return list(zip(found.rows.tolist(), found.starts.tolist(), found.lengths.tolist(), strict=True))


def naive_losses(losses: Tensor = LOSSES) -> Tensor:
    """[D], document by document."""
    return torch.stack([losses[row, start : start + length - 1].mean() for row, start, length in PLACES])


# ---- Where documents lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": POSITIONS, "mask": MASK},
        {"position_ids": POSITIONS, "mask": MASK.bool()},
        {"position_ids": POSITIONS},  # a place of padding is a document of a single token, which is none
        {"segment_ids": SEGMENTS},
        {"segment_ids": SEGMENTS.clamp(min=0) + 7 * (SEGMENTS < 0), "mask": MASK},
    ],
)
def test_documents_are_found_whatever_tells_them(marks: dict[str, Tensor]) -> None:
    found = documents_of(**marks)
    assert places_of(found) == PLACES
    assert len(found) == found.batch_documents == 4
    assert found.batch_tokens == 2 + 3 + 1 + 4
    assert found.ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [2, 2, 3, 3, 3, 3, 3, -1]]


def test_bounds_tell_the_documents_of_one_row() -> None:
    found = documents_of(cu_seqlens=torch.tensor([0, 3, 7, 7, 8, 10], dtype=torch.int32))
    assert places_of(found) == [(0, 0, 3), (0, 3, 4), (0, 8, 2)]


def test_padding_on_the_left_and_in_between() -> None:
    positions = torch.tensor([[1, 1, 0, 1, 2, 9, 0, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]])
    assert places_of(documents_of(position_ids=positions, mask=mask)) == [(0, 2, 3), (0, 6, 2)]


def test_rows_without_documents() -> None:
    empty = documents_of(position_ids=torch.zeros(2, 3).long())
    assert (len(empty), empty.batch_tokens, empty.predicts.any().item()) == (0, 0, False)
    assert per_document_loss(torch.ones(2, 3), empty).shape == (0,)
    assert document_tokens(torch.ones(2, 3).long(), empty)[0].shape == (0, 0)
    with pytest.raises(InvalidArgument, match="no document of two tokens or more"):
        document_weighted_loss(torch.ones(2, 3), torch.ones(0), empty)


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


def test_no_label_crosses_a_boundary() -> None:
    assert document_labels(IDS, documents()).tolist() == [
        [11, 12, -100, 14, 15, 16, -100, -100],
        [19, -100, 21, 22, 23, 24, -100, -100],
    ]


def test_documents_as_samples() -> None:
    tokens, lengths = document_tokens(IDS, documents())
    assert tokens.tolist() == [[10, 11, 12, 0, 0], [13, 14, 15, 16, 0], [18, 19, 0, 0, 0], [20, 21, 22, 23, 24]]
    assert lengths.tolist() == [3, 4, 2, 5]
    losses, mask = document_token_losses(LOSSES, documents())
    assert mask.sum(1).tolist() == [2, 3, 1, 4]
    torch.testing.assert_close(losses[1, :3], LOSSES[0, 3:6])
    torch.testing.assert_close(per_sample_loss(losses, mask), naive_losses())


def test_mean_loss_by_document_and_its_gradient() -> None:
    losses = torch.where(documents().predicts, LOSSES, torch.nan).requires_grad_()  # nothing else is looked at
    got = per_document_loss(losses, documents())
    torch.testing.assert_close(got, naive_losses())
    torch.testing.assert_close(per_document_loss(losses[:, :-1], documents()), naive_losses())
    (gradient,) = torch.autograd.grad((got * WEIGHTS).sum(), losses)
    expected = torch.zeros_like(LOSSES)
    for weight, (row, start, length) in zip(WEIGHTS, PLACES, strict=True):
        expected[row, start : start + length - 1] = float(weight) / (length - 1)
    torch.testing.assert_close(gradient, expected)
    assert per_document_loss(LOSSES.bfloat16(), documents()).dtype == torch.float32


def test_weighted_loss_by_tokens_and_by_documents() -> None:
    counts = torch.tensor([length - 1 for _, _, length in PLACES])
    by_documents = document_weighted_loss(LOSSES, WEIGHTS, documents(), "documents")
    torch.testing.assert_close(by_documents, (WEIGHTS * naive_losses()).sum() / 4)
    by_tokens = document_weighted_loss(LOSSES, WEIGHTS, documents())
    torch.testing.assert_close(by_tokens, (WEIGHTS * counts * naive_losses()).sum() / counts.sum())


def test_weights_of_one_change_nothing() -> None:
    ones = torch.ones(4)
    tokens_mean = LOSSES[documents().predicts].mean()
    torch.testing.assert_close(document_weighted_loss(LOSSES, ones, documents()), tokens_mean)
    torch.testing.assert_close(document_weighted_loss(LOSSES, ones, documents(), "documents"), naive_losses().mean())
    assert float(document_shares(documents()).mean()) == pytest.approx(1)
    assert document_shares(documents(), "documents").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("normalise", ["tokens", "documents"])
def test_token_weights_give_the_same_loss(normalise: Any) -> None:
    weights = document_token_weights(WEIGHTS, documents(), normalise)
    expected = document_weighted_loss(LOSSES, WEIGHTS, documents(), normalise)
    torch.testing.assert_close((weights * LOSSES).sum(), expected)
    assert not weights[~documents().predicts].any()


@pytest.mark.parametrize("normalise", ["tokens", "documents"])
def test_parts_of_a_batch_add_up_to_its_loss(normalise: Any) -> None:
    whole = document_weighted_loss(LOSSES, WEIGHTS, documents(), normalise)
    parts = [documents_of(position_ids=POSITIONS[r : r + 1], mask=MASK[r : r + 1]) for r in range(2)]
    total = sum(len(p) for p in parts), sum(p.batch_tokens for p in parts)
    losses = [
        document_weighted_loss(LOSSES[r : r + 1], WEIGHTS[2 * r : 2 * r + 2], part.within(*total), normalise)
        for r, part in enumerate(parts)
    ]
    torch.testing.assert_close(losses[0] + losses[1], whole)
    shares = torch.cat([document_shares(part.within(*total), normalise) for part in parts])
    torch.testing.assert_close(shares, document_shares(documents(), normalise))


# ---- Training on packed rows -----------------------------------------------------------------------------------------

VOCABULARY = 32
TIMEOUTS = Timeouts(score_s=30, meta_update_s=30, admin_s=60, close_s=30)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def test_a_packed_step_is_that_of_the_same_documents_in_rows_of_their_own(tmp_path: Path) -> None:
    """Losses, features, a real weighter's weights, the weighted loss and its gradient, with and without logits."""
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.where(torch.tensor([[False], [True]]) & (torch.arange(8) < 2), POSITIONS - 4, POSITIONS)
    found = documents_of(position_ids=positions, mask=MASK)
    assert places_of(found) == PLACES
    unigram = unigram_nll_table(torch.bincount(ids.flatten(), minlength=VOCABULARY))
    model = llama()
    parameters = list(model.parameters())

    tokens, lengths = document_tokens(ids, found)
    alone, mask = causal_token_losses(model(input_ids=tokens[:, :-1]).logits, tokens, lengths)
    labels = document_labels(ids, found)
    hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state
    losses, predicted = token_losses(model.lm_head(hidden), labels)
    assert torch.equal(predicted, found.predicts)
    torch.testing.assert_close(per_document_loss(losses, found), per_sample_loss(alone, mask))

    features_alone = batch_features(alone, unigram[tokens[:, 1:]], mask)
    document_losses, document_mask = document_token_losses(losses, found)
    document_unigram, _ = document_token_losses(unigram[labels.clamp(min=0)], found)
    features = batch_features(document_losses, document_unigram, document_mask)
    torch.testing.assert_close(features, features_alone, rtol=1e-3, atol=1e-4)

    spec = {"features": {"names": list(FEATURE_NAMES)}, "head": {"width": 8, "attention_heads": 2}}
    with (
        connect(f"embedded://{tmp_path / 'state'}", timeouts=TIMEOUTS, on_failure="raise") as client,
        client.open_job(weighter="documents", spec=spec) as job,
    ):
        job.meta_update(torch.tensor([1.0, -1.0, 0.5, -0.5]), features, step=0)
        weights = job.score(features, step=1).weights
    assert weights.shape == (4,)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)

    expected = weighted_loss(per_sample_loss(alone, mask), weights)
    packed = document_weighted_loss(losses, weights, found, "documents")
    shares = document_token_weights(weights, found, "documents")
    fused, _ = weighted_token_sum(hidden, model.lm_head.weight, labels, shares, chunk_tokens=5)
    of_expected = torch.autograd.grad(expected, parameters)
    for loss in (packed, fused):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters, retain_graph=True), of_expected)


# ---- Wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: documents_of(), "nothing given, expected exactly one of position_ids, segment_ids, cu_seqlens"),
        (lambda: documents_of(position_ids=POSITIONS, segment_ids=SEGMENTS), "position_ids and segment_ids given"),
        (lambda: documents_of(position_ids=POSITIONS[0]), r"position_ids has shape \[8\] of int64, expected integers"),
        (lambda: documents_of(segment_ids=SEGMENTS.float()), "segment_ids has shape .* of float32, expected integers"),
        (lambda: documents_of(segment_ids=SEGMENTS, mask=MASK[:1]), r"mask has shape \[1, 8\], expected \[2, 8\]"),
        (
            lambda: documents_of(position_ids=torch.tensor([[0, 1, 2], [0, 1, 3]])),
            r"position_ids\[1, 2\] is 3 after 1, expected 2, or 0 where a document starts",
        ),
        (
            lambda: documents_of(segment_ids=torch.tensor([[5, 5, 6, 5]])),
            r"segment_ids\[0\] has 5 in separate stretches",
        ),
        (lambda: documents_of(cu_seqlens=torch.tensor([1, 4])), r"cu_seqlens is \[1, 4\], expected bounds from 0"),
        (lambda: documents_of(cu_seqlens=torch.tensor([0, 4, 2])), "expected bounds from 0 that never fall"),
        (lambda: documents_of(cu_seqlens=torch.tensor([0])), r"cu_seqlens has shape \[1\] of int64, expected integers"),
        (
            lambda: document_labels(IDS[:, :-1], documents()),
            r"ids have shape \[2, 7\], expected \[2, 8\] as the packed",
        ),
        (lambda: per_document_loss(LOSSES[:, :6], documents()), r"expected \[2, 8\] as the packed rows, or \[2, 7\]"),
        (lambda: per_document_loss(torch.tensor(1.0), documents()), "token_losses is one number for the whole batch"),
        (lambda: document_shares(documents(), "rows"), "normalise is 'rows', expected one of tokens, documents"),  # type: ignore[arg-type]
        (
            lambda: document_weighted_loss(LOSSES, torch.ones(3), documents()),
            r"weights have shape \[3\], expected \[4\]",
        ),
        (lambda: document_token_weights(-torch.ones(4), documents()), r"weights\[0\] is -1.0, expected finite"),
        (lambda: documents().within(3, 100), "the batch has 3 documents .* expected at least the 4 and 10"),
    ],
)
def test_wrong_input_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
