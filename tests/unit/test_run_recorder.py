"""The record of samples and weights: complete after a kill, whole records only, refused for other sizes."""

from __future__ import annotations

import numpy as np
import pytest

from trainer_client.run.recorder import Record, Recorder, read_records
from weighting_contract.errors import InvalidArgument

B, CANDIDATES = 5, 20


def _record(step: int, candidates: int = CANDIDATES) -> Record:
    rng = np.random.default_rng(step)
    return Record(
        step,
        weights=rng.random(B).astype(np.float32),
        kept=rng.permutation(candidates)[:B],
        probes=step % B,
        position=step // 4,
        fallback=step == 2,
        trust=rng.random(),
        taught=step // 2,
        quarters=rng.integers(0, 4, B).astype(np.int8) if step % 2 else None,
        computed=3 * step,
    )


def _assert_same(a: Record, b: Record) -> None:
    for name in ("step", "probes", "position", "fallback", "trust", "taught", "computed"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.weights.tobytes() == b.weights.tobytes()
    assert a.kept.dtype == np.int64
    assert a.kept.tolist() == b.kept.tolist()
    assert a.quarters.tolist() == ([-1] * B if b.quarters is None else b.quarters.tolist())


def test_records_come_back_bit_by_bit(tmp_path):
    with Recorder(tmp_path / "r", B, CANDIDATES) as recorder:
        for step in range(6):
            recorder.append(_record(step))
    with Recorder(tmp_path / "r", B, CANDIDATES) as again:
        for step in range(6):
            _assert_same(again.get(step), _record(step))
        assert again.get(6) is None


def test_a_record_is_in_the_file_before_append_returns(tmp_path):
    recorder = Recorder(tmp_path / "r", B, CANDIDATES)
    recorder.append(_record(0))
    (seen,) = read_records(tmp_path / "r", B, CANDIDATES)  # while the writer is still open
    _assert_same(seen, _record(0))
    recorder.close()


@pytest.mark.parametrize("lost_bytes", [1, 8, 30])
def test_a_half_written_record_is_cut_off_and_written_again(tmp_path, lost_bytes):
    path = tmp_path / "r"
    with Recorder(path, B, CANDIDATES) as recorder:
        for step in range(3):
            recorder.append(_record(step))
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with Recorder(path, B, CANDIDATES) as recorder:
        assert recorder.get(2) is None
        recorder.append(_record(2))
    assert [r.step for r in read_records(path, B, CANDIDATES)] == [0, 1, 2]


def test_a_damaged_record_ends_the_record(tmp_path):
    path = tmp_path / "r"
    with Recorder(path, B, CANDIDATES) as recorder:
        for step in range(3):
            recorder.append(_record(step))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # in the middle record
    path.write_bytes(content)
    assert [r.step for r in read_records(path, B, CANDIDATES)] == [0]


def test_a_file_that_broke_off_in_its_header_is_begun_again(tmp_path):
    (tmp_path / "r").write_bytes(b"WBREC")
    with Recorder(tmp_path / "r", B, CANDIDATES) as recorder:
        recorder.append(_record(0))
    assert len(read_records(tmp_path / "r", B, CANDIDATES)) == 1


def test_other_sizes_are_refused(tmp_path):
    Recorder(tmp_path / "r", B, CANDIDATES).close()
    with pytest.raises(InvalidArgument, match="batches of 6 samples out of 20"):
        Recorder(tmp_path / "r", B + 1, CANDIDATES)
    with pytest.raises(InvalidArgument, match="batches of 5 samples out of 25"):
        Recorder(tmp_path / "r", B, CANDIDATES + B)


def test_an_earlier_version_s_record_is_refused(tmp_path):
    (tmp_path / "r").write_bytes(b"WBRECORD1\0\0\0" + bytes(60))
    with pytest.raises(InvalidArgument, match="the record of an earlier version, whose runs can't be continued"):
        Recorder(tmp_path / "r", B, CANDIDATES)


def test_candidates_beyond_16_bits_fit(tmp_path):
    with Recorder(tmp_path / "r", B, 100_000) as recorder:
        recorder.append(_record(0, candidates=100_000))
    (seen,) = read_records(tmp_path / "r", B, 100_000)
    _assert_same(seen, _record(0, candidates=100_000))
    assert seen.kept.max() > 1 << 16
