"""What the tests of token scoring share: messages for jobs with a reference, and the same numbers made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from protos.weighting.v1 import weighting_pb2 as pb
from tests.unit import reference_models as models
from weighting_contract.columns import COLUMNS, batch_columns
from weighting_contract.ngrams import profile_table
from weighting_contract.profile import joined, make_profile
from weighting_contract.rows import padded
from weighting_contract.tensors import from_message, to_message
from weighting_service.reference import Reference

LESSONS = 6
FILES, OTHER_FILES = models.reference(), models.reference(seed=1)

Rows = Sequence[np.ndarray]


def documents(seed: int, count: int = 6) -> list[np.ndarray]:
    """A target of its own for every seed."""
    return models.random_rows(1000 + seed, count)


def documents_message(rows: Rows) -> pb.TargetProfile:
    ids, lengths = joined(rows)
    return pb.TargetProfile(documents=to_message(ids.astype(np.uint16)), lengths=to_message(lengths))


def tokens(rows: Rows) -> pb.Inputs:
    ids, lengths = padded(rows)
    return pb.Inputs(tokens=to_message(ids.astype(np.uint16)), lengths=to_message(lengths))


def opened(stub: Any, job_id: str = "job", *, weighter: str = "w", seed: int = 0, **fields: Any) -> pb.Job:
    """A job of a weighter with opinions, made where it is missing, over the reference "ref", with a seed's target."""
    if weighter not in {w.name for w in stub.ListWeighters(pb.ListWeightersRequest()).weighters}:
        opinionated(stub, weighter)
    stub.PutReference(pb.PutReferenceRequest(name="ref", files=FILES, exist_ok=True))
    request = {"reference": pb.JobReference(name="ref"), "profile": documents_message(documents(seed)), **fields}
    return stub.OpenJob(pb.OpenJobRequest(weighter=weighter, job_id=job_id, **request))


def opinionated(stub: Any, name: str) -> None:
    """A weighter that has been taught LESSONS updates: a fresh one gives every sample the weight 1."""
    head = pb.HeadSpec(min_effective_share=0.1)
    spec = pb.WeighterSpec(
        features=pb.FeatureSpec(names=COLUMNS), head=head, learning=pb.LearningSpec(learning_rate=0.03)
    )
    stub.CreateWeighter(pb.CreateWeighterRequest(name=name, spec=spec))
    stub.OpenJob(pb.OpenJobRequest(weighter=name, job_id=f"teacher-of-{name}"))
    rng = np.random.default_rng(0)
    for step in range(LESSONS):
        features = rng.normal(size=(16, len(COLUMNS))).astype(np.float32)
        taught(stub, step, features, features[:, 0] - features[:, -1], f"teacher-of-{name}")
    stub.CloseJob(pb.CloseJobRequest(job_id=f"teacher-of-{name}"))


def scored(stub: Any, rows: Rows, job_id: str = "job", **fields: Any) -> pb.ScoreResponse:
    request = {"min_position": LESSONS, "return_statistics": True, **fields}
    return stub.Score(pb.ScoreRequest(job_id=job_id, inputs=tokens(rows), **request))


def statistics(response: pb.ScoreResponse) -> np.ndarray:
    return from_message(response.statistics, "statistics")


def weights(response: pb.ScoreResponse) -> np.ndarray:
    return from_message(response.weights, "weights")


def by_hand(reference: Reference, rows: Rows, names: Sequence[str], target: Rows) -> np.ndarray:
    """[B, F] the columns of a batch against a target, by the contract's own formulas."""
    ids, lengths = padded(rows)
    columns = batch_columns(
        reference.raw_statistics(rows),
        tuple(names),
        tokens=torch.from_numpy(ids),
        mask=torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None],
        table=profile_table(make_profile(target, reference.ngram_counts).log_ratios),
    )
    return columns.numpy()


def taught(
    stub: Any, step: int, features: np.ndarray, cotangent: np.ndarray, job_id: str = "job", **fields: Any
) -> pb.MetaUpdateResponse:
    return stub.MetaUpdate(
        pb.MetaUpdateRequest(
            job_id=job_id,
            step=step,
            inputs=pb.Inputs(features=to_message(features)),
            cotangent=to_message(cotangent.astype(np.float32)),
            **fields,
        )
    )
