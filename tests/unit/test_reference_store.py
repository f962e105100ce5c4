"""Where references come from, how they are loaded, and what becomes of damaged ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from tests.unit import reference_models as models
from weighting_contract.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from weighting_contract.reference import write_reference
from weighting_service.metrics import Metrics
from weighting_service.pretaught import NAME as PRETAUGHT
from weighting_service.references import ReferenceStore

FILES = models.reference()


def with_store(tmp_path: Path, use: Callable[[ReferenceStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = ReferenceStore(tmp_path / "uploads", models_dir=tmp_path / "models", device=torch.device("cpu"))
        await store.start(Metrics())
        await use(store)
        await store.stop()

    asyncio.run(main())


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
    leftover = tmp_path / "uploads" / ".half.upload"
    leftover.mkdir()

    async def use(store: ReferenceStore) -> None:
        assert not leftover.exists()
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
