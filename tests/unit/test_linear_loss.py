"""Losses without logits in memory against those with them: values, gradients, memory, and what wrong input meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.linear_loss import fused_mean, make_head, one_pass, peak_bytes, run, two_passes, with_logits
from trainer_client.hypergradient import cotangent
from trainer_client.linear_loss import (
    causal_linear_token_losses,
    default_chunk_tokens,
    linear_token_losses,
    weighted_linear_loss,
    weighted_token_sum,
)
from trainer_client.loss import causal_token_losses, per_sample_loss, token_losses, weighted_loss
from weighting_contract.errors import InvalidArgument

B, T, D, V = 3, 7, 5, 11
WEIGHTS = torch.tensor([0.5, 2.0, 0.5])
CHUNKS = (1, 4, 100, None)  # [3 x 7] tokens: one by one, with a rest, all at once


def draw(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (2 * torch.randn(*shape, generator=generator) for shape in ((B, T, D), (V, D)))
    offsets = torch.randn(V, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[1, 4:] = labels[2, 0] = -100
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, offsets)]
    return leaves[0], leaves[1], leaves[2] if bias else None, labels


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None = None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_losses(logits, labels)[0]


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [i for i in inputs if i is not None], retain_graph=True))


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_equal_to_the_losses_of_the_logits(chunk: int | None, bias: bool, softcap: float | None) -> None:
    hidden, weight, offsets, labels = draw(bias=bias)
    expected = plain(hidden, weight, offsets, labels, softcap)
    losses, mask = linear_token_losses(hidden, weight, labels, bias=offsets, softcap=softcap, chunk_tokens=chunk)
    assert torch.equal(mask, labels != -100)
    torch.testing.assert_close(losses, expected)
    upstream = torch.randn(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        gradients((upstream * losses).sum(), hidden, weight, offsets),
        gradients((upstream * expected).sum(), hidden, weight, offsets),
    )

    expected = weighted_loss(per_sample_loss(expected, mask), WEIGHTS)
    loss, sample_losses = weighted_linear_loss(
        hidden, weight, labels, WEIGHTS, bias=offsets, softcap=softcap, chunk_tokens=chunk
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sample_losses, per_sample_loss(losses, mask).detach())
    assert not sample_losses.requires_grad
    torch.testing.assert_close(  # scaled, as by gradient accumulation
        gradients(loss * 0.25, hidden, weight, offsets), gradients(expected * 0.25, hidden, weight, offsets)
    )


def test_gradients_are_those_of_differences() -> None:
    hidden, weight, offsets, labels = draw()
    shares = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def losses(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_token_losses(h, w, labels, bias=b, softcap=3.0, chunk_tokens=4)[0]

    def total(h: Tensor, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return weighted_token_sum(h, w, labels, a, bias=b, chunk_tokens=4)[0]

    assert torch.autograd.gradcheck(losses, (hidden, weight, offsets))
    assert torch.autograd.gradcheck(total, (hidden, weight, offsets, shares))


def test_only_what_is_trained_gets_gradients() -> None:
    hidden, weight, offsets, labels = draw()
    for frozen in (hidden, weight, offsets):
        assert frozen is not None
        frozen.requires_grad_(False)
        trained = [t for t in (hidden, weight, offsets) if t is not None and t.requires_grad]
        expected = gradients(plain(hidden, weight, offsets, labels).sum(), *trained)
        got = gradients(linear_token_losses(hidden, weight, labels, bias=offsets)[0].sum(), *trained)
        torch.testing.assert_close(got, expected)
        total, _ = weighted_token_sum(hidden, weight, labels, torch.ones(B, T), bias=offsets)
        torch.testing.assert_close(gradients(total, *trained), expected)
        frozen.requires_grad_(True)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    hidden, weight, offsets, labels = draw()
    losses, _ = linear_token_losses(hidden, weight, labels, bias=offsets)
    loss, _ = weighted_linear_loss(hidden, weight, labels, WEIGHTS, bias=offsets)
    for scalar in (losses.mean(), loss):
        scalar.backward(retain_graph=True)
        first = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        assert first[0] is not None
        assert first[1] is not None
        kept = first[0].clone(), first[1].clone()
        first[0].zero_()  # the caller's, to do with as he likes
        (2 * scalar).backward()
        torch.testing.assert_close((hidden.grad, weight.grad), (2 * kept[0], 2 * kept[1]))
        hidden.grad = weight.grad = None


def test_second_derivatives_are_refused_not_wrong() -> None:
    hidden, weight, _, labels = draw()
    for loss in (
        linear_token_losses(hidden, weight, labels)[0].sum(),
        weighted_linear_loss(hidden, weight, labels, WEIGHTS)[0],
    ):
        with pytest.raises(InvalidArgument, match=r"no second derivatives .* the loss of logits"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("ignored", [7, -1])
def test_another_ignore_index(ignored: int) -> None:
    hidden, weight, _, labels = draw()
    labels = labels.clamp(min=0)
    labels[0, 3] = ignored
    losses, mask = linear_token_losses(hidden, weight, labels, ignore_index=ignored)
    expected, _ = token_losses(hidden @ weight.T, labels, ignored)
    assert torch.equal(mask, labels != ignored)
    torch.testing.assert_close(losses, expected)


def test_causal_losses_take_the_next_token_as_label() -> None:
    hidden, weight, _, _ = draw()
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([T + 1, 3, 1])
    expected = causal_token_losses(hidden @ weight.T, ids, lengths)
    torch.testing.assert_close(causal_linear_token_losses(hidden, weight, ids, lengths), expected)


def test_no_tokens_and_no_gradients() -> None:
    hidden, weight, _, labels = draw()
    losses, mask = linear_token_losses(hidden[:, :0], weight, labels[:, :0])
    assert losses.shape == mask.shape == (B, 0)
    with torch.no_grad():
        loss, sample_losses = weighted_linear_loss(hidden, weight, labels, WEIGHTS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, weighted_loss(sample_losses, WEIGHTS))
    nothing, _ = weighted_linear_loss(hidden, weight, torch.full((B, T), -100), WEIGHTS)
    assert float(nothing.detach()) == 0
    assert not any(g.any() for g in gradients(nothing, hidden, weight))


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_under_autocast_as_near_to_float32_as_the_plain_loss(masters: torch.dtype) -> None:
    hidden, weight, _, labels = draw(masters, bias=False)
    exact = per_sample_loss(plain(hidden.double(), weight.double(), None, labels), labels != -100)
    exact_gradients = gradients(weighted_loss(exact, WEIGHTS), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        naive = weighted_loss(per_sample_loss(plain(hidden, weight, None, labels), labels != -100), WEIGHTS)
        fused, _ = weighted_linear_loss(hidden, weight, labels, WEIGHTS, chunk_tokens=4)
        losses, mask = linear_token_losses(hidden, weight, labels, chunk_tokens=4)
    assert losses.dtype == fused.dtype == torch.float32
    naive_gradients = gradients(naive, hidden, weight)
    for loss in (fused, weighted_loss(per_sample_loss(losses, mask), WEIGHTS)):
        torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-5)
        for got, of_naive, of_exact in zip(
            gradients(loss, hidden, weight), naive_gradients, exact_gradients, strict=True
        ):
            assert got.dtype == masters
            least = 2 * float((of_naive - of_exact).norm()) + 1e-2 * float(of_exact.norm())
            assert float((got - of_exact).norm()) <= least


def test_float64_stays_under_autocast() -> None:
    hidden, weight, _, labels = draw(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = linear_token_losses(hidden, weight, labels)
    torch.testing.assert_close(losses, plain(hidden, weight, None, labels))


def test_small_shares_survive_float16() -> None:
    hidden, weight, _, labels = draw(torch.float16, bias=False)
    loss, _ = weighted_token_sum(hidden, weight, labels, torch.full((B, T), 1e-8))
    expected = gradients(plain(hidden.double(), weight.double(), None, labels).sum() * 1e-8 * 2**24, hidden, weight)
    got = gradients(loss * 2**24, hidden, weight)  # a loss scaler's factor
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)


# ---- Where it is used ------------------------------------------------------------------------------------------------


class TiedModel(nn.Module):
    """Embedding, a layer, and the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)

    def hidden(self, ids: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.layer(self.embedding(ids)))
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        """[B] sample losses, made within the model's forward pass, where FSDP2 has gathered the parameters."""
        return per_sample_loss(*causal_linear_token_losses(self.hidden(ids[:, :-1]), self.embedding.weight, ids))


