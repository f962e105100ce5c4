"""Blobs come back whole or not at all, from a folder and from a real S3 server, and failures name the blob."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from tests.unit import reference_models as models
from weighting_contract.errors import InvalidArgument, NotFound
from weighting_service.metrics import Metrics
from weighting_service.references import ReferenceStore
from weighting_service.snapshots import SnapshotStore
from weighting_service.storage import LocalStorage, Storage, open_storage

MISSING = [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]
needs_s3 = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install weighbridge[dev]")
KINDS = ["folder", pytest.param("s3", marks=needs_s3)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The URL of a new S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, and where tools of AWS look for its server."""
    for variable, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "for-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    httpx.post(f"{s3_server}/moto-api/reset").raise_for_status()
    httpx.put(f"{s3_server}/bucket").raise_for_status()
    return "s3://bucket"


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3')}/some/where" if request.param == "s3" else str(tmp_path / "some" / "where")


@pytest.fixture
def storage(place: str) -> Storage:
    return open_storage(place)


def test_what_was_put_is_there_for_everyone(storage: Storage, place: str) -> None:
    other = open_storage(place)
    assert other.sizes() == {}
    storage.put("a/one", b"first")
    storage.put("a/two", [b"in ", b"", b"parts"])
    storage.put("ab", b"")
    assert (other.get("a/one"), other.get("a/two"), other.get("ab")) == (b"first", b"in parts", b"")
    assert list(other.sizes().items()) == [("a/one", 5), ("a/two", 8), ("ab", 0)]
    assert (list(other.sizes("a/")), list(other.sizes("a/t"))) == (["a/one", "a/two"], ["a/two"])
    assert other.sizes("b/") == {}
    storage.put("a/one", b"again")
    assert other.get("a/one") == b"again"
    assert storage.within("a").get("two") == b"in parts"
    assert storage.within("a").sizes() == {"one": 5, "two": 8}
    assert storage.where("a/one") == storage.within("a").where("one") == f"{place}/a/one"


def test_a_blob_is_created_once(storage: Storage, place: str) -> None:
    others = [open_storage(place) for _ in range(4)]

    def create(content: bytes, storage: Storage) -> bool:
        try:
            storage.create("a/one", content)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        created = list(pool.map(create, (b"0", b"1", b"2", b"3"), others))
    assert sum(created) == 1
    assert storage.sizes() == {"a/one": 1}
    assert storage.get("a/one") == str(created.index(True)).encode()
    assert not storage.unfinished("a")
    with pytest.raises(FileExistsError, match=f"{place}/a/one"):
        storage.create("a/one", b"again")
    storage.delete("a/one")
    storage.create("a/one", b"new")
    assert storage.get("a/one") == b"new"


def test_what_is_moved_or_deleted_is_gone_for_everyone(storage: Storage, place: str) -> None:
    other = open_storage(place)
    for key in ("a/one", "a/two", "a/b/three", "four"):
        storage.put(key, key.encode())
        assert key in other.sizes()
    storage.move("a/one", "c/one")
    assert other.get("c/one") == b"a/one"
    storage.delete("a/two")
    assert list(other.sizes()) == ["a/b/three", "c/one", "four"]
    storage.delete_folder("a")
    assert list(other.sizes()) == ["c/one", "four"]
    storage.delete("a/two")
    storage.delete_folder("a")
    for missing in (lambda: other.get("a/one"), lambda: other.move("a/one", "b")):
        with pytest.raises(FileNotFoundError, match=f"{place}/a/one"):
            missing()


def test_a_storage_is_checked_by_use(storage: Storage) -> None:
    storage.put("one", b"1")
    storage.check()
    assert storage.sizes() == {"one": 1}


def test_a_storage_that_replaces_what_it_should_create_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Replacing(LocalStorage):
        def create(self, key: str, content: bytes) -> None:
            self.put(key, content)

    LocalStorage(tmp_path).check()
    assert not caplog.messages
    Replacing(tmp_path).check()
    assert "replaces what it is asked to create" in caplog.text


def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    storage = open_storage(tmp_path)
    storage.create("a", b"first")
    with pytest.raises(FileExistsError, match=str(tmp_path / "a")):
        storage.create("a", b"again")
    assert storage.get("a") == b"first"
    assert storage.sizes() == {"a": 5}


def test_what_is_no_key(storage: Storage) -> None:
    for key in ("", "a//b", "/etc/passwd", "../x", "a/.hidden", "a b"):
        for use in (storage.get, storage.delete, storage.within, storage.delete_folder):
            with pytest.raises(InvalidArgument, match="no key of a blob"):
                use(key)
    assert storage.sizes() == {}


