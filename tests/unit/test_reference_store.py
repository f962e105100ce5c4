"""Where references come from, how they are loaded, and what becomes of damaged ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from tests.unit import reference_models as models
from weighting_contract.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from weighting_contract.reference import write_reference
from weighting_service.metrics import Metrics
from weighting_service.pretaught import NAME as PRETAUGHT
from weighting_service.references import ReferenceStore

FILES = models.reference()


CPU = torch.device("cpu")


def with_store(tmp_path: Path, use: Callable[[ReferenceStore], Awaitable[object]], **settings: int) -> None:
    async def main() -> None:
        store = ReferenceStore(tmp_path / "uploads", models_dir=tmp_path / "models", device=CPU, **settings)
        await store.start(Metrics())
        await use(store)
        await store.stop()

    asyncio.run(main())


def with_replicas(
    tmp_path: Path, use: Callable[[ReferenceStore, ReferenceStore], Awaitable[None]], **settings: int
) -> None:
    async def main() -> None:
        replicas = [ReferenceStore(tmp_path / "uploads", models_dir=None, device=CPU, **settings) for _ in range(2)]
        for replica in replicas:
            await replica.start(Metrics())
        await use(*replicas)
        for replica in replicas:
            await replica.stop()

    asyncio.run(main())


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks again and again, for at most a minute."""
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def test_references_of_the_package_the_models_directory_and_uploads(tmp_path: Path) -> None:
    write_reference(tmp_path / "models" / "house", FILES)
    (tmp_path / "models" / "an-encoder").mkdir()

    async def use(store: ReferenceStore) -> None:
        view = await store.put("mine", FILES, exist_ok=False)
        assert (view.info.vocab_size, view.ngram_buckets, view.loaded) == (models.VOCABULARY, models.BUCKETS, False)
        assert [v.name for v in store.views()] == ["house", "mine", PRETAUGHT]
        for name in ("house", PRETAUGHT):
            with pytest.raises(FailedPrecondition, match=f"{name}.*not an upload"):
                await store.delete(name)
        with pytest.raises(AlreadyExists, match="references are immutable"):
            await store.put("house", models.reference(seed=1), exist_ok=True)
        with pytest.raises(AlreadyExists, match="set exist_ok"):
            await store.put("house", FILES, exist_ok=False)
        assert (await store.put("house", FILES, exist_ok=True)).name == "house"

    with_store(tmp_path, use)

    async def again(store: ReferenceStore) -> None:
        assert (await store.get("mine", ["tokenizer.json"])).files == {"tokenizer.json": FILES["tokenizer.json"]}
        await store.delete("mine")
        with pytest.raises(NotFound, match="'mine'; this service has: house"):
            store.known("mine")
        await store.put("mine", models.reference(seed=1), exist_ok=False)

    with_store(tmp_path, again)


def test_a_tenant_has_so_many_uploads(tmp_path: Path) -> None:
    write_reference(tmp_path / "models" / "house", FILES)

    async def use(store: ReferenceStore) -> None:
        for name in ("one", "two", "theirs/one", "theirs/two"):
            await store.put(name, FILES, exist_ok=False)
        for name in ("three", "theirs/three"):
            with pytest.raises(ResourceExhausted, match=r"2 uploaded references.*\(--max-references-per-tenant\)"):
                await store.put(name, FILES, exist_ok=True)
        await store.put("two", FILES, exist_ok=True)
        await store.put("house", FILES, exist_ok=True)
        await store.delete("one")
        await store.put("three", FILES, exist_ok=False)
        with pytest.raises(ResourceExhausted):
            await store.put("theirs/three", FILES, exist_ok=False)

    with_store(tmp_path, use, per_tenant=2)


def test_uploads_are_counted_as_the_storage_has_them(tmp_path: Path) -> None:
    """At the same time, through another replica, damaged ones too."""

    async def use(one: ReferenceStore, other: ReferenceStore) -> None:
        puts = (one.put(name, FILES, exist_ok=False) for name in ("a", "b", "c", "d"))
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        stored = [name for name, outcome in zip("abcd", outcomes, strict=True) if not isinstance(outcome, Exception)]
        assert len(stored) == 2
        assert all(isinstance(o, ResourceExhausted) for o in outcomes if isinstance(o, Exception))
        await other.refresh()
        await one.delete(stored[0])
        await other.put("later", FILES, exist_ok=False)
        for path in files_of(tmp_path / "uploads"):
            if path.name == "reference.json":
                path.write_bytes(b"{")
        with pytest.raises(ResourceExhausted):
            await one.put("last", FILES, exist_ok=False)

    with_replicas(tmp_path, use, per_tenant=2)


