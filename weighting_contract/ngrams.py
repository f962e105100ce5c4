"""The target profile: how much likelier each hashed uni- and bigram of tokens is in a target than in a pool.

A profile is a table of log ratios, made once of a job's validation documents; a sample's statistic is the mean of the
table's entries at its n-grams. The idea of hashed n-gram features is that of DSIR (Xie et al. 2023, arXiv 2302.03169).
Knows nothing of models, files or services.

The hash, exactly, for other languages: with token ids a and b and all arithmetic modulo 2**32,

    unigram a            h = a * 0x9E3779B1                                   + 0xC2B2AE3D
    bigram (a, b)        h = a * 0x9E3779B1 + b * 0x85EBCA77                  + 0x27D4EB2F
    trigram (a, b, c)    h = a * 0x9E3779B1 + b * 0x85EBCA77 + c * 0xC2B2AE3D + 0x165667B1
    all                  h = h ^ (h >> 15);  h = h * 0x2C1B3C6D;  h = h ^ (h >> 12)
    bucket               the top log2(buckets) bits of h

so uni- and bigrams share one table. Bigram (a, b) stands for a followed by b in one sample. Trigrams are no part of a
profile, but of counted references (`weighting_contract.counted`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_contract.statistics import BOUND, z_scores

NGRAM_NAMES: tuple[str, ...] = ("ngram_log_ratio", "ngram_log_ratio_z")
BUCKETS = 1 << 16
MIN_BUCKETS, MAX_BUCKETS = 1 << 10, 1 << 20
SMOOTHING = 1.0  # occurrences added to every bucket

Row = Sequence[int] | np.ndarray  # token ids of one sample or document
_Ids = TypeVar("_Ids", np.ndarray, Tensor)  # int64

_EXPECTED_BUCKETS = f"a power of two from {MIN_BUCKETS} to {MAX_BUCKETS}"
_WORD = 0xFFFF_FFFF
_TOKENS_PER_CHUNK = 1 << 20  # bounds the memory that counting takes


def ngram_statistics(tokens: Tensor, mask: Tensor, table: Tensor) -> Tensor:
    """The statistics of one whole batch against a target profile, [B, 2] float32, columns as NGRAM_NAMES.

    | name                | formula                                                    | unit             |
    |---------------------|------------------------------------------------------------|------------------|
    | `ngram_log_ratio`   | mean of the table at the sample's uni- and bigrams         | nats             |
    | `ngram_log_ratio_z` | z of it over the batch, as in the portable statistics      | batch deviations |

    Every value is clamped to [-10, 10]; samples without real tokens get zeros and do not count in the batch.

    Args and Raises: as of `ngram_log_ratio`.
    """
    raw = ngram_log_ratio(tokens, mask, table)
    return torch.stack([raw, z_scores(raw, mask.any(1))], 1).clamp(-BOUND, BOUND)


def ngram_log_ratio(tokens: Tensor, mask: Tensor, table: Tensor) -> Tensor:
    """Mean over a sample's n uni- and n - 1 bigrams, all together, of the table's entries, [B] float32, nats.

    Args:
        tokens: [B, T] integer token ids; what stands where the mask is False does not matter.
        mask: [B, T] bool, True where a token is real. A bigram counts where both of its tokens are real.
        table: [buckets] floating, from `profile_table`, on the device of the tokens.

    Returns:
        0 for a sample without real tokens.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit together, or an empty batch.
    """
    _check_shape(table.shape, "table")
    if not table.is_floating_point():
        raise InvalidArgument(f"table is {_name(table.dtype)}, expected floating log ratios")
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InvalidArgument(
            f"tokens is {_name(tokens.dtype)} of shape {list(tokens.shape)}, "
            "expected integer token ids of [B, T] with B and T of 1 or more"
        )
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise InvalidArgument(
            f"mask is {_name(mask.dtype)} of shape {list(mask.shape)}, "
            f"expected bool of the shape of tokens, {list(tokens.shape)}"
        )
    ids, both = tokens.long(), mask[:, :-1] & mask[:, 1:]
    unigrams = torch.where(mask, table[unigram_buckets(ids, len(table))].float(), 0.0)
    bigrams = torch.where(both, table[bigram_buckets(ids[:, :-1], ids[:, 1:], len(table))].float(), 0.0)
    count = mask.sum(1) + both.sum(1)
    return (unigrams.sum(1) + bigrams.sum(1)) / count.clamp(min=1)


def count_ngrams(rows: Iterable[Row], buckets: int = BUCKETS) -> np.ndarray:
    """How often the uni- and bigrams of the rows fall into each bucket, [buckets] int64.

    Args:
        rows: token ids of samples or documents; a bigram never spans two rows. A matrix [N, T] is N rows.
        buckets: a power of two from 2**10 to 2**20.

    Raises:
        InvalidArgument: another number of buckets; a row that is not one dimension of integers of 0 or more.
    """
    check_buckets(buckets)
    counts = np.zeros(buckets, np.int64)
    for ids, inside in rows_joined(rows):
        counts += np.bincount(unigram_buckets(ids, buckets), minlength=buckets)
        first, second = ids[:-1][inside], ids[1:][inside]
        counts += np.bincount(bigram_buckets(first, second, buckets), minlength=buckets)
    return counts


def log_ratios(target_counts: np.ndarray, pool_counts: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """The target profile: logs of relative frequencies, smoothed, in the target over those in the pool.

        r_k = log (s_t t_k + a) / (s_p p_k + a)    with s_x = min(sum t, sum p) / sum x and a the smoothing

    Both tables are first scaled to the total of the smaller one: otherwise the smoothing would weigh more in the
    smaller table, and whatever neither has seen would look like the target.

    Args:
        target_counts, pool_counts: [buckets] from `count_ngrams`, with the same number of buckets.
        smoothing: more than 0.

    Returns:
        [buckets] float16, nats.

    Raises:
        InvalidArgument: sizes that are wrong or differ; counts that are empty, negative or not finite.
    """
    if not (np.isfinite(smoothing) and smoothing > 0):
        raise InvalidArgument(f"smoothing is {smoothing}, expected a finite number above 0")
    target, pool = _counts(target_counts, "target_counts"), _counts(pool_counts, "pool_counts")
    if len(target) != len(pool):
        raise InvalidArgument(
            f"target_counts has {len(target)} buckets and pool_counts {len(pool)}: count both with the same number"
        )
    total = min(target.sum(), pool.sum())
    target, pool = target * (total / target.sum()), pool * (total / pool.sum())
    ratios: np.ndarray = np.log(target + smoothing) - np.log(pool + smoothing)
    return ratios.astype(np.float16)


def profile_table(values: np.ndarray, field: str = "profile", device: torch.device | str = "cpu") -> Tensor:
    """A target profile that came from outside, checked, as [buckets] float32 on a device for `ngram_log_ratio`.

    Raises:
        InvalidArgument: naming `field`: not one dimension of a power of two from 2**10 to 2**20, no floating numbers,
            or numbers that are not finite.
    """
    values = np.asarray(values)
    _check_shape(values.shape, field)
    if values.dtype.kind != "f":
        raise InvalidArgument(f"{field} is {values.dtype.name}, expected floating log ratios, float16 on the wire")
    wrong = ~np.isfinite(values)
    if wrong.any():
        bucket = int(np.argmax(wrong))
        raise InvalidArgument(f"{field}[{bucket}] is {values[bucket]}, expected finite log ratios")
    return torch.from_numpy(values.astype(np.float32)).to(device)


def check_buckets(buckets: int) -> None:
    """Raises InvalidArgument where a table of n-grams can't have so many buckets."""
    if not _possible(buckets):
        raise InvalidArgument(f"buckets is {buckets}, expected {_EXPECTED_BUCKETS}")


