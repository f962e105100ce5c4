"""Judges against naive references, what their logits become, what they cost, and what they never touch."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from trainer_client.reference.config import SMALLEST, ReferenceConfig
from trainer_client.run.compute import scoring_flops, training_flops
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Samples
from trainer_client.run.forward import sample_losses, token_losses
from trainer_client.run.methods.judge import Cost, Sharpness, standardised
from trainer_client.run.methods.judged import JudgedChooser, JudgedWeigher, LabelledBatches
from trainer_client.run.methods.judges import (
    AlignmentJudge,
    LossJudge,
    RandomJudge,
    ReducibleLossJudge,
    SimilarityJudge,
    StaticJudge,
    lin_upper,
)
from trainer_client.run.methods.models import pool_losses, pool_model, tuned_model
from trainer_client.run.methods.sources import target_samples
from trainer_client.run.models import build_model, count_parameters
from trainer_client.run.recorder import Recorder
from trainer_client.run.reference import RunReference, made_reference
from trainer_client.run.task import Task
from trainer_client.run.tokenizer import train_tokenizer
from trainer_client.select.choice import evenly_in_warm_up
from trainer_client.select.guard import guarded_weights
from weighting_contract.errors import InvalidArgument
from weighting_service.weighter.normalise import to_weights

CPU = torch.device("cpu")
KEEP, CANDIDATES, LENGTH, STEPS = 8, 24, 12, 20
NO_TEST = cast(Samples, None)  # whoever looks at test samples fails


def words(rng: np.random.Generator, count: int, ids: range) -> np.ndarray:
    """[count, LENGTH + 1] walks over a few ids, each followed by one of two: there is something to learn."""
    start = rng.integers(0, len(ids), (count, 1))
    moves = rng.integers(1, 3, (count, LENGTH))
    walk = np.concatenate([start, moves], 1).cumsum(1) % len(ids)
    return (ids.start + walk).astype(np.uint16)


@pytest.fixture(scope="module")
def task() -> Task:
    """A quarter of the pool is of the target, whose validation samples are under another name."""
    rng = np.random.default_rng(0)
    target, other = words(rng, 60, range(20, 60)), words(rng, 120, range(100, 140))
    noise = rng.integers(20, 140, (60, LENGTH + 1)).astype(np.uint16)
    sources = np.repeat([2, 1, 0], [60, 120, 60])
    mixed = rng.permutation(240)
    train = Samples(np.concatenate([target, other, noise])[mixed], sources[mixed], ("noise", "other", "target"))
    val = Samples(words(rng, 160, range(20, 60)), np.zeros(160, np.int64), ("held-out",))
    tokenizer = train_tokenizer(["some text"], 300)
    order, candidates = BatchOrder(train, KEEP, seed=1), BatchOrder(train, CANDIDATES, seed=1)
    return Task(tokenizer, train, val, NO_TEST, order, candidates, torch.zeros(300), seed=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model("tiny", 300, LENGTH, seed=0).eval()


@pytest.fixture(scope="module")
def reference(task: Task, tmp_path_factory: pytest.TempPathFactory) -> RunReference:
    config = RunConfig(data=("pool.jsonl",), val=("val.jsonl",), vocab_size=300, seq_len=LENGTH, out="nowhere")
    cache = tmp_path_factory.mktemp("cache")
    return made_reference(config, task, CPU, None, cache_dir=cache, recipe=ReferenceConfig(size=SMALLEST, steps=60))


# ---- From logits to weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_weights_are_those_of_the_service(temperature: float, share: float) -> None:
    for logits in (np.random.default_rng(0).normal(size=50), np.arange(7.0), np.zeros(3), np.array([0, 1e9]), [4.0]):
        weights = guarded_weights(np.asarray(logits), temperature, share)
        expected, size = to_weights(
            torch.tensor(logits, dtype=torch.float64), temperature=temperature, floor=0.0, min_effective_share=share
        )
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        assert weights.sum() ** 2 / (weights**2).sum() >= share * len(weights) * (1 - 1e-5)
        assert float(size) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-3)


def test_at_temperature_0_the_highest_share_everything() -> None:
    assert guarded_weights(np.array([1.0, 3.0, 3.0, 0.0]), 0.0, 0.9).tolist() == [0, 2, 2, 0]
    assert guarded_weights(np.zeros(4), 0.0, 0.1).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("logits", "temperature", "share", "words"),
    [
        ([0.0, np.nan], 1.0, 0.1, "all finite"),
        ([], 1.0, 0.1, "logits of shape"),
        ([0.0], -1.0, 0.1, "temperature is -1.0"),
        ([0.0], 1.0, 1.5, "min_effective_share is 1.5"),
    ],
)
def test_impossible_weights_are_one_sentence(logits: list[float], temperature: float, share: float, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        guarded_weights(np.array(logits), temperature, share)


def test_the_scale_of_logits_does_not_matter() -> None:
    logits = np.random.default_rng(0).normal(size=30).astype(np.float32)
    sharpness = Sharpness(temperature=2.0, min_effective_share=0.1)
    np.testing.assert_allclose(sharpness.weights(logits, 0), sharpness.weights(1e-6 * logits + 3e-6, 0), rtol=1e-4)
    assert standardised(np.full(5, np.float32(0.1)), 0).tolist() == [0] * 5
    with pytest.raises(InvalidArgument, match=r"in step 7 .* has diverged"):
        sharpness.weights(np.array([0, np.inf], np.float32), 7)


def test_costs_add_up() -> None:
    assert Cost(per_sample=2, per_step=10, per_new_sample=100).of(steps=3, samples=5, different=4) == 440


# ---- Judges ---------------------------------------------------------------------------------------------------------


def judged(judge: Any, task: Task, model: torch.nn.Module, step: int = 3, chosen: np.ndarray | None = None) -> Any:
    """(its logits, the samples' indices, tokens and losses)."""
    indices = task.candidate_order.indices(step) if chosen is None else chosen
    tokens = task.tokens(indices, CPU)
    with torch.no_grad():
        losses = sample_losses(model, tokens)
    logits = judge.logits(step, indices, tokens, losses if judge.reads_losses else None)
    assert (logits.dtype, logits.shape) == (np.float32, (len(indices),))
    return logits, indices, tokens, losses


def test_random_logits_belong_to_seed_and_step(task: Task, model: torch.nn.Module) -> None:
    first, other, later = (judged(RandomJudge(seed), task, model, step)[0] for seed, step in ((1, 3), (2, 3), (1, 4)))
    np.testing.assert_array_equal(first, judged(RandomJudge(1), task, model, 3)[0])
    assert not set(first) & (set(other) | set(later))


def test_lin_upper_is_linear_up_to_the_middle() -> None:
    losses = np.array([1.0, 1.5, 2.0, 3.0, 2.5], np.float32)
    assert lin_upper(losses).tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert lin_upper(np.ones(3, np.float32)).tolist() == [0, 0, 0]


def test_loss_reads_the_trainer_s_losses(task: Task, model: torch.nn.Module) -> None:
    logits, _, _, losses = judged(LossJudge(), task, model)
    assert logits.min() == logits[int(losses.argmin())] == 0
    assert (logits[losses.numpy() > float(losses.max() + losses.min()) / 2] == 1).all()


def test_rho_is_the_trainer_s_loss_minus_the_holdout_model_s(task: Task, model: torch.nn.Module) -> None:
    holdout = np.random.default_rng(0).normal(size=len(task.train)).astype(np.float32)
    logits, indices, _, losses = judged(ReducibleLossJudge(holdout, Cost()), task, model)
    np.testing.assert_allclose(logits, losses.numpy() - holdout[indices], rtol=1e-6)


def test_similarity_is_the_cosine_of_mean_hidden_states(task: Task, model: torch.nn.Module) -> None:
    judge = SimilarityJudge(model, task, 8)
    logits, _, tokens, _ = judged(judge, task, model)
    with torch.no_grad():  # through the whole model, one sample at a time

        def hidden(row: torch.Tensor) -> np.ndarray:
            states = cast(Any, model)(row[None, :-1], output_hidden_states=True).hidden_states[-1]
            return states[0].double().mean(0).numpy()

        target = np.mean([hidden(row) for row in task.validation_draw(3, 8, CPU)], 0)
        expected = [h @ target / np.linalg.norm(h) / np.linalg.norm(target) for h in (hidden(row) for row in tokens)]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    forward = scoring_flops(count_parameters(model), LENGTH)
    assert judge.cost == Cost(per_sample=forward, per_step=8 * forward)


def test_alignment_is_the_gain_of_a_step_along_the_sample_s_gradient(task: Task) -> None:
    model = build_model("tiny", 300, LENGTH, seed=3).eval()
    before = [p.clone() for p in model.parameters()]
    judge = AlignmentJudge(model, task, 4)
    logits, _, tokens, _ = judged(judge, task, model)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))

    def gradient(rows: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(sample_losses(model, rows).mean(), list(model.parameters()))
        return torch.cat([g.flatten() for g in found]).double()

    target = gradient(task.validation_draw(3, 4, CPU))
    expected = np.array([float(gradient(row[None]) @ target) for row in tokens])
    assert np.corrcoef(logits, expected)[0, 1] > 0.99
    forward = scoring_flops(count_parameters(model), LENGTH)
    assert judge.cost == Cost(per_sample=forward, per_step=training_flops(count_parameters(model), 4 * LENGTH))


def test_alignment_counts_all_alike_where_there_is_nothing_to_tell_them_apart(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("tiny", 300, LENGTH, seed=3).eval()
    judge = AlignmentJudge(model, task, 4)
    for step in range(2):
        assert judged(judge, task, model, step, np.zeros(5, np.int64))[0].tolist() == [0] * 5
    assert caplog.text.count("counts all samples alike") == 1


def test_static_logits_are_those_of_the_samples(task: Task, model: torch.nn.Module) -> None:
    values = np.arange(len(task.train))
    logits, indices, _, _ = judged(StaticJudge(values), task, model)
    assert logits.tolist() == indices.tolist()


# ---- Whose samples are the target's ---------------------------------------------------------------------------------


def shares(task: Task, chosen: np.ndarray) -> dict[str, float]:
    return task.share_by_source(np.flatnonzero(chosen))


def test_the_target_s_samples_are_of_validation_s_sources_or_nearest_to_them(task: Task) -> None:
    assert shares(task, target_samples(task)) == {"noise": 0, "other": 0, "target": 1}  # by n-grams
    renamed = dataclasses.replace(task, val=dataclasses.replace(task.val, sources=("noise", "other", "strange")))
    assert shares(renamed, target_samples(renamed))["target"] == 0
    assert target_samples(renamed).sum() == 180
    assert target_samples(task, ("noise",)).sum() == 60


def test_an_unknown_source_is_one_sentence(task: Task) -> None:
    with pytest.raises(InvalidArgument, match=r"--oracle-source is 'prose', but .* of noise, other, target"):
        target_samples(task, ("other", "prose"))


# ---- Small models ---------------------------------------------------------------------------------------------------


def test_the_tuned_copy_knows_validation_better_and_comes_from_the_cache(
    task: Task, reference: RunReference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = ReferenceConfig(steps=40, lr=4e-3, warmup_steps=2)
    reports: list[str] = []
    made = [
        tuned_model(task, reference, CPU, lambda *report: reports.append(report[2]), cache_dir=tmp_path, recipe=recipe)
        for _ in range(2)
    ]
    assert len(reports) == 4  # of one tuning
    pool = pool_model(reference)
    assert (pool.parameters, pool.trained_flops) == (reference.parameters, reference.trained_flops)
    assert made[0].trained_flops == training_flops(reference.parameters, 40 * 32 * LENGTH)

    before, *after = (pool_losses(small, task.train.tokens, CPU) for small in (pool, *made))
    np.testing.assert_array_equal(*after)
    difference = before - after[0]
    by_source = [difference[task.train.source_index == index].mean() for index in range(3)]
    assert by_source[2] > 0 > max(by_source[:2])
    with torch.no_grad():
        expected = sample_losses(made[0].model, task.tokens(np.arange(5), CPU))
    np.testing.assert_allclose(after[0][:5], expected, rtol=1e-5)

    (folder,) = tmp_path.iterdir()
    (folder / "model.safetensors").write_bytes(b"")
    again = tuned_model(task, reference, CPU, None, cache_dir=tmp_path, recipe=recipe)
    assert "the cached tuned model is damaged" in caplog.text
    np.testing.assert_array_equal(pool_losses(again, task.train.tokens, CPU), after[0])


def test_a_reference_of_the_service_alone_is_one_sentence(task: Task, reference: RunReference) -> None:
    remote = dataclasses.replace(reference, files=None, name="shared")
    with pytest.raises(InvalidArgument, match=r"--reference shared is the service's, but .* name a folder"):
        tuned_model(task, remote, CPU, None)


# ---- What is done with logits ---------------------------------------------------------------------------------------


def test_those_with_the_highest_weights_are_kept_and_put_on_record(
    task: Task, model: torch.nn.Module, tmp_path: Path
) -> None:
    judge = StaticJudge((task.train.source_index == 2).astype(np.float32), Cost(per_new_sample=5))
    sharpness = Sharpness(temperature=0.05, min_effective_share=0.05)
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        chooser = JudgedChooser(judge, sharpness, task, model, recorder, KEEP)
        choices = [chooser.choose(step) for step in range(STEPS)]
    for step, choice in enumerate(choices):
        assert choice.drawn.tolist() == task.candidate_order.indices(step).tolist()
        assert len(set(choice.indices)) == KEEP
        of_target = int((task.train.source_index[choice.drawn] == 2).sum())
        assert task.share_by_source(choice.indices)["target"] * KEEP == min(KEEP, of_target)
    different = len(np.unique([choice.drawn for choice in choices]))
    assert chooser.flops(STEPS) == 5 * different
    assert chooser.flops(10_000) == 5 * len(task.train)
    never = StaticJudge(np.zeros(0))  # has no logit for any sample
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        again = JudgedChooser(never, sharpness, task, model, recorder, KEEP)
        for step, choice in enumerate(choices):
            np.testing.assert_array_equal(again.choose(step).indices, choice.indices)


def test_at_temperature_0_the_best_are_kept_as_they_were_drawn(
    task: Task, model: torch.nn.Module, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=len(task.train))
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        chooser = JudgedChooser(StaticJudge(values), Sharpness(0.0, 0.1), task, model, recorder, KEEP)
        choice = chooser.choose(0)
    best = set(sorted(choice.drawn, key=lambda i: -values[i])[:KEEP])
    assert choice.indices.tolist() == [i for i in choice.drawn if i in best]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_in_a_warm_up_a_judge_does_not_choose_all(
    task: Task, model: torch.nn.Module, tmp_path: Path, temperature: float
) -> None:
    values = np.random.default_rng(0).normal(size=len(task.train))
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        judge, sharpness = StaticJudge(values), Sharpness(temperature, 0.1)
        chooser = JudgedChooser(judge, sharpness, task, model, recorder, KEEP, warm_up=2)
        choices = [chooser.choose(step) for step in range(3)]
    assert [choice.probes for choice in choices] == [evenly_in_warm_up(step, KEEP, 2) for step in range(3)]
    assert choices[0].probes > choices[1].probes > choices[2].probes == 0
    assert all(len(set(choice.indices)) == KEEP for choice in choices)


def test_losses_of_candidates_cost_a_forward_pass(task: Task, model: torch.nn.Module, tmp_path: Path) -> None:
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        chooser = JudgedChooser(LossJudge(), Sharpness(0.5, 0.1), task, model, recorder, KEEP)
        chooser.choose(0)
    assert chooser.flops(3) == 3 * CANDIDATES * scoring_flops(count_parameters(model), LENGTH)


def test_the_trainer_s_passes_are_those_that_it_trains_with(task: Task, model: torch.nn.Module, tmp_path: Path) -> None:
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    judge = LossJudge()
    with Recorder(tmp_path / "record", KEEP, CANDIDATES) as recorder:
        JudgedChooser(judge, Sharpness(0.0, 0.1), task, model, recorder, KEEP, bf16).choose(0)
        kept = recorder.get(0)
    tokens = task.tokens(task.candidate_order.indices(0), CPU)
    with torch.no_grad(), bf16():
        losses = torch.cat([sample_losses(model, part) for part in torch.split(tokens, KEEP)])
    best = np.argsort(-judge.logits(0, np.arange(CANDIDATES), tokens, losses), kind="stable")[:KEEP]
    assert kept is not None
    assert kept.kept.tolist() == sorted(best)
    with Recorder(tmp_path / "weights", KEEP, KEEP) as recorder:
        for one, reads in ((judge, True), (RandomJudge(1), False)):
            assert JudgedWeigher(one, Sharpness(0.5, 0.6), task, recorder).reads_losses == reads


def test_random_weights_are_as_uneven_as_the_guard_lets_them(
    task: Task, model: torch.nn.Module, tmp_path: Path
) -> None:
    sharpness = Sharpness(temperature=0.5, min_effective_share=0.6)
    with Recorder(tmp_path / "record", KEEP, KEEP) as recorder:
        weigher = JudgedWeigher(RandomJudge(1), sharpness, task, recorder)
        for step in range(STEPS):
            tokens = task.tokens(task.order.indices(step), CPU)
            said = weigher.weigh(step, token_losses(model, tokens), tokens)
            assert said.values.sum() ** 2 / (said.values**2).sum() == pytest.approx(0.6 * KEEP, rel=1e-3)
            assert said.values.mean() == pytest.approx(1, abs=1e-5)
        assert weigher.recorded(STEPS).shape == (STEPS, KEEP)
        np.testing.assert_array_equal(weigher.recorded(STEPS)[-1], said.values)


def test_labelled_batches_hold_the_target_alone_each_sample_once_an_epoch(task: Task) -> None:
    chooser = LabelledBatches(task, task.train.source_index == 2, KEEP)
    drawn = np.concatenate([chooser.choose(step).indices for step in range(30)])
    assert set(task.train.source_index[drawn]) == {2}
    assert set(np.bincount(drawn, minlength=240)[task.train.source_index == 2]) == {4}  # 30 x 8 of 60 samples
    with pytest.raises(InvalidArgument, match=r"only 3 training samples .* batch of 8"):
        LabelledBatches(task, np.arange(len(task.train)) < 3, KEEP)
