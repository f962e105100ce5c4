"""Target documents as token ids: what identifies them, and the profile that they give against a reference's pool.

A profile is a table of hashed n-gram log ratios (`weighting_contract.ngrams`) and the checksum of the documents that it
was made of. Trainers make one and hand it over, or hand over the documents and let the service make it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weighting_contract.errors import InvalidArgument

if TYPE_CHECKING:
    from weighting_contract.ngrams import Row


@dataclass(frozen=True)
class Profile:
    """What a job hands over of its target."""

    log_ratios: np.ndarray  # [buckets] float16, nats
    documents_checksum: str  # of the documents that they were made of


def make_profile(documents: Sequence[Row] | np.ndarray, pool_ngrams: np.ndarray) -> Profile:
    """The profile of documents against a pool.

    Args:
        documents: token ids of each.
        pool_ngrams: [buckets] of `count_ngrams`, such as a reference's; their number decides the profile's size.

    Raises:
        InvalidArgument: no documents, or rows that are no token ids.
    """
    from weighting_contract.ngrams import count_ngrams, log_ratios  # torch, which handing documents over doesn't need

    rows = [np.asarray(row) for row in documents]
    return Profile(log_ratios(count_ngrams(rows, len(pool_ngrams)), pool_ngrams), documents_checksum(rows))


def documents_checksum(documents: Sequence[Row] | np.ndarray) -> str:
    """SHA-256, in hex, of each document's length and its ids, all as little-endian int64; their order counts."""
    digest = hashlib.sha256(b"weighbridge-documents-1;")
    for row in documents:
        ids = np.asarray(row).astype("<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()


def joined(documents: Sequence[Row] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids [tokens], lengths [documents]), int64: the form that documents travel in."""
    rows = [np.asarray(row).astype(np.int64) for row in documents]
    return np.concatenate([np.empty(0, np.int64), *rows]), np.array([len(row) for row in rows], np.int64)


def split(ids: np.ndarray, lengths: np.ndarray, field: str = "profile") -> list[np.ndarray]:
    """The documents of `joined`. Raises InvalidArgument, naming `field`, where the two don't fit together."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidArgument(
            f"{field}.documents is {ids.dtype.name} of shape {list(ids.shape)}, expected ids [tokens]"
        )
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths.size and int(lengths.min()) < 1):
        raise InvalidArgument(f"{field}.lengths must be [documents] integers of 1 or more")
    if int(lengths.sum()) != len(ids):
        raise InvalidArgument(f"{field}.lengths add up to {int(lengths.sum())}, but there are {len(ids)} ids")
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
