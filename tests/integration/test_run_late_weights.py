"""Weights that come while the backward pass runs train what weights do that were there before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_job import assert_same_tensors, final, weighed

from trainer_client.run.__main__ import main
from trainer_client.run.parallel import Replica


def assert_close(trained: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], most: float) -> None:
    assert trained.keys() == expected.keys()
    for name in trained:
        torch.testing.assert_close(trained[name], expected[name], rtol=0, atol=most, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("same_threads_after")
def test_late_weights_train_the_same_model(data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late, before, replayed = (tmp_path / name for name in ("late", "before", "replayed"))
    flags = ["--mode", "weight", "--weighter-from", "none", "--compare", "uniform"]
    assert main([*data, *flags, "--out", str(late)]) == 0
    # What several micro-batches need anyway: weights that are known before the first backward pass.
    monkeypatch.setattr(Replica, "head", None)
    assert main([*data, *flags, "--out", str(before)]) == 0
    assert main(["--replay-weights", str(late), "--out", str(replayed)]) == 0

    records = list(zip(weighed(late, "weight-scratch"), weighed(before, "weight-scratch"), strict=True))
    assert max(np.ptp(x.weights) for x, _ in records) > 0.1
    for x, y in records:
        assert (x.step, x.position, x.fallback) == (y.step, y.position, False)
        # The weighter reads the losses of what it has weighed, so differences in the last bits add up.
        np.testing.assert_allclose(x.weights, y.weights, rtol=1e-4)
    assert_close(final(late, "weight-scratch"), final(replayed, "weight-scratch"), 1e-6)
    assert_close(final(late, "weight-scratch"), final(before, "weight-scratch"), 1e-5)
    assert_same_tensors(final(late, "uniform"), final(before, "uniform"))  # by weights of 1 nothing is multiplied
