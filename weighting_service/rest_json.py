"""The JSON of the REST API: request bodies as models, answers as dicts, in the contract's words. Knows no route."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from weighting_contract.errors import InvalidArgument
from weighting_contract.profile import joined
from weighting_service.domain import Estimator, LearningStatistics, RawInputs, Role, Scores
from weighting_service.views import (
    JobRequest,
    JobView,
    MetaUpdateRequest,
    ReferenceView,
    TargetProfile,
    Taught,
    TextScores,
    WeighterView,
)

INT64 = 2**63 - 1

Rows = Annotated[list[list[float]], Field(description="one row a sample")]


# ---- Requests -------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """Base of the request bodies: unknown fields are errors, not silence."""

    model_config = ConfigDict(extra="forbid")


class InputsBody(Body):
    """The samples of one batch; give what the weighter's spec reads, or tokens or texts for the job's reference."""

    features: Rows | None = Field(None, description="[B, F] columns in the order of feature_names or of the spec")
    hidden: Rows | None = Field(None, description="[B, H] pooled hidden states")
    tokens: list[list[int]] | None = Field(None, description="B lists of token ids, of any lengths")
    texts: list[str] | None = Field(
        None, description="B texts, for weighters with a tokenizer and jobs with a reference"
    )

    def raw(self) -> RawInputs:
        tokens, lengths = _pad(self.tokens)
        texts = None if self.texts is None else tuple(self.texts)
        return RawInputs(_floats(self.features, "features"), _floats(self.hidden, "hidden"), tokens, lengths, texts)


class CreateWeighterBody(Body):
    name: str = Field(examples=["default"])
    spec: dict[str, Any] = Field({}, examples=[{"features": {"names": ["loss", "length"]}}])
    exist_ok: bool = False
    initial: str = Field("", description='"pretaught": parameters of the weighter that comes with the service')
    files: dict[str, str] = Field({}, description="of an export by name, base64, in place of initial: its parameters")

    def contents(self) -> dict[str, bytes]:
        return {name: _decoded(content, f"files.{name}") for name, content in self.files.items()}


class ShareWeighterBody(Body):
    tenants: list[str] = Field(description='beside its own; "*": all; none: its own alone')


class RollbackWeighterBody(Body):
    to_position: int = Field(ge=0, le=INT64, description="of a snapshot: one of the weighter's snapshot_positions")
    expected_position: int | None = Field(None, ge=0, le=INT64, description="of the log's end; another one is refused")


class PutReferenceBody(Body):
    files: dict[str, str] = Field(description="the files of a reference by name, base64")
    exist_ok: bool = False

    def contents(self) -> dict[str, bytes]:
        return {name: _decoded(content, f"files.{name}") for name, content in self.files.items()}


class ReferenceBody(Body):
    """The reference that makes the job's features of its tokens."""

    name: str = ""
    checksum: str = Field("", description="expected; empty: whichever has that name")
    tokenizer_checksum: str = Field("", description="of the job's tokenizer; empty: not known")


class ProfileBody(Body):
    """The job's target: log_ratios or documents."""

    log_ratios: list[float] | None = Field(None, description="[buckets] hashed n-gram log ratios, as float16")
    documents: list[list[int]] | None = Field(None, description="token ids of each validation document")
    documents_checksum: str = Field("", description="of the documents that log_ratios were made of")

    def profile(self) -> TargetProfile:
        ratios = None
        if self.log_ratios is not None:
            with np.errstate(over="ignore"):
                ratios = np.array(self.log_ratios, np.float16)
        documents = lengths = None
        if self.documents is not None:
            try:
                documents, lengths = joined(self.documents)
            except OverflowError as exc:
                raise InvalidArgument("profile.documents holds an id that is no 64-bit integer") from exc
        return TargetProfile(ratios, documents, lengths, self.documents_checksum)


class OpenJobBody(Body):
    weighter: str
    job_id: str = Field("", description="empty: the service chooses; a known id resumes that job")
    role: Role = Role.LEARN
    feature_names: list[str] = Field([], description="the job's columns in its order; empty: those of the spec")
    reference: ReferenceBody | None = None
    profile: ProfileBody | None = None

    def request(self) -> JobRequest:
        reference = self.reference
        return JobRequest(
            self.weighter,
            self.job_id,
            self.role,
            tuple(self.feature_names),
            reference=reference.name if reference else "",
            reference_checksum=reference.checksum if reference else "",
            tokenizer_checksum=reference.tokenizer_checksum if reference else "",
            profile=self.profile.profile() if self.profile else None,
        )


class HeartbeatBody(Body):
    fallback_steps: int = Field(0, ge=0, le=INT64)


class QuarantineJobBody(Body):
    reason: str = Field("", description="shown to the job; empty: ends the quarantine")


class ScoreBody(Body):
    inputs: InputsBody
    step: int = Field(0, ge=0, le=INT64)
    min_position: int = Field(0, ge=0, le=INT64, description="wait until this position is applied")
    min_effective_share: float | None = Field(None, description="in place of the spec's, for these weights")
    return_statistics: bool = Field(False, description="send back what the job's reference gave, to be taught with")


