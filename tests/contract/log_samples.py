"""Weighters, jobs, updates and profiles that the tests of update logs write and look for."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from pathlib import Path

import numpy as np

from weighting_contract.spec import FeatureSpec, HeadSpec, WeighterSpec
from weighting_service.domain import Estimator, Inputs, JobRecord, MetaUpdate, Role, WeighterRecord
from weighting_service.update_log import LogEntry, UpdateLog

UID, OTHER_UID = "a" * 32, "b" * 32
SPEC = WeighterSpec(features=FeatureSpec(names=("loss", "größe")), head=HeadSpec(temperature=0.1 + 0.2), seed=7)
WEIGHTER = WeighterRecord("prose", UID, SPEC, created_unix_ms=1_700_000_000_123)
OTHER = WeighterRecord("code", OTHER_UID, WeighterSpec(features=FeatureSpec(hidden_size=3)), 5, initial="pretaught")
JOB = JobRecord("job-1", UID, Role.LEARN, ("größe", "loss"))
REFERENCE_JOB = JobRecord(
    "job-2",
    UID,
    Role.FROZEN,
    reference="pretaught",
    reference_checksum="1" * 64,
    documents_checksum="2" * 64,
)


def update_of(step: int, job_id: str = "job-1", samples: int = 4) -> MetaUpdate:
    """A different update for every (job, step), the same one each time; of every kind in turn."""
    rng = np.random.default_rng([step, *job_id.encode()])
    return MetaUpdate(
        job_id=job_id,
        update_id=str(step),
        step=step,
        inputs=Inputs(features=rng.standard_normal((samples, 2), np.float32)),
        cotangent=rng.standard_normal(samples, np.float32),
        scored_position=max(0, step - 1),
        estimator=Estimator.SCORE_FUNCTION if step % 2 else Estimator.VJP,
        probes=rng.random(samples) < 0.5 if step % 3 == 0 else None,
        trust_only=step % 6 == 0,
    )


def update_in(entry: LogEntry) -> MetaUpdate:
    assert isinstance(entry.content, MetaUpdate)
    return entry.content


def arrays_of(update: MetaUpdate) -> dict[str, np.ndarray]:
    arrays = {**update.inputs.arrays(), "cotangent": update.cotangent}
    return arrays if update.probes is None else {**arrays, "probes": update.probes}


def assert_same(got: MetaUpdate, expected: MetaUpdate) -> None:
    arrays, wanted = arrays_of(got), arrays_of(expected)
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    scalars = [f.name for f in dataclasses.fields(MetaUpdate) if f.name not in ("inputs", "cotangent", "probes")]
    assert [getattr(got, name) for name in scalars] == [getattr(expected, name) for name in scalars]
    assert got.digest() == expected.digest()


def profile_of(seed: int, buckets: int = 1024) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(buckets).astype(np.float16)


def assert_profile(log: UpdateLog, job_id: str, expected: np.ndarray) -> None:
    profile = log.profile(job_id)
    assert profile is not None
    assert profile.dtype == np.float16
    np.testing.assert_array_equal(profile, expected)


def rows(path: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(statement).fetchall()
