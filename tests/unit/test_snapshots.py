"""Snapshots come back bit for bit or not at all, and the newest that verifies is never given up."""

from __future__ import annotations

import logging
import random
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_service.snapshots import SnapshotStore

UID = "0123abcd"
METADATA = {"position": 7, "jobs": {"jöb-七": {"rms": 0.1 + 0.2, "updates": 3}}, "none": None, "list": [1, "zwei"]}


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", keep=3)


def tensors_of(position: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(position)
    return {
        "head.weight": torch.randn(5, 3, generator=generator),
        "optimiser/exp_avg": torch.randn(5, 3, generator=generator, dtype=torch.float64),
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(*flat)


def test_round_trip_is_bit_exact(store: SnapshotStore, tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    tensors = {
        "float32": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45]),
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "float16": torch.randn(3).half(),
        "steps": torch.tensor(12, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "tied.a": shared,
        "tied.b": shared,
        "part": shared[1:3],
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    path = store.save(UID, 12, tensors, METADATA)
    assert path == tmp_path / "snapshots" / UID / "000000000012.safetensors"
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert_same(snapshot.tensors, tensors)
    assert (snapshot.position, snapshot.metadata, snapshot.damaged) == (12, METADATA, ())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_loaded_tensors_are_the_callers_own(store: SnapshotStore) -> None:
    path = store.save(UID, 1, tensors_of(1), {})
    content = path.read_bytes()
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    path.unlink()
    for tensor in snapshot.tensors.values():
        tensor.zero_()
    path.write_bytes(content)
    again = store.load_latest(UID)
    assert again is not None
    assert_same(again.tensors, tensors_of(1))


def test_no_snapshot_is_none(store: SnapshotStore) -> None:
    assert store.load_latest(UID) is None
    assert store.positions(UID) == []
    store.delete(UID)


def test_newest_is_loaded_and_older_ones_beyond_keep_are_removed(store: SnapshotStore) -> None:
    for position in (0, 9, 10, 100, 1_000_000_000_000):
        store.save(UID, position, tensors_of(position), {"at": position})
    assert store.positions(UID) == [10, 100, 1_000_000_000_000]
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.metadata) == (1_000_000_000_000, {"at": 1_000_000_000_000})


def test_weighters_do_not_meet(store: SnapshotStore) -> None:
    store.save(UID, 1, tensors_of(1), {})
    store.save("other", 2, tensors_of(2), {})
    store.delete(UID)
    assert (store.positions(UID), store.positions("other")) == ([], [2])


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage", "renamed"])
def test_damaged_newest_gives_way_to_the_older_one(
    damage: str, store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(UID, 1, tensors_of(1), METADATA)
    path = store.save(UID, 2, tensors_of(2), METADATA)
    content = path.read_bytes()
    if damage == "renamed":
        older = path.with_name("000000000001.safetensors")
        path.write_bytes(older.read_bytes())
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 16]) + content[-8:]
        damaged = {"truncated": content[:-7], "empty": b"", "flipped": flipped, "garbage": b"\xff" * 500}
        path.write_bytes(damaged[damage])
    left = path.read_bytes()

    with caplog.at_level(logging.WARNING):
        snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.metadata, snapshot.damaged) == (1, METADATA, (path,))
    assert_same(snapshot.tensors, tensors_of(1))
    assert f"snapshot {path} is damaged" in caplog.text
    assert path.read_bytes() == left


def test_no_flipped_bit_anywhere_goes_unnoticed(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    path = store.save(UID, 3, tensors_of(3), METADATA)
    content = path.read_bytes()
    rng = random.Random(0)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert store.load_latest(UID) is None, f"byte {at}"


def test_all_damaged_is_none_and_said(store: SnapshotStore, caplog: pytest.LogCaptureFixture) -> None:
    for position in (1, 2):
        store.save(UID, position, tensors_of(position), {}).write_bytes(b"short")
    assert store.load_latest(UID) is None
    assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 2


def test_unfinished_file_is_passed_over_and_cleared_by_the_next_save(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.save(UID, 1, tensors_of(1), {})
    leftover = path.with_name("000000000002.safetensors.tmp")
    leftover.write_bytes(path.read_bytes()[:100])
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.damaged) == (1, ())
    assert f"{leftover} is a snapshot that was not finished" in caplog.text
    store.save(UID, 2, tensors_of(2), {})
    assert not leftover.exists()


def test_damaged_later_ones_never_push_out_what_verifies(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, keep=2)
    for position in (10, 20):
        store.save(UID, position, tensors_of(position), {}).write_bytes(b"damaged")
    store.save(UID, 5, tensors_of(5), {})  # recovered from the log, learning again
    store.save(UID, 6, tensors_of(6), {})
    store.save(UID, 7, tensors_of(7), {})
    assert store.positions(UID) == [6, 7, 10, 20]
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert snapshot.position == 7
    assert len(snapshot.damaged) == 2


def test_damaged_snapshot_is_replaced_by_a_save_at_its_position(store: SnapshotStore) -> None:
    store.save(UID, 4, tensors_of(4), {}).write_bytes(b"damaged")
    store.save(UID, 4, tensors_of(4), {})
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert_same(snapshot.tensors, tensors_of(4))


def test_failed_save_leaves_what_was_there(store: SnapshotStore) -> None:
    path = store.save(UID, 1, tensors_of(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, limits[1]))  # of any file that this process writes
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(UID, 2, {"large": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(path.parent.iterdir()) == [path]
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert snapshot.position == 1


def test_bad_arguments_are_refused_by_name(store: SnapshotStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="keep is 0"):
        SnapshotStore(tmp_path, keep=0)
    with pytest.raises(InvalidArgument, match="position is -1"):
        store.save(UID, -1, {}, {})
    with pytest.raises(InvalidArgument, match="metadata is not JSON"):
        store.save(UID, 1, {}, {"when": object()})
    for uid in ("", "..", "a/b"):
        with pytest.raises(InvalidArgument, match="can't name a folder"):
            store.save(uid, 1, {}, {})
    assert not (tmp_path / "snapshots").exists()
