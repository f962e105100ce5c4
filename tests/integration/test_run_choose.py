"""How `run` chooses and teaches through a service that fails as told: exact by its records, without needless waits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from scripted_service import ScriptedServer, abort

from trainer_client import Limits, Timeouts, connect
from trainer_client.cadence import Cadence
from trainer_client.run.choose import Selected
from trainer_client.run.config import RunConfig
from trainer_client.run.data import BatchOrder, Samples
from trainer_client.run.deliver import deliver
from trainer_client.run.recorder import Recorder
from trainer_client.run.task import Task
from trainer_client.run.teach import MetaBatch
from trainer_client.run.tokenizer import train_tokenizer

PATIENT = Timeouts(score_s=20, meta_update_s=20, admin_s=20, close_s=20)
SHORT = Timeouts(score_s=0.3, meta_update_s=0.3, admin_s=20, close_s=0.3)
NO_TRIALS = Limits(breaker_period_s=1000, breaker_max_period_s=1000, heartbeat_s=1000)
COTANGENT = np.array([0.1, -0.1], np.float32)


def small_task(tokens: np.ndarray | None = None) -> Task:
    """Samples (by default 40, of 5 tokens), drawn by fours, and by eights where they are candidates."""
    if tokens is None:
        tokens = np.arange(1, 201).reshape(40, 5).astype(np.uint16)
    samples = Samples(tokens, np.zeros(len(tokens), np.int64), ("pool",))
    orders = [BatchOrder(samples, size, seed=1) for size in (4, 8)]
    return Task(train_tokenizer(["some text"], 300), samples, samples, samples, *orders, torch.zeros(300), seed=1)


def test_a_step_without_an_answer_teaches_nothing_when_it_is_trained_again_either(
    server: ScriptedServer, tmp_path: Path
) -> None:
    task = small_task()
    config = RunConfig(steps=6, batch_size=4, candidates=2, probes=1, ahead=1, out=str(tmp_path))

    def fails_once(request: Any, context: grpc.ServicerContext) -> None:
        if request.step == 1:
            abort(grpc.StatusCode.INVALID_ARGUMENT, "no")(request, context)

    server.service.before["Score"] = fails_once
    runs = []
    for last_step in (-1, 5):  # the second time everything is in the weighter's log
        server.service.taught["one"] = (last_step, 5 if last_step >= 0 else 0)
        client = connect(server.url, timeouts=PATIENT, limits=NO_TRIALS)
        with client, client.open_job("one") as job, Recorder(tmp_path / "record", 4, 8) as recorder:
            chooser, steps = Selected(job, recorder, config, task, Cadence()), []
            for step in range(6):
                choice = chooser.choose(step)
                chooser.look_ahead(step)
                nothing = torch.zeros(0)
                taught = MetaBatch(
                    "", step, False, nothing, nothing, np.zeros(2, np.bool_), torch.from_numpy(COTANGENT)
                )
                steps.append((choice.indices.tolist(), choice.metrics, choice.computed, chooser.learn(taught)))
            runs.append(steps)
            assert chooser.computed_again == 0
    assert [learned for _, _, _, learned in runs[0]] == [True, False, True, True, True, True]
    assert [metrics["staleness"] for _, metrics, _, _ in runs[0]] == [0, 1, 0, 1, 1, 1]
    # It doesn't say what it computed, as older services: all candidates, in all steps that it answered.
    assert [computed for _, _, computed, _ in runs[0]] == [8, 0, 8, 8, 8, 8]
    assert runs[0] == runs[1]
    assert server.service.calls["MetaUpdate"] == 5


def test_what_lies_in_the_pool_many_times_is_trained_on_less(server: ScriptedServer, tmp_path: Path) -> None:
    tokens = np.arange(1, 251).reshape(50, 5).astype(np.uint16)
    tokens[40:] = tokens[40]  # ten times the same among forty others
    task, steps = small_task(tokens), 200
    times = {}
    for wear in (0.0, RunConfig.wear):
        config = RunConfig(
            steps=steps,
            batch_size=4,
            candidates=2,
            probes=1,
            select_warmup=0,
            ahead=2,
            wear=wear,
            out=str(tmp_path / f"{wear}"),
        )
        with (
            connect(server.url, timeouts=PATIENT) as client,
            client.open_job() as job,
            Recorder(tmp_path / f"{wear}", 4, 8) as recorder,
        ):
            chooser = Selected(job, recorder, config, task, Cadence())
            kept = []
            for step in range(steps):
                kept.append(chooser.choose(step).indices)
                chooser.look_ahead(step)
        times[wear] = int((np.concatenate(kept) >= 40).sum())
    assert times[0] > steps * 4 * 10 / 50
    assert times[RunConfig.wear] < 0.6 * times[0]


@pytest.mark.parametrize("fails", [True, False])
def test_delivering_ends_with_the_last_update_or_with_the_service(server: ScriptedServer, fails: bool) -> None:
    if fails:
        server.service.before["MetaUpdate"] = server.service.hang
    with connect(server.url, timeouts=SHORT, limits=NO_TRIALS) as client, client.open_job() as job:
        job.meta_update(COTANGENT, np.ones((2, 2), np.float32))
        deliver(job, math.inf)
        assert (job.away, job.counters.updates_acknowledged) == (fails, not fails)
