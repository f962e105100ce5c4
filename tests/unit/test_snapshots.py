"""Snapshots come back bit for bit or not at all, and the newest that verifies is never given up."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument, NotFound
from weighting_service import failpoints
from weighting_service.snapshots import DamagedSnapshot, SnapshotStore, parse, state_digest

UID = "0123abcd"
METADATA = {"position": 7, "jobs": {"jöb-七": {"rms": 0.1 + 0.2, "updates": 3}}, "none": None, "list": [1, "zwei"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots" / UID


@pytest.fixture
def store(folder: Path) -> SnapshotStore:
    return SnapshotStore(folder.parent, keep=3)


def file_of(folder: Path, position: int) -> Path:
    return folder / f"{position:012d}.safetensors"


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


def test_round_trip_is_bit_exact(store: SnapshotStore, folder: Path) -> None:
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
    digest = store.save(UID, 12, tensors, METADATA)
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert_same(snapshot.tensors, tensors)
    assert (snapshot.position, snapshot.metadata, snapshot.damaged) == (12, METADATA, ())
    assert digest == snapshot.digest == state_digest(12, tensors, METADATA)
    assert digest not in (state_digest(13, tensors, METADATA), state_digest(12, tensors, {}))
    assert list(folder.iterdir()) == [file_of(folder, 12)]
    content = store.read_bytes(UID, 12)
    assert content == file_of(folder, 12).read_bytes()
    for again in (store.load(UID, 12), parse(content, 12)):
        assert_same(again.tensors, tensors)
        assert (again.metadata, again.digest) == (METADATA, digest)


def test_loaded_tensors_are_the_callers_own(store: SnapshotStore, folder: Path) -> None:
    path = file_of(folder, 1)
    store.save(UID, 1, tensors_of(1), {})
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
    assert store.oldest_verified(UID) is None
    store.delete(UID)
    with pytest.raises(NotFound, match=r"no snapshot of position 4; there are \[\]"):
        store.load(UID, 4)


def test_newest_is_loaded_and_older_ones_beyond_keep_are_removed(store: SnapshotStore) -> None:
    for position in (0, 9, 10, 100, 1_000_000_000_000):
        store.save(UID, position, tensors_of(position), {"at": position})
    assert store.positions(UID) == [10, 100, 1_000_000_000_000]
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.metadata) == (1_000_000_000_000, {"at": 1_000_000_000_000})
    earlier = store.load_latest(UID, before=100)
    assert earlier is not None
    assert earlier.position == 10
    assert store.load_latest(UID, before=10) is None
    assert store.oldest_verified(UID) == 10
    assert store.size_bytes() == sum(len(store.read_bytes(UID, position)) for position in store.positions(UID))


def test_weighters_do_not_meet(store: SnapshotStore) -> None:
    store.save(UID, 1, tensors_of(1), {})
    store.save("other", 2, tensors_of(2), {})
    store.delete(UID)
    assert (store.positions(UID), store.positions("other")) == ([], [2])


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage", "renamed"])
def test_damaged_newest_gives_way_to_the_older_one(
    damage: str, store: SnapshotStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(UID, 1, tensors_of(1), METADATA)
    store.save(UID, 2, tensors_of(2), METADATA)
    path = file_of(folder, 2)
    content = path.read_bytes()
    if damage == "renamed":
        path.write_bytes(file_of(folder, 1).read_bytes())
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 16]) + content[-8:]
        damaged = {"truncated": content[:-7], "empty": b"", "flipped": flipped, "garbage": b"\xff" * 500}
        path.write_bytes(damaged[damage])
    left = path.read_bytes()

    with caplog.at_level(logging.WARNING):
        snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.metadata, snapshot.damaged) == (1, METADATA, (str(path),))
    assert_same(snapshot.tensors, tensors_of(1))
    assert f"snapshot {path} is damaged" in caplog.text
    assert path.read_bytes() == left
    for read in (store.load, store.read_bytes):
        with pytest.raises(DamagedSnapshot, match=f"{path} is damaged"):
            read(UID, 2)
    with pytest.raises(DamagedSnapshot):
        parse(left, 2)


def test_no_flipped_bit_anywhere_goes_unnoticed(store: SnapshotStore, folder: Path) -> None:
    store.save(UID, 3, tensors_of(3), METADATA)
    content = store.read_bytes(UID, 3)
    rng = random.Random(0)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        file_of(folder, 3).write_bytes(flipped)
        assert store.load_latest(UID) is None, f"byte {at}"


def test_all_damaged_is_none_and_said(store: SnapshotStore, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for position in (1, 2):
        store.save(UID, position, tensors_of(position), {})
        file_of(folder, position).write_bytes(b"short")
    assert store.load_latest(UID) is None
    assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 2


def test_an_unfinished_write_is_passed_over_and_goes_once_it_is_old(
    store: SnapshotStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(UID, 1, tensors_of(1), {})
    content = file_of(folder, 1).read_bytes()
    young, old = folder / ".000000000002.safetensors.ab.tmp", folder / "000000000002.safetensors.tmp"
    for leftover in (young, old):
        leftover.write_bytes(content[:100])
    os.utime(old, (0, 0))
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert (snapshot.position, snapshot.damaged) == (1, ())
    assert f"{old} is a snapshot that was not finished" in caplog.text
    store.save(UID, 2, tensors_of(2), {})
    assert (young.exists(), old.exists()) == (True, False)  # the young one may be another replica's


def test_damaged_ones_are_kept_and_never_push_out_what_verifies(tmp_path: Path) -> None:
    store, folder = SnapshotStore(tmp_path, keep=2), tmp_path / UID
    for position in (3, 10, 20):
        store.save(UID, position, tensors_of(position), {})
        file_of(folder, position).write_bytes(b"damaged")
    for position in (5, 6, 7):  # recovered from the log, learning again
        store.save(UID, position, tensors_of(position), {})
    assert store.positions(UID) == [3, 6, 7, 10, 20]
    assert (store.oldest_verified(UID), SnapshotStore(tmp_path).oldest_verified(UID)) == (6, 6)
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert snapshot.position == 7
    assert len(snapshot.damaged) == 2


def test_a_damaged_snapshot_is_moved_aside_by_a_save_at_its_position(store: SnapshotStore, folder: Path) -> None:
    for damage in (b"one", b"two"):
        store.save(UID, 4, tensors_of(4), {})
        file_of(folder, 4).write_bytes(damage)
    store.save(UID, 4, tensors_of(4), {})
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert_same(snapshot.tensors, tensors_of(4))
    aside = [folder / "000000000004.safetensors.damaged", folder / "000000000004.safetensors.damaged-2"]
    assert [file.read_bytes() for file in aside] == [b"one", b"two"]
    assert store.positions(UID) == [4]


def test_the_same_position_again_changes_nothing(store: SnapshotStore, folder: Path) -> None:
    digest = store.save(UID, 4, tensors_of(4), {"chain": "c"})
    before = file_of(folder, 4).stat()
    other = SnapshotStore(folder.parent)
    assert other.save(UID, 4, tensors_of(4), {"chain": "c"}) == digest
    elsewhere = other.save(UID, 4, tensors_of(5), {"chain": "c"})  # by other hardware: its own digest, for comparing
    assert elsewhere == state_digest(4, tensors_of(5), {"chain": "c"}) != digest
    after = file_of(folder, 4).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_snapshot_of_another_history_is_moved_aside(store: SnapshotStore, folder: Path) -> None:
    store.save(UID, 4, tensors_of(4), {"chain": "lost"})
    lost = file_of(folder, 4).read_bytes()
    store.save(UID, 4, tensors_of(5), {"chain": "new"})
    assert_same(store.load(UID, 4).tensors, tensors_of(5))
    assert (folder / "000000000004.safetensors.superseded").read_bytes() == lost


def test_replicas_that_save_at_the_same_time(folder: Path) -> None:
    stores, start = [SnapshotStore(folder.parent, keep=2) for _ in range(4)], threading.Barrier(4)

    def save(store: SnapshotStore) -> list[str]:
        start.wait()
        return [store.save(UID, position, tensors_of(position), METADATA) for position in range(1, 9)]

    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(save, stores))
    assert digests == [[state_digest(p, tensors_of(p), METADATA) for p in range(1, 9)]] * 4
    stores[0].save(UID, 9, tensors_of(9), {})
    assert sorted(file.name for file in folder.iterdir()) == [file_of(folder, p).name for p in (8, 9)]
    assert_same(stores[1].load(UID, 8).tensors, tensors_of(8))


def test_failed_save_leaves_what_was_there(store: SnapshotStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(UID, 1, tensors_of(1), {})
    path = file_of(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, limits[1]))  # of any file that this process writes
    try:
        with pytest.raises(OSError, match=f"File too large: '{file_of(folder, 2)}'"):
            store.save(UID, 2, {"large": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(failpoints, "_SET", failpoints._parsed("during_snapshot_write=full"))
    with pytest.raises(OSError, match=f"No space left on device: '{file_of(folder, 2)}'"):
        store.save(UID, 2, tensors_of(2), {})
    assert list(folder.iterdir()) == [path]
    snapshot = store.load_latest(UID)
    assert snapshot is not None
    assert snapshot.position == 1
    store.save(UID, 2, tensors_of(2), {})  # once there is room again
    assert store.positions(UID) == [1, 2]


SAVE = """
import sys, torch
from weighting_service.snapshots import SnapshotStore
SnapshotStore(sys.argv[1]).save(sys.argv[2], 2, {"a": torch.arange(100_000)}, {})
"""


def test_killed_while_half_of_a_snapshot_was_written(store: SnapshotStore, folder: Path) -> None:
    store.save(UID, 1, tensors_of(1), {})
    killed = subprocess.run(
        [sys.executable, "-c", SAVE, folder.parent, UID],
        env={**os.environ, failpoints.VARIABLE: "during_snapshot_write=kill"},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    half = next(file for file in folder.iterdir() if file != file_of(folder, 1))
    assert 400_000 <= half.stat().st_size < 800_000
    assert store.positions(UID) == [1]
    store.save(UID, 2, tensors_of(2), {})
    assert_same(store.load(UID, 2).tensors, tensors_of(2))


def test_a_storage_that_fails_is_not_one_that_has_nothing(store: SnapshotStore, folder: Path) -> None:
    store.save(UID, 1, tensors_of(1), {})
    file_of(folder, 1).unlink()
    file_of(folder, 1).mkdir()  # reading it is refused: as good as a disk that fails
    (folder.parent / "other").symlink_to(folder / "loop")
    (folder / "loop").symlink_to(folder.parent / "other")
    for read in (store.load_latest, store.positions):
        with pytest.raises(OSError, match="other"):
            read("other")


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