def test_loading_is_lazy_shared_by_checksum_and_says_so(tmp_path: Path) -> None:
    async def use(store: ReferenceStore) -> None:
        for name in ("one", "two"):
            await store.put(name, FILES, exist_ok=False)
        one, two = store.known("one"), store.known("two")
        with pytest.raises(Unavailable, match="'one' is still loading"):
            store.ready(one)
        with pytest.raises(Unavailable, match="'two' is still loading"):
            await store.load(two, wait_s=0)
        loaded = await store.load(two)
        assert store.ready(one) is loaded
        assert [v.loaded for v in store.views() if v.name != PRETAUGHT] == [True, True]
        await store.delete("one")
        assert store.ready(two) is loaded  # the other name still needs it
        assert store.of_checksum("one", loaded.checksum) == two
        with pytest.raises(FailedPrecondition, match=r"'one' of the checksum f+\.\.\. is needed, but 'one' is not on"):
            store.of_checksum("one", "f" * 64)

    with_store(tmp_path, use)


def test_a_damaged_reference_is_reported_and_can_be_deleted(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "uploads" / "bad", FILES)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])

    async def use(store: ReferenceStore) -> None:
        assert [v.name for v in store.views()] == [PRETAUGHT]
        with pytest.raises(FailedPrecondition, match=r"'bad' is damaged: .*truncated"):
            store.known("bad")
        with pytest.raises(AlreadyExists, match=r"damaged.*delete it first"):
            await store.put("bad", FILES, exist_ok=True)
        await store.delete("bad")
        await store.put("bad", FILES, exist_ok=False)
        assert (await store.load(store.known("bad"))).name == "bad"

    with_store(tmp_path, use)


def test_one_that_cannot_be_loaded_says_why_until_it_can(tmp_path: Path) -> None:
    async def use(store: ReferenceStore) -> None:
        await store.put("late", FILES, exist_ok=False)
        known = store.known("late")
        hidden = known.folder.rename(known.folder.with_name("elsewhere"))
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match="'late' can't be used: there is no reference at"):
                await store.load(known)
        with pytest.raises(FailedPrecondition, match="can't be used"):
            store.ready(known)
        hidden.rename(known.folder)
        assert (await store.load(known)).checksum == known.info.checksum

    with_store(tmp_path, use)


# ---- Replicas, tenants, memory --------------------------------------------------------------------------------------


def test_what_another_replica_uploads_and_deletes_is_noticed(tmp_path: Path) -> None:
    async def use(ours: ReferenceStore, theirs: ReferenceStore) -> None:
        for name in ("mine", "other"):
            with pytest.raises(NotFound):
                await theirs.find(name)
        stored = await ours.put("mine", FILES, exist_ok=False)
        assert (await theirs.find("mine")).info == stored.info
        assert (await theirs.put("mine", FILES, exist_ok=True)).info == stored.info
        with pytest.raises(AlreadyExists, match="references are immutable"):
            await theirs.put("mine", models.reference(seed=1), exist_ok=False)

        await ours.delete("mine")
        new = await ours.put("mine", models.reference(seed=1), exist_ok=False)
        await until(lambda: is_so(theirs, "mine", new.info.checksum))
        await theirs.delete("mine")
        await until(lambda: is_so(ours, "mine", ""))
        with pytest.raises(NotFound):
            await ours.delete("mine")
        assert files_of(tmp_path / "uploads") == []

    async def is_so(store: ReferenceStore, name: str, checksum: str) -> bool:
        try:
            return (await store.find(name)).info.checksum == checksum
        except NotFound:
            return not checksum

    with_replicas(tmp_path, use)


def test_a_listing_and_a_checksum_are_found_on_any_replica(tmp_path: Path) -> None:
    async def use(ours: ReferenceStore, theirs: ReferenceStore) -> None:
        stored = await ours.put("one", FILES, exist_ok=False)
        assert (await theirs.find_checksum("one", stored.info.checksum)).name == "one"

        async def listed() -> bool:
            await theirs.refresh()
            return [view.name for view in theirs.views()] == [PRETAUGHT, "renamed"]

        await ours.put("renamed", FILES, exist_ok=False)
        await ours.delete("one")
        await until(listed)
        assert (await theirs.find_checksum("one", stored.info.checksum)).name == "renamed"
        with pytest.raises(FailedPrecondition, match="'one' is not on this service"):
            await theirs.find_checksum("one", "f" * 64)

    with_replicas(tmp_path, use)


def test_an_upload_that_was_cut_short_is_none(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "uploads" / "half", FILES)
    (folder / "reference.json").unlink()  # it is written last

    async def use(store: ReferenceStore) -> None:
        with pytest.raises(NotFound):
            await store.find("half")
        await store.put("half", FILES, exist_ok=False)
        assert (await store.load(store.known("half"))).name == "half"

    with_store(tmp_path, use)


