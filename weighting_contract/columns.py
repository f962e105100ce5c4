"""The columns that weighters may read of a sample by name, made alike by the service's references and by trainers.

`COLUMNS` are the portable statistics (`weighting_contract.statistics`) and, where there is a target profile, those
against it (`weighting_contract.ngrams`); both modules give each column's formula and unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import NGRAM_NAMES, ngram_statistics
from weighting_contract.statistics import NAMES, standardise

COLUMNS: tuple[str, ...] = (*NAMES, *NGRAM_NAMES)


def needs_profile(names: Sequence[str]) -> bool:
    """Whether one of the columns is against a target profile."""
    return any(name in NGRAM_NAMES for name in names)


def unknown_columns(names: Sequence[str]) -> list[str]:
    """The names that are no column made here."""
    return [name for name in names if name not in COLUMNS]


def batch_columns(
    raw: Tensor,
    names: Sequence[str],
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """The named columns of one whole batch, [B, len(names)] float32.

    Args:
        raw: [B, len(RAW_NAMES)] from `raw_statistics`.
        names: of COLUMNS, in the order wanted.
        tokens, mask: [B, T] token ids of the samples and which of them are real (None: all); needed with a table.
        table: [buckets] floating, the target profile; needed where one of the names is against it.

    Raises:
        InvalidArgument: a name that is no column, a profile that is missing, shapes that don't fit together.
    """
    if unknown := unknown_columns(names):
        raise InvalidArgument(f"{unknown[0]!r} is no statistic; known ones: {', '.join(COLUMNS)}")
    columns = dict(zip(NAMES, standardise(raw).unbind(1), strict=True))
    if needs_profile(names):
        if table is None or tokens is None:
            raise InvalidArgument(
                f"{', '.join(n for n in names if n in NGRAM_NAMES)} need a target profile and the samples' tokens"
            )
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        columns.update(zip(NGRAM_NAMES, ngram_statistics(tokens, mask, table).to(raw.device).unbind(1), strict=True))
    return torch.stack([columns[name] for name in names], 1)
