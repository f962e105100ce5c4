"""The model and `Weighter.score`: uniform at first, order-free, and blind to a batch's companions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from weighting_contract.spec import FeatureSpec, HeadSpec, WeighterSpec
from weighting_service.domain import Inputs, MetaUpdate
from weighting_service.weighter import Weighter
from weighting_service.weighter.model import DataWeightingModel

CPU = torch.device("cpu")
COLUMNS = ("loss", "spread", "gain")


def spec_of(**values: object) -> WeighterSpec:
    return WeighterSpec(features=FeatureSpec(names=COLUMNS, hidden_size=4), seed=3, **values)  # type: ignore[arg-type]


def batch(samples: int, seed: int = 0, scale: float = 1.0) -> Inputs:
    rng = np.random.default_rng(seed)
    return Inputs(
        features=(scale * rng.normal(size=(samples, len(COLUMNS)))).astype(np.float32),
        hidden=(scale * rng.normal(size=(samples, 4))).astype(np.float32),
    )


def taught(spec: WeighterSpec, updates: int = 6) -> Weighter:
    """A weighter whose logits are no longer all equal."""
    weighter = Weighter(spec, device=CPU)
    for position in range(1, updates + 1):
        inputs = batch(24, seed=position)
        cotangent = np.asarray(inputs.features)[:, 0] * np.float32(1e-4)
        weighter.apply(position, MetaUpdate("job", str(position), position, inputs, cotangent, position - 1))
    return weighter


@pytest.mark.parametrize("samples", [1, 2, 49, 256])
def test_a_fresh_weighter_is_exactly_uniform(samples: int) -> None:
    (scores,) = Weighter(spec_of(), device=CPU).score([batch(samples)])
    np.testing.assert_array_equal(scores.weights, np.ones(samples, np.float32))
    np.testing.assert_array_equal(scores.logits, np.zeros(samples, np.float32))
    assert scores.effective_sample_size == samples
    assert scores.position == 0


def test_weights_follow_their_samples_whatever_the_order() -> None:
    weighter, inputs = taught(spec_of()), batch(31, seed=9)
    order = np.random.default_rng(1).permutation(31)
    assert inputs.features is not None
    assert inputs.hidden is not None
    (plain,) = weighter.score([inputs])
    (permuted,) = weighter.score([Inputs(inputs.features[order], inputs.hidden[order])])
    assert plain.weights.std() > 0.01
    np.testing.assert_allclose(permuted.weights, plain.weights[order], rtol=0, atol=2e-6)


def test_a_sample_counts_in_the_light_of_its_batch() -> None:
    weighter, inputs = taught(spec_of()), batch(16, seed=9)
    assert inputs.features is not None
    assert inputs.hidden is not None
    (whole,) = weighter.score([inputs])
    (half,) = weighter.score([Inputs(inputs.features[:8], inputs.hidden[:8])])
    assert np.abs(whole.logits[:8] - half.logits).max() > 1e-5


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_companions_in_a_pass_change_nothing(layers: int) -> None:
    weighter = taught(spec_of(head=HeadSpec(layers=layers)))
    batches = [batch(8, 1), batch(5, 2), batch(7, 3, scale=1e30), batch(8, 4), batch(300, 5), batch(1, 6)]
    together = weighter.score(batches)
    for inputs, scores in zip(batches, together, strict=True):
        (alone,) = weighter.score([inputs])
        assert scores.weights.shape == (inputs.samples,)
        np.testing.assert_allclose(scores.weights, alone.weights, rtol=0, atol=1e-6 * max(1.0, alone.weights.max()))
        np.testing.assert_allclose(scores.logits, alone.logits, rtol=0, atol=1e-6)
        assert scores.effective_sample_size == pytest.approx(alone.effective_sample_size, rel=1e-5)


def test_huge_inputs_give_finite_weights_of_mean_one() -> None:
    extremes = Inputs(
        features=np.array([[3e38, -3e38, 0], [1, 2, 3], [-3e38, 3e38, 1]], np.float32),
        hidden=np.array([[3e38] * 4, [0] * 4, [-3e38, 1, 2, 3]], np.float32),
    )
    (scores,) = taught(spec_of()).score([extremes])
    assert np.isfinite(scores.weights).all()
    assert scores.weights.mean() == pytest.approx(1, abs=1e-6)


def test_no_batches_no_scores() -> None:
    assert Weighter(spec_of(), device=CPU).score([]) == []


def test_read_only_and_double_arrays_are_taken() -> None:
    weighter, inputs = taught(spec_of()), batch(6)
    assert inputs.features is not None
    assert inputs.hidden is not None
    double = Inputs(inputs.features.astype(np.float64), np.frombuffer(inputs.hidden.tobytes(), "<f4").reshape(6, 4))
    np.testing.assert_array_equal(weighter.score([double])[0].weights, weighter.score([inputs])[0].weights)


def test_the_seed_alone_decides_and_the_process_keeps_its_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = DataWeightingModel(spec_of())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = DataWeightingModel(spec_of())
    other = DataWeightingModel(WeighterSpec(features=FeatureSpec(names=COLUMNS, hidden_size=4), seed=4))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.join.weight, other.join.weight)


def test_parameters_are_counted_and_feature_weighters_have_no_vocabulary() -> None:
    head = HeadSpec(width=2, layers=0, attention_heads=1)
    weighter = Weighter(WeighterSpec(features=FeatureSpec(names=("a", "b", "c")), head=head), device=CPU)
    # Linear 3 x 2 + 2, LayerNorm 2 + 2, join 2 x 2 + 2, norm 2, logit 2
    assert weighter.parameter_count == 8 + 4 + 6 + 2 + 2
    assert weighter.vocabulary_size is None


def test_feature_weighters_work_without_transformers() -> None:
    code = (
        "import sys, torch; sys.modules['transformers'] = None\n"
        "from weighting_contract.spec import FeatureSpec, WeighterSpec\n"
        "from weighting_service.weighter import Weighter\n"
        "print(Weighter(WeighterSpec(features=FeatureSpec(names=('a',))), device=torch.device('cpu')).position)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
