"""Entries as bytes: what is read back is what was written, and what is no entry is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from log_samples import assert_same, update_of

from weighting_contract.errors import InvalidArgument
from weighting_service.domain import Estimator, Inputs, MetaUpdate, Rollback
from weighting_service.update_log.encoding import decode, decode_entry, digest_of, encode, encode_entry, kind_of


@pytest.mark.parametrize("probes", [[True] * 4, [False] * 4, [True, False, False, True]])
def test_probes_round_trip_as_they_are(probes: list[bool]) -> None:
    update = dataclasses.replace(update_of(1), probes=np.array(probes), trust_only=True)
    got = decode(encode(update))
    assert_same(got, update)
    assert got.drawn_evenly.tolist() == probes


@pytest.mark.parametrize("estimator", list(Estimator))
def test_all_inputs_round_trip_bit_for_bit(estimator: Estimator) -> None:
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, 1 / 3], np.float32)
    update = MetaUpdate(
        job_id="jöb/1",
        update_id="schritt-七",
        step=2**62,
        inputs=Inputs(
            features=np.stack([special, special[::-1]], axis=1),
            hidden=np.arange(48, dtype=np.float32).reshape(6, 8).T,  # not in C order
            tokens=np.arange(24, dtype=np.int64).reshape(8, 3) - 2**40,
            lengths=np.array([3, 1, 2, 3, 3, 3, 1, 0], np.int64),
        ),
        cotangent=special[::-1],  # negative stride
        scored_position=2**40,
        estimator=estimator,
    )
    assert_same(decode(encode(update)), update)


def test_absent_inputs_stay_absent_and_empty_ones_empty() -> None:
    update = dataclasses.replace(
        update_of(1), inputs=Inputs(hidden=np.zeros((0, 3), np.float32)), cotangent=np.zeros(0, np.float32)
    )
    assert_same(decode(encode(update)), update)


def test_bytes_that_are_no_update_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="not a meta-update"):
        decode(b"\xff" * 20)
    with pytest.raises(InvalidArgument, match="estimator is 0"):
        decode(b"")


def test_entries_of_both_kinds_round_trip() -> None:
    rollback = Rollback(2**62, bytes(range(256)))
    assert decode_entry(kind_of(rollback), encode_entry(rollback)) == rollback
    update = update_of(3)
    got = decode_entry(kind_of(update), encode_entry(update))
    assert isinstance(got, MetaUpdate)
    assert_same(got, update)


def test_entries_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="kind is 'cake', expected one of"):
        decode_entry("cake", b"")
    with pytest.raises(InvalidArgument, match="rollback's payload has 3 bytes"):
        decode_entry("rollback", b"abc")


def test_digests_tell_rollbacks_apart() -> None:
    entries = [Rollback(1, b"state"), Rollback(2, b"state"), Rollback(1, b"other"), update_of(1)]
    assert len({digest_of(entry) for entry in entries}) == 4
    assert digest_of(update_of(1)) == update_of(1).digest()