def tied_model() -> tuple[TiedModel, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TiedModel(), torch.randint(V, (B, T + 1))


def with_logits_losses(model: TiedModel, ids: Tensor) -> Tensor:
    return per_sample_loss(*causal_token_losses(model.hidden(ids[:, :-1]) @ model.embedding.weight.T, ids))


def test_tied_weights_get_both_gradients() -> None:
    model, ids = tied_model()
    parameters = list(model.parameters())
    expected = gradients(with_logits_losses(model, ids).mean(), *parameters)
    torch.testing.assert_close(gradients(model(ids).mean(), *parameters), expected)


def test_cotangents_are_those_of_the_plain_losses() -> None:
    model, ids = tied_model()
    model.double()
    validation = torch.randint(V, (2, T + 1), generator=torch.Generator().manual_seed(4))
    got, expected = (
        cotangent(model, losses, ids, validation, learning_rate=0.1)
        for losses in (lambda m, batch: m(batch), with_logits_losses)
    )
    torch.testing.assert_close(got, expected)


def test_the_cotangent_of_a_loss_that_is_reduced_already_says_what_to_do() -> None:
    model, ids = tied_model()
    with pytest.raises(InvalidArgument, match=r"sample_losses is one number .* Call the model without labels"):
        cotangent(model, lambda m, batch: m(batch).mean(), ids, ids, learning_rate=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_torch_compile_leaves_it_alone() -> None:
    model, ids = tied_model()

    def loss(ids: Tensor) -> Tensor:
        return weighted_loss(model(ids), WEIGHTS)

    parameters = list(model.parameters())
    expected = gradients(loss(ids), *parameters)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(ids), *parameters), expected)
    torch._dynamo.reset()