def test_of_uploads_of_one_name_at_the_same_time_one_is_kept(tmp_path: Path) -> None:
    async def use(ours: ReferenceStore, theirs: ReferenceStore) -> None:
        same = await asyncio.gather(*(store.put("same", FILES, exist_ok=True) for store in (ours, theirs)))
        assert same[0].info == same[1].info
        for name in (f"one-{i}" for i in range(10)):
            both = [store.put(name, models.reference(seed=i), exist_ok=True) for i, store in enumerate((ours, theirs))]
            answers = await asyncio.gather(*both, return_exceptions=True)
            (kept,) = (answer for answer in answers if not isinstance(answer, BaseException))
            (refused,) = (answer for answer in answers if isinstance(answer, BaseException))
            assert isinstance(refused, AlreadyExists)
            for store in (ours, theirs):
                assert (await store.find(name)).info == kept.info
            assert len(list((tmp_path / "uploads" / name).iterdir())) == 2  # what is current, and one folder of files

    with_replicas(tmp_path, use)


def test_what_an_earlier_version_stored_beside_its_manifest_is_read_and_deleted(tmp_path: Path) -> None:
    write_reference(tmp_path / "uploads" / "flat", FILES)

    async def use(store: ReferenceStore) -> None:
        assert (await store.get("flat", ["tokenizer.json"])).files == {"tokenizer.json": FILES["tokenizer.json"]}
        assert (await store.load(store.known("flat"))).name == "flat"
        await store.delete("flat")
        assert files_of(tmp_path / "uploads") == []
        await store.put("flat", models.reference(seed=1), exist_ok=False)
        assert (await store.load(store.known("flat"))).name == "flat"

    with_store(tmp_path, use)


def test_what_a_crash_leaves_behind_is_removed_once_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "uploads" / "@acme" / "mine"

    async def use(store: ReferenceStore) -> None:
        await store.put("acme/mine", FILES, exist_ok=False)

    with_store(tmp_path, use)
    old, new = (folder / f"{int(time.time()) - age:010d}-{'0' * 32}" for age in (7200, 60))
    for left in (old, new):
        write_reference(left, FILES)
    with_store(tmp_path, lambda store: store.find("acme/mine"))
    assert not files_of(old)
    assert len(files_of(new)) == len(FILES)


def test_a_pointer_that_names_no_upload_is_damage(tmp_path: Path) -> None:
    (tmp_path / "uploads" / "odd").mkdir(parents=True)
    (tmp_path / "uploads" / "odd" / "current").write_text("../other")

    async def use(store: ReferenceStore) -> None:
        with pytest.raises(FailedPrecondition, match=r"'odd' is damaged: .*odd/current holds '../other'"):
            await store.find("odd")
        await store.delete("odd")
        with pytest.raises(NotFound):
            await store.find("odd")

    with_store(tmp_path, use)


def test_a_tenants_references_lie_apart(tmp_path: Path) -> None:
    async def use(ours: ReferenceStore, theirs: ReferenceStore) -> None:
        names = ("acme", "acme/acme", "acme/config.json", "reference.json")
        for seed, name in enumerate(names):
            await ours.put(name, models.reference(seed=seed), exist_ok=False)
        for name in names:
            assert (await theirs.find(name)).info == ours.known(name).info
        await ours.delete("acme")
        again = ReferenceStore(tmp_path / "uploads", models_dir=None, device=CPU)
        await again.start(Metrics())
        assert [view.name for view in again.views()] == [*names[1:3], PRETAUGHT, names[3]]
        for odd in ("", "/", "../uploads", "acme/", "acme/x/y", "@acme/acme", "a b"):
            with pytest.raises(NotFound):
                await ours.find(odd)
            with pytest.raises(NotFound):
                await ours.delete(odd)

    with_replicas(tmp_path, use)


def test_storage_that_fails_is_not_a_reference_that_is_not_there(tmp_path: Path) -> None:
    async def use(ours: ReferenceStore, theirs: ReferenceStore) -> None:
        await ours.put("mine", FILES, exist_ok=False)
        known = await theirs.find("mine")
        uploads = (tmp_path / "uploads").rename(tmp_path / "elsewhere")
        (tmp_path / "uploads").write_bytes(b"in the way")
        with pytest.raises(Unavailable, match=r"'other' can't be looked for: .*uploads"):
            await theirs.find("other")
        assert theirs.known("mine") == known
        (tmp_path / "uploads").unlink()
        uploads.rename(tmp_path / "uploads")
        assert await theirs.find("mine") == known

    with_replicas(tmp_path, use)


def test_references_that_no_job_uses_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighting_service.loaded.LOADED_MOST", 2)

    for seed in range(4):
        write_reference(tmp_path / f"r{seed}", models.reference(seed=seed))

    async def main() -> None:
        store = ReferenceStore(tmp_path, models_dir=None, device=CPU)
        await store.start(Metrics(), lambda: {store.known("r0").info.checksum})
        for name in ("r0", "r1", "r2"):
            await store.load(store.known(name))
        assert loaded(store) == ["r0", "r2"]  # r0 is in use, r1 was not
        await store.load(store.known("r1"))
        assert loaded(store) == ["r0", "r1"]
        await store.load(store.known("r3"))
        assert loaded(store) == ["r0", "r3"]
        await store.stop()

    def loaded(store: ReferenceStore) -> list[str]:
        return [view.name for view in store.views() if view.loaded]

    asyncio.run(main())
