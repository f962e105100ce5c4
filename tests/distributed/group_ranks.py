"""What `test_group_job.py` has every rank do: each check in turn, its outcome into a file of the rank.

python -m torch.distributed.run --standalone --nproc-per-node 3 -m tests.distributed.group_ranks FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from tests.distributed.launch import checks_of, run_checks
from tests.integration.small_job import write_data
from trainer_client import connect
from trainer_client.client import Client
from trainer_client.group_job import GroupJob, group_job
from trainer_client.ranks import Elsewhere, Ranks
from trainer_client.run.choose import AsDrawn
from trainer_client.run.config import parse
from trainer_client.run.loop import Loop
from trainer_client.run.models import build_model
from trainer_client.run.progress import JobProgress
from trainer_client.run.task import build_task
from trainer_client.run.weigh import Even
from weighting_contract.errors import FailedPrecondition, InvalidArgument

ROWS = [2, 5, 1]  # of each rank
FEATURES = torch.randn(sum(ROWS), 3, generator=torch.Generator().manual_seed(0))
COTANGENT = torch.linspace(-1, 1, sum(ROWS))
SPEC: dict[str, Any] = {"features": {"names": ["a", "b", "c"]}}


def ranks() -> Ranks:
    return Ranks.current()


def mine(rows: torch.Tensor) -> torch.Tensor:
    return rows.split(ROWS)[ranks().rank]


@contextmanager
def jobs(name: str = "j", **options: Any) -> Iterator[tuple[GroupJob, Client | None]]:
    """A job of all ranks, and on the first one the client."""
    if not ranks().is_first:
        yield group_job(None), None
        return
    with connect("embedded", **options) as client:
        yield group_job(client.open_job(name, weighter="default", spec=SPEC)), client


def raised(first: type[Exception] = InvalidArgument, match: str = "") -> Any:
    """On the first rank the error itself, on the others `Elsewhere` with the same words."""
    return pytest.raises(first if ranks().is_first else Elsewhere, match=match)


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def check_all_get_what_the_first_rank_has() -> None:
    value = {"a": np.arange(3), "b": (1, "two")}
    got = ranks().from_first(lambda: value if ranks().is_first else {})
    np.testing.assert_array_equal(got["a"], value["a"])
    assert got["b"] == value["b"]
    assert ranks().everyone(ranks().rank * "x") == ["", "x", "xx"]
    assert [ranks().any(ranks().rank == r) for r in (1, 7)] == [True, False]


def check_rows_of_all_ranks_in_their_order() -> None:
    for rows in (FEATURES, FEATURES.half(), (FEATURES > 0), FEATURES.bfloat16(), torch.arange(8)):
        assert torch.equal(ranks().all_rows(mine(rows)), rows)
        gathered = ranks().gather_rows(mine(rows))
        assert (gathered is not None) == ranks().is_first
        assert gathered is None or torch.equal(gathered, rows)
    assert torch.equal(FEATURES[ranks().my_rows(8)], FEATURES[[slice(0, 2), slice(2, 5), slice(5, 8)][ranks().rank]])


def check_rows_that_differ_are_refused() -> None:
    with raised(match=r"torch.float32 of \[3\] on rank 0 and torch.float32 of \[2\] on rank 1"):
        ranks().all_rows(FEATURES[:, : 2 if ranks().rank == 1 else 3])


def check_a_mistake_of_the_first_rank_is_one_of_all() -> None:
    def fail() -> None:
        raise FailedPrecondition("not now")

    with raised(FailedPrecondition, "^not now$"):
        ranks().from_first(fail)
    with raised(TypeError, "a object can't be sent"):
        ranks().from_first(object)
    with raised(FileNotFoundError, "nowhere"):
        ranks().from_first(lambda: Path("/nowhere").read_bytes())


def check_a_mistake_of_another_rank_is_told_by_the_first() -> None:
    def fail() -> None:
        if ranks().rank == 2:
            raise FailedPrecondition("not here")

    with raised(FailedPrecondition, "^rank 2: not here$"):
        ranks().together(fail)
    with raised(InvalidArgument, "disagree on the step: it is 4 on rank 0 and 5 on rank 1"):
        ranks().all_equal("the step", 5 if ranks().rank == 1 else 4)
    ranks().all_equal("the step", 4)


def check_a_group_of_some_ranks() -> None:
    group = dist.new_group([1, 2])
    if ranks().rank == 0:
        return
    some = Ranks.current(group)
    assert (some.rank, some.world) == (ranks().rank - 1, 2)
    assert some.from_first(lambda: ranks().rank) == 1
    gathered = some.gather_rows(torch.tensor([ranks().rank]))
    assert (gathered is None) == (ranks().rank == 2)


# ---- The job of a group ---------------------------------------------------------------------------------------------


def check_weights_are_relative_over_all_ranks() -> None:
    with jobs() as (job, client):
        for step in range(3):
            scores = job.score(mine(FEATURES), step)
            assert not scores.fallback
            whole = ranks().all_rows(scores.weights)
            assert float(whole.mean()) == pytest.approx(1, abs=1e-5)
            assert scores.effective_sample_size == pytest.approx(float(whole.sum() ** 2 / (whole**2).sum()), rel=1e-4)
            assert ranks().everyone(scores.position) == [step] * 3
            job.meta_update(mine(COTANGENT), mine(FEATURES), step, probes=mine(torch.ones(8, dtype=torch.bool)))
            assert job.flush(10)
        scores = job.score(mine(FEATURES), 3)
        if client is not None:
            alone = client.open_job("alone", weighter="default")
            assert torch.equal(scores.weights, alone.score(FEATURES, 3).weights[: ROWS[0]])
            taught = client.open_job("twin", weighter="twin", spec=SPEC)
            for step in range(3):
                taught.score(FEATURES, step)
                taught.meta_update(COTANGENT, FEATURES, step, probes=torch.ones(8, dtype=torch.bool))
                assert taught.flush(10)
            assert torch.equal(scores.weights, taught.score(FEATURES, 3).weights[: ROWS[0]])
        assert job.state_dict()["last_step"] == 2
        job.load_state_dict(job.state_dict())
        assert job.counters.scored == (4 if ranks().is_first else 0)


def check_ranks_that_disagree_are_told() -> None:
    with jobs() as (job, _):
        with raised(match="disagree on step: 0 on rank 0, 1 on rank 2"):
            job.score(mine(FEATURES), int(ranks().rank == 2))
        with raised(match=r"columns of a batch: features float32 \[3\] on rank 0, features float32 \[2\] on rank 1"):
            job.score(mine(FEATURES)[:, : 2 if ranks().rank == 1 else 3], 0)
        with raised(match="disagree on step"):
            job.meta_update(mine(COTANGENT), mine(FEATURES), ranks().rank)
        assert not job.score(mine(FEATURES), 0).fallback  # and all go on


def check_without_a_service_all_are_uniform() -> None:
    job = None
    if ranks().is_first:
        job = connect("grpc://127.0.0.1:9").open_job("away", weighter="default")
    with group_job(job) as grouped:
        for step in range(2):
            scores = grouped.score(mine(FEATURES), step)
            assert scores.fallback
            assert torch.equal(scores.weights, torch.ones(ROWS[ranks().rank]))
            assert scores.effective_sample_size == 8
            grouped.meta_update(mine(COTANGENT), mine(FEATURES), step)


def check_what_one_rank_cannot_send_makes_all_uniform() -> None:
    with jobs() as (job, _):
        features: Any = "no features" if ranks().rank == 1 else mine(FEATURES)
        scores = job.score(features, 0)
        assert scores.fallback
        assert (np.asarray(scores.weights) == 1).all()
        nan = mine(FEATURES) * (float("nan") if ranks().rank == 2 else 1.0)
        assert job.score(nan, 1).fallback
        assert not job.score(mine(FEATURES), 2).fallback


def check_with_on_failure_raise_all_raise() -> None:
    with (
        jobs(on_failure="raise") as (job, _),
        raised(InvalidArgument, "features"),
    ):
        job.score(mine(FEATURES) * (float("nan") if ranks().rank == 2 else 1.0), 0)


def check_a_job_on_the_wrong_rank() -> None:
    with raised(InvalidArgument, "^there is no job, expected one on the first rank$"):
        group_job(None)


# ---- A training loop ------------------------------------------------------------------------------------------------


def check_a_loss_that_is_not_finite_on_one_rank() -> None:
    folder = Path(sys.argv[1])
    flags = ranks().from_first(lambda: write_data(folder))
    config = parse([*flags, "--method", "uniform", "--checkpoint-every", "2", "--out", str(folder / "out")])
    task = build_task(config)
    model = build_model(config.model, task.tokenizer.vocab_size, config.seq_len, config.seed)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    loop = Loop(config, task, model, AsDrawn(task.order), Even(config.batch_size), None, run, ranks=ranks())

    def diverge(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if loop.step == 3 and ranks().rank == 1:
            output.logits[0] = float("nan")

    model.register_forward_hook(diverge)
    with raised(InvalidArgument, "^the loss of sample 2 of step 4 is nan on rank 1, expected a finite number"):
        loop.train(JobProgress(Console(quiet=True), config.steps, config.batch_size), lambda: False)
    assert loop.step == 3
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-00000002.safetensors"]


CHECKS = checks_of(globals())

if __name__ == "__main__":
    run_checks(CHECKS)
