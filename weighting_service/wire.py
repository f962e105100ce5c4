"""Protobuf messages <-> domain values. Knows no use case."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import WeighterSpec
from weighting_contract.tensors import from_message, to_message
from weighting_service.domain import Estimator, LearningStatistics, RawInputs, Role, Scores
from weighting_service.views import (
    JobRequest,
    JobView,
    MetaUpdateRequest,
    ReferenceView,
    TargetProfile,
    WeighterView,
)

ROLES = {pb.ROLE_UNSPECIFIED: Role.LEARN, pb.ROLE_LEARN: Role.LEARN, pb.ROLE_FROZEN: Role.FROZEN}
ESTIMATORS = {
    pb.ESTIMATOR_UNSPECIFIED: Estimator.VJP,
    pb.ESTIMATOR_VJP: Estimator.VJP,
    pb.ESTIMATOR_SCORE_FUNCTION: Estimator.SCORE_FUNCTION,
}


def spec_values(message: pb.WeighterSpec) -> dict[str, Any]:
    """What the message says, as plain values for `WeighterSpec.from_dict`; nothing for what it leaves out."""
    return dict(json_format.MessageToDict(message, preserving_proto_field_name=True))


def spec_to_message(spec: WeighterSpec) -> pb.WeighterSpec:
    return json_format.ParseDict(spec.to_dict(), pb.WeighterSpec())


def role_from_message(value: pb.Role) -> Role:
    if value not in ROLES:
        raise InvalidArgument(f"role is {value}, expected ROLE_LEARN (1) or ROLE_FROZEN (2)")
    return ROLES[value]


def estimator_from_message(value: pb.Estimator) -> Estimator:
    if value not in ESTIMATORS:
        raise InvalidArgument(f"estimator is {value}, expected ESTIMATOR_VJP (1) or ESTIMATOR_SCORE_FUNCTION (2)")
    return ESTIMATORS[value]


def inputs_from_message(message: pb.Inputs) -> RawInputs:
    """The arrays of a batch, views of the message's bytes. Raises InvalidArgument where bytes and shape disagree."""
    given = {
        name: from_message(getattr(message, name), f"inputs.{name}")
        for name in ("features", "hidden", "tokens", "lengths")
        if message.HasField(name)
    }
    return RawInputs(**given, texts=tuple(message.texts) or None)


def job_request_from_message(message: pb.OpenJobRequest) -> JobRequest:
    """What a job asks for. Raises InvalidArgument."""
    return JobRequest(
        message.weighter,
        message.job_id,
        role_from_message(message.role),
        tuple(message.feature_names),
        reference=message.reference.name,
        reference_checksum=message.reference.checksum,
        tokenizer_checksum=message.reference.tokenizer_checksum,
        profile=_profile(message.profile) if message.HasField("profile") else None,
    )


def _profile(message: pb.TargetProfile) -> TargetProfile:
    given = {
        name: from_message(getattr(message, name), f"profile.{name}")
        for name in ("log_ratios", "documents", "lengths")
        if message.HasField(name)
    }
    return TargetProfile(**given, documents_checksum=message.documents_checksum)


def meta_update_from_message(message: pb.MetaUpdateRequest) -> MetaUpdateRequest:
    """A batch and its cotangent. Raises InvalidArgument."""
    if not message.HasField("cotangent"):
        raise InvalidArgument("cotangent is missing, expected floats of [B]")
    return MetaUpdateRequest(
        message.step,
        inputs_from_message(message.inputs),
        from_message(message.cotangent, "cotangent"),
        update_id=message.update_id,
        scored_position=message.scored_position,
        estimator=estimator_from_message(message.estimator),
        probes=from_message(message.probes, "probes") if message.HasField("probes") else None,
        trust_only=message.trust_only,
    )


def scores_to_message(scores: Scores) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        weights=to_message(scores.weights),
        position=scores.position,
        effective_sample_size=scores.effective_sample_size,
        logits=to_message(scores.logits),
        statistics=None if scores.statistics is None else to_message(scores.statistics),
        trust=scores.trust,
        computed_samples=scores.computed_samples,
    )


def weighter_to_message(view: WeighterView) -> pb.Weighter:
    return pb.Weighter(
        name=view.record.name,
        spec=spec_to_message(view.record.spec),
        position=view.position,
        applied_position=view.applied_position,
        parameters=view.parameters,
        jobs_open=view.jobs_open,
        learning=_learning(view.learning, view.duplicates, view.refused),
        created_unix_ms=view.record.created_unix_ms,
        initial=view.record.initial,
        shared_with=view.record.shared_with,
        snapshot_positions=view.snapshot_positions,
    )


def _learning(learning: LearningStatistics, duplicates: int, refused: int) -> pb.LearningStatistics:
    values = {name: value for name, value in vars(learning).items() if name != "jobs"}
    jobs = {job_id: pb.JobStatistics(**vars(job)) for job_id, job in learning.jobs.items()}
    return pb.LearningStatistics(**values, duplicates=duplicates, refused=refused, jobs=jobs)


def job_to_message(view: JobView) -> pb.Job:
    return pb.Job(
        job_id=view.record.job_id,
        weighter=view.weighter,
        role=pb.ROLE_FROZEN if view.record.role is Role.FROZEN else pb.ROLE_LEARN,
        open=view.record.open,
        resumed=view.resumed,
        position=view.position,
        last_step=view.last_step,
        last_position=view.last_position,
        spec=spec_to_message(view.spec),
        reference=view.record.reference,
        reference_checksum=view.record.reference_checksum,
        documents_checksum=view.record.documents_checksum,
        quarantined=view.record.quarantined,
    )


def reference_to_message(view: ReferenceView) -> pb.Reference:
    return pb.Reference(
        name=view.name,
        **vars(view.info),
        ngram_buckets=view.ngram_buckets,
        loaded=view.loaded,
        files=dict(view.files),
    )
