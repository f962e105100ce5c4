"""The record of weights: complete after a kill, whole records only, refused for another batch size."""

from __future__ import annotations

import numpy as np
import pytest

from trainer_client.run.recorder import Record, Recorder, read_records
from weighting_contract.errors import InvalidArgument

B = 5


def _record(step: int) -> Record:
    weights = np.random.default_rng(step).random(B).astype(np.float32)
    return Record(step, weights, position=step // 4, fallback=step == 2)


def _assert_same(a: Record, b: Record) -> None:
    assert (a.step, a.position, a.fallback) == (b.step, b.position, b.fallback)
    assert a.weights.tobytes() == b.weights.tobytes()


def test_records_come_back_bit_by_bit(tmp_path):
    with Recorder(tmp_path / "r", B) as recorder:
        for step in range(6):
            recorder.append(_record(step))
    with Recorder(tmp_path / "r", B) as again:
        for step in range(6):
            _assert_same(again.get(step), _record(step))
        assert again.get(6) is None


def test_a_record_is_in_the_file_before_append_returns(tmp_path):
    recorder = Recorder(tmp_path / "r", B)
    recorder.append(_record(0))
    (seen,) = read_records(tmp_path / "r", B)  # while the writer is still open
    _assert_same(seen, _record(0))
    recorder.close()


@pytest.mark.parametrize("lost_bytes", [1, 8, 30])
def test_a_half_written_record_is_cut_off_and_written_again(tmp_path, lost_bytes):
    path = tmp_path / "r"
    with Recorder(path, B) as recorder:
        for step in range(3):
            recorder.append(_record(step))
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with Recorder(path, B) as recorder:
        assert recorder.get(2) is None
        recorder.append(_record(2))
    assert [r.step for r in read_records(path, B)] == [0, 1, 2]


def test_a_damaged_record_ends_the_record(tmp_path):
    path = tmp_path / "r"
    with Recorder(path, B) as recorder:
        for step in range(3):
            recorder.append(_record(step))
    content = bytearray(path.read_bytes())
    content[-50] ^= 1  # in the middle record
    path.write_bytes(content)
    assert [r.step for r in read_records(path, B)] == [0]


def test_a_file_that_broke_off_in_its_header_is_begun_again(tmp_path):
    (tmp_path / "r").write_bytes(b"WBREC")
    with Recorder(tmp_path / "r", B) as recorder:
        recorder.append(_record(0))
    assert len(read_records(tmp_path / "r", B)) == 1


def test_another_batch_size_is_refused(tmp_path):
    Recorder(tmp_path / "r", B).close()
    with pytest.raises(InvalidArgument, match="batches of 6 samples"):
        Recorder(tmp_path / "r", B + 1)
