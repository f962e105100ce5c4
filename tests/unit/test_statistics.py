"""The portable statistics against a naive reference, one sample and one token at a time, and their edge cases."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer_client.features import FEATURE_NAMES, batch_features
from weighting_contract.errors import InvalidArgument
from weighting_contract.statistics import (
    BOUND,
    NAMES,
    RAW_NAMES,
    portable_statistics,
    raw_statistics,
    standardise,
    unigram_nll_table,
)

B, T = 7, 19
QUANTILES = {"loss_q10": 0.1, "loss_q25": 0.25, "loss_q50": 0.5, "loss_q75": 0.75, "loss_q90": 0.9}


def draw(seed: int = 0, samples: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses, unigram NLLs and a mask whose rows have from one real token up."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(samples, T, generator=generator).square() * 6
    unigram = torch.rand(samples, T, generator=generator) * 8 + 0.1
    lengths = torch.randint(2, T, (samples, 1), generator=generator)
    lengths[0] = 1
    return losses, unigram, torch.arange(T) < lengths


def naive(losses: Tensor, unigram: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """By the formulas, in float64, without a tensor operation."""
    rows: list[dict[str, float]] = []
    for sample in range(len(losses)):
        places = [t for t in range(losses.shape[1]) if mask[sample, t]]
        own = [float(losses[sample, t]) for t in places]
        common = [float(unigram[sample, t]) for t in places]
        gain = [u - x for u, x in zip(common, own, strict=True)]
        mean = sum(own) / len(own)
        rows.append(
            {
                "loss_mean": mean,
                "loss_std": math.sqrt(sum((x - mean) ** 2 for x in own) / len(own)),
                "easy_share": sum(x < 0.5 for x in own) / len(own),
                "gain_mean": sum(gain) / len(gain),
                "gain_positive_share": sum(g > 0 for g in gain) / len(gain),
                "gain_ratio": sum(gain) / sum(common),
                "unigram_mean": sum(common) / len(common),
                **{name: float(np.quantile(own, q)) for name, q in QUANTILES.items()},
            }
        )
    raw = {name: [row[name] for row in rows] for name in rows[0]}

    def z(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
        return [(x - mean) / deviation for x in values]

    unigram_mean = sum(raw["unigram_mean"]) / len(rows)
    return {
        **raw,
        "loss_z": z(raw["loss_mean"]),
        "gain_z": z(raw["gain_mean"]),
        "unigram_centred": [x - unigram_mean for x in raw["unigram_mean"]],
        "unigram_z": z(raw["unigram_mean"]),
        **{name: z(raw[name]) for name in QUANTILES},
    }


def column(statistics: Tensor, name: str) -> Tensor:
    return statistics[:, NAMES.index(name)]


@pytest.mark.parametrize("masked", [False, True])
def test_every_statistic_is_its_formula(masked: bool) -> None:
    losses, unigram, mask = draw()
    got = portable_statistics(losses, unigram, mask if masked else None)
    expected = naive(losses, unigram, mask if masked else torch.ones_like(mask))
    assert got.dtype == torch.float32
    assert got.shape == (B, len(NAMES))
    for name in NAMES:
        torch.testing.assert_close(column(got, name), torch.tensor(expected[name]), rtol=1e-4, atol=2e-5, msg=name)


def test_the_names_are_fixed() -> None:
    """A taught weighter reads columns by these names: they may grow, but not change."""
    assert FEATURE_NAMES == NAMES
    assert list(NAMES) == [
        *("loss_z", "loss_std", "easy_share", "gain_mean", "gain_z", "gain_positive_share", "gain_ratio"),
        *("unigram_centred", "unigram_z", "loss_q10", "loss_q25", "loss_q50", "loss_q75", "loss_q90"),
    ]


def test_a_raw_row_depends_on_its_own_sample_only() -> None:
    losses, unigram, mask = draw()
    together = raw_statistics(losses, unigram, mask)
    assert together.shape == (B, len(RAW_NAMES))
    for i in range(B):
        alone = raw_statistics(losses[i : i + 1], unigram[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
        short = slice(0, int(mask[i].sum()))
        unpadded = raw_statistics(losses[i : i + 1, short], unigram[i : i + 1, short])
        torch.testing.assert_close(together[i : i + 1], unpadded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [1, 31, 64, 1000])
def test_raw_rows_are_the_same_bits_however_many_are_in_a_call(masked: bool, dtype: torch.dtype, places: int) -> None:
    """Ranks split a batch, and a service puts several into one pass or keeps the rows of samples that it has seen."""
    samples = 23
    generator = torch.Generator().manual_seed(places)
    losses = (torch.rand(samples, places, generator=generator).square() * 6).to(dtype)
    unigram = torch.rand(samples, places, generator=generator) * 8
    lengths = torch.randint(0, places + 1, (samples, 1), generator=generator)
    mask = torch.arange(places) < lengths if masked else None
    together = raw_statistics(losses, unigram, mask)
    for size in (1, 2, 3, 7, 16):
        starts = range(0, samples, size)
        parts = [
            raw_statistics(losses[i : i + size], unigram[i : i + size], None if mask is None else mask[i : i + size])
            for i in starts
        ]
        assert torch.equal(torch.cat(parts), together), size
    # Nor on how the rows lie in memory.
    by_column = [None if given is None else given.T.contiguous().T for given in (losses, unigram, mask)]
    assert torch.equal(raw_statistics(*by_column), together)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 5, 32, 100])
def test_a_mask_that_hides_nothing_changes_no_bit(samples: int) -> None:
    losses, unigram, mask = draw(samples=samples)
    assert torch.equal(raw_statistics(losses, unigram, torch.ones_like(mask)), raw_statistics(losses, unigram))


def test_rows_from_several_ranks_standardise_as_one_batch() -> None:
    losses, unigram, mask = draw()
    parts = [raw_statistics(losses[i:j], unigram[i:j], mask[i:j]) for i, j in pairwise((0, 2, 5, B))]
    torch.testing.assert_close(standardise(torch.cat(parts)), portable_statistics(losses, unigram, mask))


@pytest.mark.parametrize("filler", [-1.0, 1e9, math.nan, math.inf])
def test_what_stands_at_masked_places_does_not_matter(filler: float) -> None:
    losses, unigram, mask = draw()
    expected = portable_statistics(losses, unigram, mask)
    got = portable_statistics(losses.masked_fill(~mask, filler), unigram.masked_fill(~mask, filler), mask)
    assert torch.equal(got, expected)


def test_a_sample_without_tokens_is_zero_and_does_not_move_the_others() -> None:
    losses, unigram, mask = draw()
    mask[3] = False
    got = portable_statistics(losses, unigram, mask)
    others = [i for i in range(B) if i != 3]
    assert torch.equal(got[3], torch.zeros(len(NAMES)))
    torch.testing.assert_close(got[others], portable_statistics(losses[others], unigram[others], mask[others]))
    assert torch.equal(portable_statistics(losses, unigram, torch.zeros_like(mask)), torch.zeros(B, len(NAMES)))


def test_a_batch_of_one_has_no_deviations() -> None:
    losses, unigram, _ = draw(samples=1)
    got = portable_statistics(losses, unigram)
    relative = ("loss_z", "gain_z", "unigram_centred", "unigram_z", *QUANTILES)
    assert all(float(column(got, name)) == 0.0 for name in relative)
    assert all(float(column(got, name)) != 0.0 for name in ("loss_std", "gain_mean", "gain_ratio"))


@pytest.mark.parametrize("samples", [2, 3, 7, 100])
def test_equal_samples_have_no_deviations(samples: int) -> None:
    losses, unigram, _ = draw(samples=1)
    got = portable_statistics(losses.expand(samples, T), unigram.expand(samples, T))
    assert not column(got, "loss_z").any()
    assert not column(got, "unigram_z").any()
    assert not column(got, "loss_q50").any()
    torch.testing.assert_close(column(got, "unigram_centred"), torch.zeros(samples), atol=1e-5, rtol=0)


def test_statistics_stay_in_bounds() -> None:
    losses, unigram = torch.ones(400, 3), torch.full((400, 3), 1e-3)
    losses[0] = 1e6
    got = portable_statistics(losses, unigram)
    assert float(column(got, "loss_z")[0]) == BOUND  # 20 deviations
    assert float(column(got, "gain_mean")[0]) == -BOUND
    assert float(got.abs().max()) == BOUND


def test_unigram_nll_of_zero_gives_no_ratio() -> None:
    got = portable_statistics(torch.ones(2, 3), torch.zeros(2, 3))
    assert column(got, "gain_ratio").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows(bad: float) -> None:
    losses, unigram, _ = draw()
    losses[2, 4] = bad
    got = portable_statistics(losses, unigram)
    assert column(got, "loss_z").isnan().all()
    assert not got[2].isfinite().all()


def test_half_precision_losses_are_reduced_in_float32() -> None:
    losses, unigram, mask = draw()
    got = portable_statistics(losses.bfloat16(), unigram.bfloat16(), mask)
    assert torch.equal(got, portable_statistics(losses.bfloat16().float(), unigram.bfloat16().float(), mask))


def test_batch_features_are_detached_statistics() -> None:
    losses, unigram, mask = draw()
    got = batch_features(losses.requires_grad_(), unigram, mask)
    assert not got.requires_grad
    assert torch.equal(got, portable_statistics(losses, unigram, mask).detach())
    assert torch.equal(batch_features(losses, unigram), portable_statistics(losses, unigram).detach())


def test_the_unigram_table_is_add_one_smoothed() -> None:
    counts = [0, 5, 94, 1]
    table = unigram_nll_table(torch.tensor(counts))
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor([-math.log((c + 1) / 104) for c in counts]))
    torch.testing.assert_close(unigram_nll_table(np.array(counts, np.uint16)), table)  # type: ignore[arg-type]
    assert float((-table).exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("losses", "unigram", "mask", "message"),
    [
        (torch.ones(3), torch.ones(3), None, r"token_losses has shape \[3\], expected \[B, T\]"),
        (torch.ones(0, 3), torch.ones(0, 3), None, r"token_losses has shape \[0, 3\]"),
        (torch.ones(2, 0), torch.ones(2, 0), None, r"token_losses has shape \[2, 0\]"),
        (torch.ones(2, 3), torch.ones(2, 4), None, r"unigram_nll has shape \[2, 4\], expected that of"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), r"mask is float32 of shape \[2, 3\], expected bool"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2).bool(), r"mask is bool of shape \[2, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(losses: Tensor, unigram: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        portable_statistics(losses, unigram, mask)


@pytest.mark.parametrize("shape", [(0, len(RAW_NAMES)), (3, len(RAW_NAMES) - 1), (len(RAW_NAMES),)])
def test_rows_of_another_width_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="raw has shape"):
        standardise(torch.zeros(shape))


@pytest.mark.parametrize("counts", [[], [[1, 2]], [1, -1], [1.0, math.nan]])
def test_counts_that_are_none_are_errors(counts: list[float]) -> None:
    with pytest.raises(InvalidArgument, match="counts"):
        unigram_nll_table(torch.tensor(counts))