@pytest.fixture
def group() -> Iterator[None]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_inside_of_fsdp_and_ddp() -> None:
    from torch.distributed.fsdp import fully_shard

    model, ids = tied_model()
    model(ids).mean().backward()
    expected = [p.grad for p in model.parameters()]
    replicated = nn.parallel.DistributedDataParallel(tied_model()[0])
    replicated(ids).mean().backward()
    torch.testing.assert_close([p.grad for p in replicated.parameters()], expected)

    sharded = tied_model()[0]
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    sharded(ids).mean().backward()
    got: list[Any] = [p.grad for p in sharded.parameters()]
    torch.testing.assert_close([g.full_tensor() for g in got], expected)
    with pytest.raises(InvalidArgument, match="sharded DTensor, expected the whole output matrix"):
        linear_token_losses(torch.ones(1, 1, D), sharded.embedding.weight, torch.zeros(1, 1).long())


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_no_more_memory_than_the_fused_unweighted_loss() -> None:
    head = make_head(4, 64, 256, 4096, torch.float32, "cpu")
    peak = {method: peak_bytes(lambda m=method: run(m, head), head.hidden.device) for method in (one_pass, two_passes)}
    gradient_bytes = 4 * (head.hidden.numel() + head.weight.numel())
    logits_bytes = 4 * head.labels.numel() * len(head.weight)
    chunk_bytes = 4 * default_chunk_tokens(head.hidden, head.weight) * len(head.weight)
    assert chunk_bytes < logits_bytes / 3
    for bytes_held in peak.values():
        assert gradient_bytes + chunk_bytes <= bytes_held <= 1.05 * (gradient_bytes + chunk_bytes)
    assert peak_bytes(lambda: run(with_logits, head), head.hidden.device) > gradient_bytes + logits_bytes
    if hasattr(F, "linear_cross_entropy"):
        fused = peak_bytes(lambda: run(fused_mean, head), head.hidden.device)
        assert max(peak.values()) <= 1.2 * fused


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "dtype", "expected"),
    [
        (2**15, 4096, 2**17, torch.bfloat16, 320),  # a language model's head
        (2**15, 4096, 2**17, torch.float32, 640),
        (64, 8, 2**10, torch.float32, 256),  # 1 MiB, where an eighth would be a few tokens
        (4, 2, 2**24, torch.float32, 1),  # never none
    ],
)
def test_chunks_take_an_eighth_of_what_is_there(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, expected: int
) -> None:
    hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (tokens, vocabulary))
    assert default_chunk_tokens(hidden, weight) == expected


# ---- Wrong input -----------------------------------------------------------------------------------------------------

HIDDEN, MATRIX, LABELS = torch.ones(2, 3, D), torch.ones(V, D), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_token_losses(HIDDEN, MATRIX.T, LABELS), r"weight \[5, 11\], expected \[..., d\] and \[V, d\]"),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS[:, 1:]), r"labels have shape \[2, 2\], expected \[2, 3\]"),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS.float()), "labels are float32, expected integer"),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS + V), f"labels hold the id {V}, expected 0 to {V - 1}"),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS - 1), "labels hold the id -1, expected 0 to"),
        (
            lambda: linear_token_losses(HIDDEN, MATRIX, LABELS, bias=torch.ones(D)),
            r"bias has shape \[5\], expected \[11\]",
        ),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS, softcap=0.0), "softcap is 0.0, expected a finite number"),
        (lambda: linear_token_losses(HIDDEN, MATRIX, LABELS, chunk_tokens=0), "chunk_tokens is 0, expected 1 or more"),
        (lambda: linear_token_losses(HIDDEN.bfloat16(), MATRIX, LABELS), "hidden is bfloat16 and weight float32"),
        (lambda: causal_linear_token_losses(HIDDEN, MATRIX, LABELS), r"ids have shape \[2, 3\] and hidden \[2, 3, 5\]"),
        (
            lambda: weighted_linear_loss(HIDDEN, MATRIX, LABELS, torch.ones(3)),
            r"weights have shape \[3\], expected \[2\]",
        ),
        (
            lambda: weighted_linear_loss(HIDDEN, MATRIX, LABELS, -torch.ones(2)),
            r"weights\[0\] is -1.0, expected finite",
        ),
        (lambda: weighted_linear_loss(HIDDEN[0], MATRIX, LABELS[0], torch.ones(3)), r"labels have shape \[3\]"),
        (
            lambda: weighted_token_sum(HIDDEN, MATRIX, LABELS, torch.ones(2)),
            r"token_weights have shape \[2\], expected \[2, 3\]",
        ),
    ],
)
def test_wrong_input_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