class ScoreOnceBody(Body):
    inputs: InputsBody
    feature_names: list[str] = Field([], description="names of the feature columns in the order sent")


class ScoreTextsBody(Body):
    texts: list[str] = Field(description="the batch that is to be weighted")
    target: list[str] = Field(description="example texts of what the weights should favour")
    weighter: str = Field("", description="empty: the pretaught one of the service, which learns nothing")
    reference: str = Field("", description="empty: the one that comes with the service")


class MetaUpdateBody(Body):
    inputs: InputsBody
    cotangent: list[float] = Field(description="[B] dL_val/dw")
    step: int = Field(ge=0, le=INT64)
    update_id: str = Field("", description="idempotency key within the job; empty: the step")
    scored_position: int = Field(0, ge=0, le=INT64, description="position that the step's weights were scored at")
    estimator: Estimator = Estimator.VJP
    probes: list[Annotated[int, Field(ge=-INT64, le=INT64)]] | None = Field(
        None, description="[B] 1 for samples that were drawn evenly, else 0"
    )
    trust_only: bool = Field(False, description="it counts for the job's trust, nothing is learned; needs two probes")

    def request(self) -> MetaUpdateRequest:
        return MetaUpdateRequest(
            self.step,
            self.inputs.raw(),
            np.array(self.cotangent, np.float64),
            self.update_id,
            self.scored_position,
            self.estimator,
            None if self.probes is None else np.array(self.probes, np.int64),
            self.trust_only,
        )


def _decoded(content: str, field: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidArgument(f"{field} is not base64: {exc}") from exc


def _floats(rows: list[list[float]] | None, field: str) -> np.ndarray | None:
    """[B, F] float64; what does not fit into float32 is found out where all inputs are checked."""
    if rows is None:
        return None
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InvalidArgument(f"{field}[{i}] has {len(row)} columns, but {field}[0] has {len(rows[0])}")
    return np.array(rows, np.float64).reshape(len(rows), len(rows[0]) if rows else 0)


def _pad(rows: list[list[int]] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Rows of any lengths as [B, T] and [B]."""
    if rows is None:
        return None, None
    for i, row in enumerate(rows):
        if not row:
            raise InvalidArgument(f"tokens[{i}] has no tokens, expected at least one")
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), max([1, *lengths])), np.int64)
    for i, row in enumerate(rows):
        try:
            tokens[i, : len(row)] = row
        except OverflowError as exc:
            raise InvalidArgument(f"tokens[{i}] holds an id that is no 64-bit integer") from exc
    return tokens, lengths


# ---- Answers --------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    code: str = Field(examples=["INVALID_ARGUMENT"])
    message: str
    retry_after_s: float | None = None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


def scores_json(scores: Scores) -> dict[str, Any]:
    values = {
        "weights": scores.weights.tolist(),
        "logits": scores.logits.tolist(),
        "position": scores.position,
        "effective_sample_size": scores.effective_sample_size,
        "trust": scores.trust,
        "computed_samples": scores.computed_samples,
    }
    return values if scores.statistics is None else values | {"statistics": scores.statistics.tolist()}


def text_scores_json(scored: TextScores) -> dict[str, Any]:
    return scores_json(scored.scores) | {"names": list(scored.names)}


def taught_json(taught: Taught) -> dict[str, Any]:
    return dict(vars(taught))


def weighter_json(view: WeighterView) -> dict[str, Any]:
    return {
        "name": view.record.name,
        "spec": view.record.spec.to_dict(),
        "initial": view.record.initial,
        "position": view.position,
        "applied_position": view.applied_position,
        "parameters": view.parameters,
        "jobs_open": view.jobs_open,
        "learning": _learning_json(view.learning) | {"duplicates": view.duplicates, "refused": view.refused},
        "created_unix_ms": view.record.created_unix_ms,
        "shared_with": list(view.record.shared_with),
        "snapshot_positions": list(view.snapshot_positions),
    }


def _learning_json(learning: LearningStatistics) -> dict[str, Any]:
    values = dict(vars(learning))
    return values | {"jobs": {job_id: dict(vars(job)) for job_id, job in learning.jobs.items()}}


def reference_json(view: ReferenceView) -> dict[str, Any]:
    return {
        "name": view.name,
        **vars(view.info),
        "ngram_buckets": view.ngram_buckets,
        "loaded": view.loaded,
        "files": files_json(view.files),
    }


def files_json(files: Any) -> dict[str, str]:
    """Contents by name, base64."""
    return {name: base64.b64encode(content).decode() for name, content in files.items()}


def job_json(view: JobView) -> dict[str, Any]:
    return {
        "job_id": view.record.job_id,
        "weighter": view.weighter,
        "role": view.record.role.value,
        "open": view.record.open,
        "resumed": view.resumed,
        "position": view.position,
        "last_step": view.last_step,
        "last_position": view.last_position,
        "spec": view.spec.to_dict(),
        "reference": view.record.reference,
        "reference_checksum": view.record.reference_checksum,
        "documents_checksum": view.record.documents_checksum,
        "quarantined": view.record.quarantined,
    }