def unigram_buckets(ids: _Ids, buckets: int) -> _Ids:
    """The bucket of each token of ids, int64 of any shape."""
    return _mixed(ids * 0x9E37_79B1 + 0xC2B2_AE3D, buckets)


def bigram_buckets(first: _Ids, second: _Ids, buckets: int) -> _Ids:
    """The bucket of each pair; arguments and result int64 of one shape."""
    return _mixed(first * 0x9E37_79B1 + second * 0x85EB_CA77 + 0x27D4_EB2F, buckets)


def trigram_buckets(first: _Ids, second: _Ids, third: _Ids, buckets: int) -> _Ids:
    """The bucket of each triple, likewise."""
    return _mixed(first * 0x9E37_79B1 + second * 0x85EB_CA77 + third * 0xC2B2_AE3D + 0x1656_67B1, buckets)


def _mixed(h: _Ids, buckets: int) -> _Ids:
    """The end of the hash in int64, which may wrap: the low 32 bits are right all the same."""
    h = h & _WORD
    h = h ^ (h >> 15)
    h = (h * 0x2C1B_3C6D) & _WORD
    h = h ^ (h >> 12)
    return h >> (32 - (buckets.bit_length() - 1))


def rows_joined(rows: Iterable[Row]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows at a time: (ids [n] int64, end to end, [n-1] bool: the two neighbours are of the same row).

    Raises:
        InvalidArgument: a row that is not one dimension of integers of 0 or more.
    """
    held: list[np.ndarray] = []
    size = 0
    for index, row in enumerate(rows):
        ids = np.asarray(row)
        if not ids.size:
            continue
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.dtype.kind == "i" and ids.min() < 0):
            raise InvalidArgument(f"rows[{index}] is no row of token ids: expected one dimension of integers from 0 up")
        held.append(ids.astype(np.int64))
        size += ids.size
        if size >= _TOKENS_PER_CHUNK:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate(rows)
    inside = np.ones(len(ids) - 1, np.bool_)
    inside[np.cumsum([len(row) for row in rows[:-1]], dtype=np.int64) - 1] = False
    return ids, inside


def _check_shape(shape: Sequence[int], field: str) -> None:
    if len(shape) != 1 or not _possible(shape[0]):
        raise InvalidArgument(f"{field} has shape {list(shape)}, expected [buckets], {_EXPECTED_BUCKETS}")


def _possible(buckets: int) -> bool:
    return MIN_BUCKETS <= buckets <= MAX_BUCKETS and buckets & (buckets - 1) == 0


def _counts(values: np.ndarray, field: str) -> np.ndarray:
    values = np.asarray(values)
    _check_shape(values.shape, field)
    counts = values.astype(np.float64)
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise InvalidArgument(f"{field} holds values that are negative or not finite, expected occurrences")
    if not counts.any():
        raise InvalidArgument(f"{field} is all zeros: it was counted on no tokens")
    return counts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