def test_places(tmp_path: Path) -> None:
    for place in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        storage = open_storage(place)
        assert isinstance(storage, LocalStorage)
        assert storage.url == str(tmp_path / "a b")
        assert open_storage(storage) is storage
    assert not (tmp_path / "a b").exists()
    for place in ("ftp://host/x", "file://folder", "s3://", "s3:///key"):
        with pytest.raises(InvalidArgument, match=f"is '{place}', expected a path, file:///DIR or s3://BUCKET/PREFIX"):
            open_storage(place)


def test_a_folder_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    storage = open_storage(tmp_path / "file")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        storage.check()
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        storage.sizes()


def test_a_failed_put_leaves_what_was_there(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.put("a", b"whole")

    def breaks() -> Iterator[bytes]:
        yield b"half"
        raise OSError("the source broke")

    with pytest.raises(OSError, match=f"the source broke: '{tmp_path / 'a'}'"):
        storage.put("a", breaks())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"whole"]


# ---- S3 -------------------------------------------------------------------------------------------------------------


@needs_s3
def test_a_bucket_that_is_not_there_is_an_error_that_names_it(s3: str) -> None:
    storage = open_storage("s3://no-such-bucket/x")
    for use in (lambda: storage.put("a", b""), storage.sizes, storage.check, lambda: storage.delete_folder("a")):
        with pytest.raises(OSError, match="s3://no-such-bucket/x"):
            use()
    with pytest.raises(OSError, match="s3://no-such-bucket/x/uid"):
        SnapshotStore(storage).load_latest("uid")


@needs_s3
def test_a_server_that_is_not_reached_is_an_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"127.0.0.1:9.*s3://bucket/uid"):
        SnapshotStore(s3).load_latest("uid")


@needs_s3
def test_snapshots_in_s3(s3: str) -> None:
    ours, theirs = SnapshotStore(f"{s3}/snapshots", keep=2), SnapshotStore(f"{s3}/snapshots", keep=2)
    tensors = {"a": torch.arange(5000.0), "b": torch.tensor(3)}
    digests = [ours.save("uid", position, tensors, {"at": position}) for position in (0, 10, 20)]
    assert theirs.save("uid", 20, tensors, {"at": 20}) == digests[-1]
    assert (theirs.positions("uid"), theirs.oldest_verified("uid")) == ([10, 20], 10)
    snapshot = theirs.load_latest("uid")
    assert snapshot is not None
    assert (snapshot.metadata, snapshot.digest) == ({"at": 20}, digests[-1])
    assert torch.equal(snapshot.tensors["a"], tensors["a"])

    storage = open_storage(f"{s3}/snapshots")
    content = storage.get("uid/000000000020.safetensors")
    storage.put("uid/000000000020.safetensors", content[:-1])
    older = theirs.load_latest("uid")
    assert older is not None
    assert (older.position, older.damaged) == (10, (f"{s3}/snapshots/uid/000000000020.safetensors",))
    theirs.save("uid", 20, tensors, {"at": 20})
    assert ours.load("uid", 20).digest == digests[-1]
    assert storage.get("uid/000000000020.safetensors.damaged") == content[:-1]
    assert ours.size_bytes() > 2 * 20_000
    ours.delete("uid")
    assert theirs.load_latest("uid") is None


@needs_s3
@pytest.mark.parametrize("made", [models.reference, models.counted_reference])
def test_references_in_s3(s3: str, tmp_path: Path, made: Callable[..., dict[str, bytes]]) -> None:
    files = made()

    async def main() -> None:
        with pytest.raises(InvalidArgument, match="need a cache folder"):
            ReferenceStore(f"{s3}/references", models_dir=None, device=CPU)
        ours, theirs = (
            ReferenceStore(f"{s3}/references", models_dir=None, device=CPU, cache=tmp_path / name) for name in "ab"
        )
        for store in (ours, theirs):
            await store.start(Metrics())
        stored = await ours.put("tenant/ref", files, exist_ok=False)
        known = await theirs.find("tenant/ref")
        assert (known.info, known.ngram_buckets) == (stored.info, stored.ngram_buckets)
        assert known.folder.parent == tmp_path / "b"
        assert (await theirs.get("tenant/ref", list(files))).files == files
        for file in known.folder.iterdir():  # the cache is lost
            file.unlink()
        known.folder.rmdir()
        assert (await theirs.load(known)).checksum == stored.info.checksum

        await ours.delete("tenant/ref")
        assert open_storage(s3).sizes() == {}
        await ours.put("tenant/ref", made(seed=1), exist_ok=False)
        again = ReferenceStore(f"{s3}/references", models_dir=None, device=CPU, cache=tmp_path / "b")
        await again.start(Metrics())
        changed = again.known("tenant/ref")
        assert changed.info.checksum != known.info.checksum
        assert list((tmp_path / "b").iterdir()) == [changed.folder]
        await ours.delete("tenant/ref")
        with pytest.raises(NotFound):
            await ours.find("tenant/ref")
        for store in (ours, theirs, again):
            await store.stop()

    asyncio.run(main())
