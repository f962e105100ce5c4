"""Several documents in one row: losses, features and weights by document, although the model reads packed rows.

    documents = documents_of(position_ids=position_ids)                       # [R, T], 0 where a document starts
    losses, mask = token_losses(model(ids, position_ids=position_ids).logits, document_labels(ids, documents))
    features = batch_features(*..., *document_token_losses(losses, documents))  # a document is a sample
    loss = document_weighted_loss(losses, job.score(features, step).weights, documents)

A document is a stretch of real tokens of one row; what the row's end cuts off is a document of its own. Its last token
predicts nothing, so one of a single token has no loss and is none: padding and such tokens count nowhere.

Needs torch, knows neither models nor the service.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer_client.loss import check_not_reduced, check_weights, dtype_name, weighted_loss
from weighting_contract.errors import InvalidArgument

Normalise = Literal["tokens", "documents"]


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the D documents of packed rows [R, T] lie, in order of rows and places; tensors on the inputs' device."""

    rows: Tensor  # [D] int64
    starts: Tensor  # [D] int64, place of the first token in its row
    lengths: Tensor  # [D] int64, tokens, 2 or more
    ids: Tensor  # [R, T] int64, the document of each place; -1: padding
    batch_documents: int  # of the whole batch, over all ranks and micro-batches; D unless `within` said otherwise
    batch_tokens: int  # tokens with a loss, of the whole batch

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def predicts(self) -> Tensor:
        """[R, T] bool: places whose next one is of the same document, the only ones that have a loss."""
        same = (self.ids[:, :-1] >= 0) & (self.ids[:, :-1] == self.ids[:, 1:])
        return torch.cat([same, torch.zeros_like(self.ids[:, :1], dtype=torch.bool)], 1)

    def within(self, batch_documents: int, batch_tokens: int) -> Documents:
        """These documents as a part of a batch: a rank's or a micro-batch's, whose losses add up to the batch's.

        Args:
            batch_documents: sum of `len(documents)` over all parts.
            batch_tokens: sum of `documents.batch_tokens` over all parts.

        Raises:
            InvalidArgument: less than there is in this part alone.
        """
        tokens = int((self.lengths - 1).sum())
        if batch_documents < len(self) or batch_tokens < tokens:
            raise InvalidArgument(
                f"the batch has {batch_documents} documents and {batch_tokens} tokens with a loss, expected at least "
                f"the {len(self)} and {tokens} of this part: give the sums over all ranks and micro-batches"
            )
        return replace(self, batch_documents=batch_documents, batch_tokens=batch_tokens)


