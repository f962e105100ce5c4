"""The learning rate's course, fixed evaluation samples, draws that depend on (seed, step) alone, and likeness."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trainer_client.run.choose import MostAlike
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Samples
from trainer_client.run.evaluate import fixed_subset, mean_loss
from trainer_client.run.models import build_model
from trainer_client.run.optimiser import learning_rate
from trainer_client.run.task import Task
from trainer_client.run.tokenizer import train_tokenizer
from weighting_contract.ngrams import count_ngrams

CPU = torch.device("cpu")


def test_learning_rate_warms_up_and_stays():
    config = RunConfig(steps=100, warmup_steps=4, lr=1e-3)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert set(rates[4:]) == {1e-3}


def test_cosine_ends_at_a_tenth():
    config = RunConfig(steps=101, warmup_steps=0, lr=1e-3, lr_schedule="cosine")
    rates = [learning_rate(config, step) for step in range(101)]
    assert (rates[0], rates[50], rates[100]) == pytest.approx((1e-3, 0.55e-3, 1e-4))
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (3, 3)])
def test_short_runs_have_positive_rates(steps, warmup):
    for schedule in ("constant", "cosine"):
        config = RunConfig(steps=steps, warmup_steps=warmup, lr_schedule=schedule)
        assert all(0 < learning_rate(config, step) <= config.lr for step in range(steps))


def test_fixed_subset_is_spread_over_all():
    tokens = np.arange(10)[:, None]
    assert fixed_subset(tokens, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert fixed_subset(tokens, 10) is tokens


def test_mean_loss_is_the_mean_over_tokens_whatever_the_batches():
    model = build_model("nano", 300, 8, seed=0)
    tokens = np.random.default_rng(0).integers(0, 300, (7, 9)).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        log_p = model.double()(ids[:, :-1]).logits.log_softmax(-1)
    expected = -log_p.gather(-1, ids[:, 1:, None]).mean()
    for batch_size in (1, 3, 7, 20):
        assert mean_loss(model, tokens, batch_size, CPU) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture
def task() -> Task:
    tokens = np.arange(40 * 5).reshape(40, 5).astype(np.uint16)
    train = Samples(tokens, np.arange(40) % 3, ("a", "b", "c"))
    val = Samples(tokens[:6], np.zeros(6, np.int64), ("a",))
    tokenizer = train_tokenizer(["some text"], 300)
    order, candidates = BatchOrder(train, 8, seed=1), BatchOrder(train, 24, seed=1)
    return Task(tokenizer, train, val, val, order, candidates, torch.zeros(200), seed=1)


def test_validation_draws_belong_to_seed_and_step(task):
    first = task.validation_draw(3, 4, CPU)
    assert torch.equal(first, task.validation_draw(3, 4, CPU))
    assert len({tuple(row.tolist()) for row in first}) == 4  # without repeats
    others = [task.validation_draw(4, 4, CPU), task.validation_draw(3, 4, CPU, draw=1)]
    assert not any(torch.equal(first, other) for other in others)
    assert len(task.validation_draw(3, 50, CPU)) == 6  # there are no more


def test_a_profile_is_made_of_other_documents_than_cotangents_are_towards(task):
    tokens = np.arange(26 * 5).reshape(26, 5).astype(np.uint16)
    documents = np.repeat(np.arange(13), 2)
    val = Samples(tokens, np.zeros(26, np.int64), ("a",), documents)
    split = dataclasses.replace(task, val=val)
    drawn = split.validation_draw(0, 50, CPU, held_out=True)[:, 0].tolist()
    assert sorted(drawn) == [5 * row for row in (10, 11, 22, 23)]  # documents 5 and 11 of 0 to 12
    profile = split.profile_tokens[:, 0].tolist()
    assert sorted(drawn + profile) == tokens[:, 0].tolist()


def test_of_few_documents_the_last_quarter_of_each_is_held_out(task):
    val = Samples(np.arange(10)[:, None].astype(np.uint16), np.zeros(10, np.int64), ("a",), np.repeat([0, 1], [8, 2]))
    split = dataclasses.replace(task, val=val)
    assert split.validation_draw(0, 50, CPU, held_out=True)[:, 0].sort().values.tolist() == [6, 7]
    one = dataclasses.replace(
        task, val=dataclasses.replace(val, tokens=val.tokens[:1], document_index=np.zeros(1, int))
    )
    assert len(one.profile_tokens) == len(one.validation_draw(0, 50, CPU, held_out=True)) == 1  # better than none


def test_pause_draws_belong_to_seed_step_and_draw(task):
    draws = [task.pause_draw(5, 8, CPU, draw) for draw in range(3)]
    assert torch.equal(draws[0], task.pause_draw(5, 8, CPU, 0))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_shares_are_by_source(task):
    for step in range(3):
        indices = task.order.indices(step)
        shares = task.share_by_source(indices)
        assert sum(shares.values()) == pytest.approx(1)
        for index, name in enumerate("abc"):
            assert shares[name] == pytest.approx((task.train.source_index[indices] == index).mean())


def test_the_most_alike_are_those_of_the_highest_log_ratio(task):
    table = task.target_table(task.val.tokens).numpy()

    # A naive reference: every sample's uni- and bigrams one by one, through the counts of single n-grams.
    def mean_ratio(row: np.ndarray) -> float:
        pairs = [row[i : i + 2] for i in range(len(row) - 1)]
        unigrams = [int(np.flatnonzero(count_ngrams([[t]]))[0]) for t in row]
        both = [
            int(b)
            for pair in pairs
            for b in np.flatnonzero(count_ngrams([pair]) - sum(count_ngrams([[t]]) for t in pair))
        ]
        return float(np.mean([table[b] for b in (*unigrams, *both)]))

    chooser = MostAlike(task, 8)
    for step in range(2):
        choice = chooser.choose(step)
        assert choice.drawn.tolist() == task.candidate_order.indices(step).tolist()
        ratios = {i: mean_ratio(task.train.tokens[i]) for i in choice.drawn}
        assert set(choice.indices) <= set(choice.drawn)
        worst_kept = min(ratios[i] for i in choice.indices)
        assert worst_kept >= max(ratios[i] for i in set(choice.drawn) - set(choice.indices)) - 1e-5
        assert len(choice.indices) == 8
