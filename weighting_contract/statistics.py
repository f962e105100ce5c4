"""The portable per-sample statistics: what a weighter reads of a batch, computed alike by trainers and services.

They need token losses of some model and unigram NLLs of some corpus, and nothing else of either, so a weighter that
reads them carries over to other models, vocabularies and corpora. Two stages: raw rows see their own sample only and
can be computed wherever the sample is (ranks, packs); standardising needs the rows of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument

EASY_BELOW = 0.5  # nats; a token with a smaller loss counts as easy
BOUND = 10.0  # no statistic leaves [-BOUND, BOUND]
FLAT_BELOW = 1e-5  # a column that deviates by less, relative to its largest value, is constant but for rounding

_QUANTILES = (0.10, 0.25, 0.50, 0.75, 0.90)
_QUANTILE_NAMES = tuple(f"loss_q{round(100 * q)}" for q in _QUANTILES)

RAW_NAMES: tuple[str, ...] = (
    "tokens",
    "loss_mean",
    "loss_std",
    "easy_share",
    "gain_mean",
    "gain_positive_share",
    "gain_ratio",
    "unigram_mean",
    *_QUANTILE_NAMES,
)

NAMES: tuple[str, ...] = (
    "loss_z",
    "loss_std",
    "easy_share",
    "gain_mean",
    "gain_z",
    "gain_positive_share",
    "gain_ratio",
    "unigram_centred",
    "unigram_z",
    *_QUANTILE_NAMES,
)

# Statistics that are z-scores over the batch, and the raw columns that they are of.
_RELATIVE = {
    "loss_z": "loss_mean",
    "gain_z": "gain_mean",
    "unigram_z": "unigram_mean",
    **{name: name for name in _QUANTILE_NAMES},
}


def portable_statistics(token_losses: Tensor, unigram_nll: Tensor, mask: Tensor | None = None) -> Tensor:
    """The statistics of one whole batch, [B, len(NAMES)] float32: `standardise(raw_statistics(...))`.

    With l the token losses of a sample, u its unigram NLLs and g = u - l its context gain, over real tokens:

    | name                  | formula                                      | unit                |
    |-----------------------|----------------------------------------------|---------------------|
    | `loss_z`              | z of mean l                                  | batch deviations    |
    | `loss_std`            | standard deviation of l                      | nats                |
    | `easy_share`          | share of tokens with l < 0.5                 | 0 to 1              |
    | `gain_mean`           | mean g                                       | nats                |
    | `gain_z`              | z of mean g                                  | batch deviations    |
    | `gain_positive_share` | share of tokens with g > 0                   | 0 to 1              |
    | `gain_ratio`          | mean g / mean u                              | 1 (0 where u is 0)  |
    | `unigram_centred`     | mean u - batch mean of mean u                | nats                |
    | `unigram_z`           | z of mean u                                  | batch deviations    |
    | `loss_q10` ... `q90`  | z of the .1 .25 .5 .75 .9 quantiles of l     | batch deviations    |

    z(x) = (x - mean x) / std x over the batch; 0 in a batch of one sample and where all samples are equal. Deviations
    are those of the whole population, quantiles are interpolated linearly, and every value is clamped to [-10, 10].

    Args and Raises: as of `raw_statistics`. A loss that is not finite gives statistics that are not finite, which a
    service refuses.
    """
    return standardise(raw_statistics(token_losses, unigram_nll, mask))


def raw_statistics(token_losses: Tensor, unigram_nll: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rows of RAW_NAMES, [B, len(RAW_NAMES)] float32; each depends on its own sample only.

    On a CPU to the bit, for T up to 32768 (torch sums a longer single row on several threads): the other rows of the
    call, and how many there are, change nothing. T does, in the last bits: sums are grouped by places.

    Args:
        token_losses: [B, T] floating, nats.
        unigram_nll: [B, T] floating, nats: `unigram_nll_table` at the same tokens.
        mask: [B, T] bool, True where a token is real; None: everywhere. What stands at other places does not matter.
            The row of a sample without real tokens is all zeros.

    Raises:
        InvalidArgument: shapes that do not fit together, or an empty batch.
    """
    _check_tokens(token_losses, unigram_nll, mask)

    def real(values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """[B, T], `elsewhere` where no token is real; contiguous, as the order of a sum follows the memory."""
        return (values if mask is None else torch.where(mask, values, elsewhere)).contiguous()

    losses, unigram = real(token_losses.float()), real(unigram_nll.float())
    gain = unigram - losses
    whole = losses.new_full(losses.shape[:1], losses.shape[1])
    count = whole if mask is None else mask.sum(1, dtype=torch.float32)  # [B]
    divisor = count.clamp(min=1)
    easy = real(losses < EASY_BELOW, False)
    # One reduction for five columns: with small batches it is the number of operations that costs.
    means = torch.stack([losses, easy, gain, gain > 0, unigram]).sum(2) / divisor
    loss_mean, easy_share, gain_mean, gain_positive_share, unigram_mean = means
    deviation = real(losses - loss_mean[:, None])
    quantiles = _quantiles(real(losses, torch.inf), count)
    columns = (
        count,
        loss_mean,
        (deviation.square().sum(1) / divisor).sqrt(),
        easy_share,
        gain_mean,
        gain_positive_share,
        torch.where(unigram_mean == 0, 0.0, gain_mean / unigram_mean),
        unigram_mean,
        *(quantiles if mask is None else torch.where(count > 0, quantiles, 0.0)),
    )
    return torch.stack(columns, 1)


def standardise(raw: Tensor) -> Tensor:
    """The statistics of a batch from its raw rows, [B, len(NAMES)] float32, columns as NAMES.

    Samples without real tokens get zeros and do not count in the batch's means and deviations.

    Args:
        raw: [B, len(RAW_NAMES)] floating, the rows of the whole batch, in any order.

    Raises:
        InvalidArgument: another shape, or an empty batch.
    """
    if raw.ndim != 2 or raw.shape[1] != len(RAW_NAMES) or not len(raw):
        raise InvalidArgument(
            f"raw has shape {list(raw.shape)}, expected [B, {len(RAW_NAMES)}] with at least one sample: "
            "rows of raw_statistics"
        )
    column = dict(zip(RAW_NAMES, raw.float().unbind(1), strict=True))
    present = column["tokens"] > 0
    values = torch.stack([column[name] for name in _RELATIVE.values()])  # [columns, B], as each is reduced by itself
    centred = _centred(values, present)
    columns = {
        **column,
        **dict(zip(_RELATIVE, _scaled(centred, values, present), strict=True)),
        "unigram_centred": centred[list(_RELATIVE).index("unigram_z")],
    }
    return torch.stack([columns[name] for name in NAMES], 1).clamp(-BOUND, BOUND)


def z_scores(values: Tensor, present: Tensor) -> Tensor:
    """(values - mean) / std over the samples of a batch that count; 0 for the others and where all are equal.

    Args:
        values: [..., B] float32; each row is a column of the batch's statistics.
        present: [B] bool, True for samples that have real tokens.
    """
    return _scaled(_centred(values, present), values, present)


def _centred(values: Tensor, present: Tensor) -> Tensor:
    """[..., B] the values less their mean over the samples that count; 0 for the others."""
    kept = torch.where(present, values, 0.0)
    mean = kept.sum(-1, keepdim=True) / present.sum().clamp(min=1)
    return torch.where(present, kept - mean, 0.0)


def _scaled(centred: Tensor, values: Tensor, present: Tensor) -> Tensor:
    """[..., B] the centred values by their standard deviation; 0 where the values are equal."""
    deviation = (centred.square().sum(-1, keepdim=True) / present.sum().clamp(min=1)).sqrt()
    size = torch.where(present, values, 0.0).abs().amax(-1, keepdim=True)
    # Negated, so that NaN and infinity are no constants and come out as NaN.
    varies = ~((deviation <= FLAT_BELOW * size) & size.isfinite())
    return torch.where(varies, centred / deviation, 0.0)


def unigram_nll_table(counts: Tensor) -> Tensor:
    """Negative log of the add-one-smoothed frequency of every token of a vocabulary, [V] float32, nats.

    u_t = -log((counts_t + 1) / (sum counts + V)); index it with token ids [B, T] for `unigram_nll`.

    Args:
        counts: [V] how often each token occurs in the corpus; a tensor or array of any real dtype.

    Raises:
        InvalidArgument: not one dimension, empty, or counts that are negative or not finite.
    """
    counts = torch.as_tensor(counts).double()
    if counts.ndim != 1 or not len(counts):
        raise InvalidArgument(f"counts has shape {list(counts.shape)}, expected [V] with V of 1 or more")
    if not bool((counts.isfinite() & (counts >= 0)).all()):
        raise InvalidArgument("counts holds values that are negative or not finite, expected occurrences of each token")
    return ((counts.sum() + len(counts)).log() - (counts + 1).log()).float()


def _quantiles(losses: Tensor, count: Tensor) -> Tensor:
    """[len(_QUANTILES), B], linear between neighbours; of the `count` smallest losses of each row.

    Args:
        losses: [B, T] float32, infinite where no token is real.
        count: [B] float32 real tokens; the quantiles of a row without are infinite.
    """
    ordered = losses.sort(1).values  # real tokens first
    shares = torch.tensor(_QUANTILES).to(losses.device, non_blocking=True)
    place = (count - 1).clamp(min=0)[:, None] * shares  # [B, len(_QUANTILES)]
    below = place.floor()
    low, high = ordered.gather(1, torch.cat([below, place.ceil()], 1).long()).chunk(2, 1)
    return torch.lerp(low, high, place - below).T


def _check_tokens(token_losses: Tensor, unigram_nll: Tensor, mask: Tensor | None) -> None:
    shape = list(token_losses.shape)
    if token_losses.ndim != 2 or not token_losses.numel():
        raise InvalidArgument(f"token_losses has shape {shape}, expected [B, T] with B and T of 1 or more")
    if unigram_nll.shape != token_losses.shape:
        raise InvalidArgument(
            f"unigram_nll has shape {list(unigram_nll.shape)}, expected that of token_losses, {shape}"
        )
    if mask is not None and (mask.shape != token_losses.shape or mask.dtype != torch.bool):
        raise InvalidArgument(
            f"mask is {str(mask.dtype).removeprefix('torch.')} of shape {list(mask.shape)}, "
            f"expected bool of the shape of token_losses, {shape}"
        )
