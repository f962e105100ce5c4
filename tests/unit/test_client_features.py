"""Features that a trainer makes: the same columns as a service's reference gives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from trainer_client.features import FEATURE_NAMES, batch_features  # noqa: E402
from weighting_contract.columns import COLUMNS  # noqa: E402
from weighting_contract.errors import InvalidArgument  # noqa: E402
from weighting_contract.ngrams import NGRAM_NAMES, ngram_statistics  # noqa: E402
from weighting_contract.statistics import portable_statistics  # noqa: E402

LOSSES = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 5
UNIGRAM = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) * 8
IDS = torch.randint(0, 50, (5, 8), generator=torch.Generator().manual_seed(2))
TABLE = torch.randn(1024, generator=torch.Generator().manual_seed(3))
MASK = torch.arange(7) < torch.tensor([7, 6, 5, 3, 2])[:, None]


def test_without_names_they_are_the_portable_statistics() -> None:
    torch.testing.assert_close(batch_features(LOSSES, UNIGRAM, MASK), portable_statistics(LOSSES, UNIGRAM, MASK))
    assert batch_features(LOSSES.requires_grad_(), UNIGRAM).requires_grad is False


@pytest.mark.parametrize("first", [0, 1], ids=["all ids", "labels only"])
def test_names_choose_and_order_and_a_profile_adds(first: int) -> None:
    names = ("ngram_log_ratio_z", "gain_z", "ngram_log_ratio")
    tokens = IDS[:, first:]
    given = batch_features(LOSSES, UNIGRAM, MASK, names=names, tokens=tokens, profile=TABLE)
    mask = MASK if first else torch.cat([torch.ones(5, 1, dtype=torch.bool), MASK], 1)
    ngrams = ngram_statistics(tokens, mask, TABLE)
    gain = portable_statistics(LOSSES, UNIGRAM, MASK)[:, FEATURE_NAMES.index("gain_z")]
    torch.testing.assert_close(given, torch.stack([ngrams[:, 1], gain, ngrams[:, 0]], 1).detach())
    assert batch_features(LOSSES, UNIGRAM, names=COLUMNS, tokens=tokens, profile=TABLE).shape == (5, len(COLUMNS))


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(InvalidArgument, match="need a target profile"):
        batch_features(LOSSES, UNIGRAM, names=NGRAM_NAMES)
    with pytest.raises(InvalidArgument, match="'length' is no statistic"):
        batch_features(LOSSES, UNIGRAM, names=("length",))
    with pytest.raises(InvalidArgument, match=r"tokens have shape \[5, 6\], expected \[5, 7\]"):
        batch_features(LOSSES, UNIGRAM, names=NGRAM_NAMES, tokens=IDS[:, :6], profile=TABLE)
