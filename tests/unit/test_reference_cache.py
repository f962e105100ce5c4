"""What a reference remembers of samples: never another number than it would compute, never more than it may keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit import reference_models as models
from weighting_contract.reference import write_reference
from weighting_contract.statistics import RAW_NAMES
from weighting_service.reference import Reference, load_reference
from weighting_service.reference.cache import SampleCache, sample_keys
from weighting_service.reference.packing import Pack

LENGTH = models.SEQ_LEN + 1


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("references") / "ref", models.reference())


@pytest.fixture
def remembering(folder: Path) -> Reference:
    return load_reference(folder, cached_samples=1000)


@pytest.fixture(scope="module")
def forgetful(folder: Path) -> Reference:
    return load_reference(folder)


def windows(seed: int, count: int) -> np.ndarray:
    """[count, LENGTH] token ids, as a run's candidates: all of one length."""
    return np.random.default_rng(seed).integers(0, models.VOCABULARY, (count, LENGTH))


def computed(reference: Reference) -> tuple[int, ...]:
    return reference.last_report.computed_samples


# ---- By a reference -------------------------------------------------------------------------------------------------


def test_statistics_are_the_same_to_the_last_bit_in_any_order(remembering: Reference, forgetful: Reference) -> None:
    pool = windows(0, 60)
    expected = forgetful.raw_statistics(pool)
    rng = np.random.default_rng(1)
    for size in (1, 7, 16, 40, 60, 60):  # of samples some of which are known, in packs of other sizes each time
        chosen = rng.permutation(60)[:size]
        assert torch.equal(remembering.raw_statistics(pool[chosen]), expected[torch.from_numpy(chosen)])
    assert computed(remembering) == (0,)
    assert remembering.last_report.known_samples == 60


def test_only_what_is_not_known_is_computed(remembering: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = windows(2, 12)
    passes: list[int] = []
    score = remembering._score

    def counted(packs: list[Pack]) -> torch.Tensor:
        passes.append(sum(len(pack.indices) for pack in packs))
        return score(packs)

    monkeypatch.setattr(remembering, "_score", counted)
    remembering.raw_statistics(pool[:8])
    remembering.raw_statistics(pool[4:])
    report = remembering.last_report
    assert (report.samples, report.computed_samples, report.known_samples) == (8, (4,), 4)
    assert report.real_tokens == report.padded_tokens == 4 * models.SEQ_LEN
    remembering.raw_statistics(pool)
    report = remembering.last_report
    assert (report.packs, report.real_tokens, report.known_samples) == (0, 0, 12)
    assert passes == [8, 4]


def test_a_sample_that_comes_twice_in_a_call_is_computed_once_for_who_is_first(folder: Path) -> None:
    reference = load_reference(folder)  # also one that remembers nothing
    a, b, c = windows(3, 3)
    given = reference.raw_statistics_of([[a, b, a], [], [b, c], [c, a]])
    assert computed(reference) == (2, 0, 1, 0)
    assert torch.equal(given[0][0], given[0][2])
    assert torch.equal(given[2], torch.stack([given[0][1], given[3][0]]))
    assert torch.equal(torch.cat(given)[[0, 1, 4]], reference.raw_statistics([a, b, c]))
    reference.raw_statistics([a])
    assert computed(reference) == (1,)


def test_samples_are_known_as_they_are_computed(remembering: Reference) -> None:
    """Cut to what the reference reads, whatever type they come in; a shorter one is another sample."""
    long = np.random.default_rng(4).integers(0, models.VOCABULARY, 2 * LENGTH)
    first = remembering.raw_statistics([long])
    for same in (long[:LENGTH], long[: LENGTH + 1], long.astype(np.uint16), long.astype(np.int32).tolist()):
        assert torch.equal(remembering.raw_statistics([same]), first)
        assert computed(remembering) == (0,)
    assert remembering.last_report.cut_samples == 1
    remembering.raw_statistics([long[: LENGTH - 1]])
    assert computed(remembering) == (1,)
    remembering.raw_statistics([np.append(long[: LENGTH - 2], 0)])
    assert computed(remembering) == (1,)


def test_callers_of_different_scopes_share_nothing(remembering: Reference) -> None:
    """Or one could find out by the count what another has sent."""
    (row,) = windows(5, 1)
    both = remembering.raw_statistics_of([[row], [row], [row]], scopes=["a", "b", "a"])
    assert computed(remembering) == (1, 1, 0)
    assert torch.equal(both[0], both[1])
    remembering.raw_statistics_of([[row], [row], [row]], scopes=["b", "", "a"])
    assert computed(remembering) == (0, 1, 0)


def test_the_oldest_samples_are_forgotten_first(folder: Path) -> None:
    reference = load_reference(folder, cached_samples=4)
    pool = windows(6, 11)
    expected = load_reference(folder).raw_statistics(pool)
    reference.raw_statistics(pool[:4])
    reference.raw_statistics(pool[4:6])  # in place of 0 and 1
    reference.raw_statistics(pool[2:6])
    assert computed(reference) == (0,)
    assert torch.equal(reference.raw_statistics(pool), expected)  # more at once than it keeps
    assert computed(reference) == (7,)
    reference.raw_statistics(pool[7:])
    assert computed(reference) == (0,)
    reference.raw_statistics(pool[:7])
    assert computed(reference) == (7,)


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    untied = models.reference({**models.LLAMA, "tie_word_embeddings": False})
    reference = load_reference(write_reference(tmp_path / "ref", untied), cached_samples=10)
    broken = 7  # a token whose embedding is no number
    rows = np.where(windows(7, 4) == broken, 8, windows(7, 4))
    rows[2, 3] = broken
    reference._model._model.get_input_embeddings().weight[broken] = torch.nan
    for _ in range(2):
        given = reference.raw_statistics(rows[[0, 2, 2]])
        assert given[0].isfinite().all()
        assert not given[1].isfinite().all()
        np.testing.assert_array_equal(given[1], given[2])
    assert computed(reference) == (1,)  # the one that is not finite, again


# ---- By itself ------------------------------------------------------------------------------------------------------


def rows_of(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None].expand(-1, len(RAW_NAMES)).contiguous()


def test_a_cache_keeps_the_newest_rows() -> None:
    cache = SampleCache(5)
    kept: dict[bytes, float] = {}
    rng = np.random.default_rng(0)
    for call in range(50):
        new = [f"{call}/{n}".encode() for n in range(rng.integers(0, 9))]
        values = rng.random(len(new)).astype(np.float32)
        cache.add(new, rows_of(*values.tolist()) if new else rows_of())
        kept = dict([*kept.items(), *zip(new, values, strict=True)][-5:])
        assert len(cache) == len(kept)
        asked = [*kept, b"unknown", *(f"{call - 3}/{n}".encode() for n in range(9))]
        rows, known = cache.read(asked)
        assert known.tolist() == [key in kept for key in asked]
        np.testing.assert_array_equal(rows[torch.from_numpy(known), 3], [kept[key] for key in asked if key in kept])


def test_a_cache_of_nothing_knows_nothing() -> None:
    cache = SampleCache(0)
    cache.add([b"a"], rows_of(1.0))
    assert len(cache) == 0
    assert not cache.read([b"a"])[1].any()


def test_keys_tell_samples_and_scopes_apart() -> None:
    row = np.arange(3)
    others = [row[:2], np.append(row, 0), row[::-1], np.arange(3) << 40]
    keys = [*sample_keys([row, *others]), *sample_keys([row], "a")]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}
    assert len(set(sample_keys([np.arange(6)[::2], np.array([0, 2, 4], np.uint16)], "a"))) == 1
