"""Checks the target profile that a job hands over, or makes it of the documents that the job hands over instead."""

from __future__ import annotations

import hashlib

import numpy as np

from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import profile_table
from weighting_contract.profile import Profile, make_profile, split
from weighting_contract.spec import check_checksum
from weighting_service.reference import Reference
from weighting_service.views import TargetProfile


def read_profile(given: TargetProfile, reference: Reference) -> Profile:
    """The profile against a reference's pool.

    Raises:
        InvalidArgument: neither or both forms, another size than the reference's, numbers that are not finite,
            documents that are none or not of the reference's vocabulary.
    """
    check_checksum(given.documents_checksum, "profile.documents_checksum")
    if (given.log_ratios is None) == (given.documents is None):
        raise InvalidArgument("profile needs either log_ratios or documents")
    if given.log_ratios is not None:
        return _finished(given.log_ratios, given.documents_checksum, reference)
    assert given.documents is not None
    if given.lengths is None:
        raise InvalidArgument("profile.lengths is missing; documents come end to end, with the length of each")
    return _made(given.documents, given.lengths, given.documents_checksum, reference)


def _finished(log_ratios: np.ndarray, checksum: str, reference: Reference) -> Profile:
    buckets = len(reference.ngram_counts)
    if log_ratios.shape != (buckets,):
        raise InvalidArgument(
            f"profile.log_ratios has shape {list(log_ratios.shape)}, but the reference {reference.name!r} counts "
            f"n-grams in {buckets} buckets, expected [{buckets}]; make the profile against this reference"
        )
    with np.errstate(over="ignore"):
        table = log_ratios.astype(np.float16) if log_ratios.dtype.kind == "f" else log_ratios
    profile_table(table, "profile.log_ratios")
    return Profile(table, checksum or hashlib.sha256(table.tobytes()).hexdigest())


def _made(documents: np.ndarray, lengths: np.ndarray, checksum: str, reference: Reference) -> Profile:
    rows = split(documents, lengths)
    if not rows:
        raise InvalidArgument("profile.documents has no documents; give the job's validation documents")
    outside = (documents < 0) | (documents >= reference.vocab_size)
    if outside.any():
        place = int(np.argmax(outside))
        row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        raise InvalidArgument(
            f"profile.documents[{row}] has the token id {documents[place]}, but the reference {reference.name!r} knows "
            f"ids from 0 to {reference.vocab_size - 1}: were the documents made with another tokenizer?"
        )
    profile = make_profile(rows, reference.ngram_counts)
    if checksum not in ("", profile.documents_checksum):
        raise InvalidArgument(
            f"profile.documents_checksum is {checksum[:12]}..., but the documents given have "
            f"{profile.documents_checksum[:12]}..."
        )
    return profile