def documents_of(
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Documents:
    """The documents of packed rows, told by exactly one of three.

    Args:
        position_ids: [R, T] integer, counting up by 1 within a document and from 0 where one starts; a row may go on
            with one that an earlier row began.
        segment_ids: [R, T] integer, one value for each document of a row; below 0: padding.
        cu_seqlens: [D+1] integer, bounds of documents in a single row of `cu_seqlens[-1]` tokens, from 0 up.
        mask: [R, T] bool or 0 and 1, which tokens are real; None: all.

    Raises:
        InvalidArgument: none or several of them; shapes that do not fit together; positions that jump; a segment id
            in two separate stretches of a row; bounds that fall or don't start at 0.
    """
    given = {"position_ids": position_ids, "segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
    marks = [(name, value) for name, value in given.items() if value is not None]
    if len(marks) != 1:
        raise InvalidArgument(
            f"{' and '.join(name for name, _ in marks) or 'nothing'} given, expected exactly one of {', '.join(given)}"
        )
    ((name, values),) = marks
    if name == "cu_seqlens":
        name, values = "segment_ids", _segments_of(values)
    if values.ndim != 2 or values.is_floating_point() or values.dtype == torch.bool:
        raise InvalidArgument(
            f"{name} has shape {list(values.shape)} of {dtype_name(values.dtype)}, expected integers [R, T]"
        )
    if mask is not None and mask.shape != values.shape:
        raise InvalidArgument(f"mask has shape {list(mask.shape)}, expected {list(values.shape)} as {name}")
    real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.to(values.device) != 0
    if name == "segment_ids":
        real = real & (values >= 0)
        return _documents(real, _first_of_segments(values, real))
    return _documents(real, _first_by_positions(values, real))


def document_labels(ids: Tensor, documents: Documents, ignore_index: int = -100) -> Tensor:
    """[R, T] int64: each place's next token, `ignore_index` where that is of another document or no real token.

    Not shifted again by whoever takes them: `token_losses(logits, labels)` with the logits of all T places.

    Raises:
        InvalidArgument: ids of another shape than the documents' rows.
    """
    _check_places("ids", ids, documents, shifted=False)
    return ids.roll(-1, 1).long().masked_fill(~documents.predicts, ignore_index)


def document_tokens(ids: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """The documents as samples, for a reference or for `Job.score`: tokens [D, L] padded with 0, lengths [D].

    Raises:
        InvalidArgument: ids of another shape than the documents' rows.
    """
    _check_places("ids", ids, documents, shifted=False)
    tokens, _ = _unpacked(ids, documents, documents.lengths)
    return tokens, documents.lengths


def document_token_losses(token_losses: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Losses as `batch_features` and `per_sample_loss` read them, a document a row: ([D, L-1], mask [D, L-1] bool).

    For what else features take of every place, such as unigram NLLs of the labels, too. One long document beside many
    short ones makes much padding.

    Args:
        token_losses: [R, T], or [R, T-1] where the last place of a row was left out.

    Raises:
        InvalidArgument: another shape.
    """
    _check_places("token_losses", token_losses, documents, shifted=True)
    return _unpacked(token_losses, documents, documents.lengths - 1)


def per_document_loss(token_losses: Tensor, documents: Documents) -> Tensor:
    """Mean loss of each document's tokens but the first, [D] float32 (float64 stays).

    Args:
        token_losses: [R, T] of `document_labels`, or [R, T-1] where the last place of a row was left out. What stands
            between documents and in padding does not matter.

    Raises:
        InvalidArgument: another shape.
    """
    check_not_reduced(token_losses, "token_losses")
    _check_places("token_losses", token_losses, documents, shifted=True)
    places = token_losses.shape[1]
    counted = documents.predicts[:, :places]
    losses = token_losses if token_losses.dtype == torch.float64 else token_losses.float()
    sums = losses.new_zeros(len(documents)).index_add(0, documents.ids[:, :places][counted], losses[counted])
    return sums / (documents.lengths - 1)


def document_shares(documents: Documents, normalise: Normalise = "tokens") -> Tensor:
    """s [D] float32, mean 1 over the batch, so that L = (1/D) sum_d w_d s_d l_d with l of `per_document_loss`.

    * `tokens`: s_d = n_d D / N with n_d the document's tokens and N the batch's. With all weights 1, L is the mean over
      tokens, which packed pretraining minimises. The default, for switching weights on must not change the loss.
    * `documents`: s_d = 1. With all weights 1, L is the mean of the documents' means; short ones count as much as long
      ones, as samples do in rows of one document each.

    Where cotangents are computed, the sample losses are s_d l_d: they are what the weights multiply.
    """
    _check_normalise(normalise)
    if normalise == "documents":
        return torch.ones(len(documents), device=documents.rows.device)
    return (documents.lengths - 1).float() * (documents.batch_documents / documents.batch_tokens)


def document_weighted_loss(
    token_losses: Tensor, weights: Tensor, documents: Documents, normalise: Normalise = "tokens"
) -> Tensor:
    """L = (1/D) sum_d w_d s_d l_d, a scalar: the loss of weighted documents; `document_shares` has s.

    D is the whole batch's: the losses of ranks and micro-batches (`Documents.within`) add up to the batch's loss. Where
    gradients are averaged over ranks, as DDP and FSDP do, multiply by the number of ranks.

    Args:
        token_losses: [R, T] of `document_labels`, or [R, T-1].
        weights: [D] finite, 0 or more, mean 1 over the batch; on any device.

    Raises:
        InvalidArgument: other shapes, weights that are negative or not finite, no document.
    """
    _check_normalise(normalise)
    _check_any(documents)
    losses = per_document_loss(token_losses, documents)
    shares = document_shares(documents, normalise)
    return weighted_loss(shares.to(losses) * losses, weights) * (len(documents) / documents.batch_documents)


def document_token_weights(weights: Tensor, documents: Documents, normalise: Normalise = "tokens") -> Tensor:
    """a [R, T] float32 with `document_weighted_loss` = sum_t a_t l_t, 0 where there is no loss.

    For losses without logits in memory: `weighted_token_sum(hidden, weight, document_labels(ids, documents), a)`.

    Raises:
        InvalidArgument: as of `document_weighted_loss`.
    """
    _check_normalise(normalise)
    _check_any(documents)
    check_weights(weights, len(documents))
    by_document = weights.to(documents.rows.device, torch.float32) * document_shares(documents, normalise)
    by_token = by_document / ((documents.lengths - 1) * documents.batch_documents)
    return torch.where(documents.predicts, by_token[documents.ids.clamp(min=0)], 0.0)


# ---- Where documents start -------------------------------------------------------------------------------------------


def _first_by_positions(positions: Tensor, real: Tensor) -> Tensor:
    """[R, T] bool."""
    after_real = _shifted(real, False)
    jumps = real & after_real & (positions != 0) & (positions != _shifted(positions, 0) + 1)
    if bool(jumps.any()):
        row, place = (int(i) for i in jumps.nonzero()[0])
        before = int(positions[row, place - 1])
        raise InvalidArgument(
            f"position_ids[{row}, {place}] is {int(positions[row, place])} after {before}, expected {before + 1}, or 0 "
            "where a document starts; mark padding by mask"
        )
    return real & (~after_real | (positions == 0))


def _first_of_segments(segments: Tensor, real: Tensor) -> Tensor:
    """[R, T] bool."""
    first = real & (~_shifted(real, False) | (segments != _shifted(segments, -1)))
    rows, places = first.nonzero(as_tuple=True)
    stretches = torch.stack([rows, segments[rows, places].long()], 1)
    found, counts = torch.unique(stretches, dim=0, return_counts=True) if len(rows) else (stretches, rows)
    if bool((counts > 1).any()):
        row, segment = (int(i) for i in found[counts > 1][0])
        raise InvalidArgument(
            f"segment_ids[{row}] has {segment} in separate stretches, expected each document of a row in one: "
            "give every document its own id"
        )
    return first


def _segments_of(cu_seqlens: Tensor) -> Tensor:
    """[1, T], the number of the document of each token."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise InvalidArgument(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} of {dtype_name(cu_seqlens.dtype)}, expected integers [D+1]"
        )
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        raise InvalidArgument(f"cu_seqlens is {cu_seqlens.tolist()}, expected bounds from 0 that never fall")
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths.long())[None]


def _documents(real: Tensor, first: Tensor) -> Documents:
    """Stretches of two tokens or more, from which places are real [R, T] and which are first ones [R, T]."""
    ids = torch.where(real.flatten(), first.flatten().cumsum(0) - 1, -1)
    begins = first.flatten().nonzero().squeeze(1)  # [stretches]
    lengths = torch.bincount(ids[ids >= 0], minlength=len(begins))
    kept = lengths > 1
    renamed = torch.where(kept, kept.cumsum(0) - 1, -1)
    ids = torch.cat([renamed, renamed.new_full((1,), -1)])[ids]  # -1 stays -1: it takes the last
    begins, lengths = begins[kept], lengths[kept]
    return Documents(
        rows=begins // real.shape[1],
        starts=begins % real.shape[1],
        lengths=lengths,
        ids=ids.view(real.shape),
        batch_documents=len(begins),
        batch_tokens=int((lengths - 1).sum()),
    )


def _shifted(values: Tensor, fill: float) -> Tensor:
    """What stands one place before, `fill` before the first."""
    return torch.cat([torch.full_like(values[:, :1], fill), values[:, :-1]], 1)


# ---- Documents as rows -----------------------------------------------------------------------------------------------


def _unpacked(values: Tensor, documents: Documents, counts: Tensor) -> tuple[Tensor, Tensor]:
    """([D, max counts], mask): the first `counts` places of each document, 0 beyond them."""
    longest = int(counts.max()) if len(counts) else 0
    steps = torch.arange(longest, device=values.device)
    mask = steps < counts[:, None]
    places = (documents.starts[:, None] + steps).clamp(max=max(values.shape[1] - 1, 0))
    return torch.where(mask, values[documents.rows[:, None], places], 0), mask


def _check_places(what: str, values: Tensor, documents: Documents, shifted: bool) -> None:
    rows, places = documents.ids.shape
    if values.shape != (rows, places) and not (shifted and values.shape == (rows, places - 1)):
        less = f", or [{rows}, {places - 1}] without the last place" if shifted else ""
        raise InvalidArgument(
            f"{what} have shape {list(values.shape)}, expected [{rows}, {places}] as the packed rows{less}"
        )


def _check_normalise(normalise: str) -> None:
    if normalise not in get_args(Normalise):
        raise InvalidArgument(f"normalise is {normalise!r}, expected one of {', '.join(get_args(Normalise))}")


def _check_any(documents: Documents) -> None:
    if not len(documents):
        raise InvalidArgument("the rows hold no document of two tokens or more, expected at least one")
