"""What the use cases take and give, as plain data; each transport spells it in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from weighting_contract.reference import ReferenceInfo
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import Estimator, JobRecord, LearningStatistics, RawInputs, Role, Scores, WeighterRecord


@dataclass(frozen=True)
class WeighterView:
    """A weighter as callers see it."""

    record: WeighterRecord
    position: int
    applied_position: int
    parameters: int
    jobs_open: int
    learning: LearningStatistics
    duplicates: int
    refused: int
    snapshot_positions: tuple[int, ...] = ()  # that a rollback can go to; where they were asked for


@dataclass(frozen=True)
class ReferenceView:
    """A reference as callers see it."""

    name: str
    info: ReferenceInfo
    ngram_buckets: int
    loaded: bool
    files: Mapping[str, bytes] = field(default_factory=dict)  # those that were asked for


@dataclass(frozen=True)
class TargetProfile:
    """A job's target: a finished table of log ratios, or the documents to make it of. Give one of them."""

    log_ratios: np.ndarray | None = None  # [buckets] floating
    documents: np.ndarray | None = None  # [tokens] integer ids, end to end
    lengths: np.ndarray | None = None  # [documents] integer
    documents_checksum: str = ""  # of what log_ratios were made of


@dataclass(frozen=True)
class JobRequest:
    """What a job is opened with."""

    weighter: str
    job_id: str = ""  # empty: the service chooses; a known id resumes that job
    role: Role = Role.LEARN
    feature_names: tuple[str, ...] = ()  # the job's column order; empty: the spec's
    reference: str = ""  # name; empty: the job sends its features itself
    reference_checksum: str = ""  # expected; empty: whichever has that name
    tokenizer_checksum: str = ""  # of the job's tokenizer; empty: not known
    profile: TargetProfile | None = None


@dataclass(frozen=True)
class JobView:
    """A job as callers see it. Its target profile is never part of it."""

    record: JobRecord
    weighter: str
    spec: WeighterSpec
    resumed: bool
    position: int
    last_step: int
    last_position: int


@dataclass(frozen=True)
class TextScores:
    """What the samples of a batch of texts got, and of what statistics."""

    scores: Scores
    names: tuple[str, ...]  # of the columns of scores.statistics


@dataclass(frozen=True)
class MetaUpdateRequest:
    """A batch and the cotangent that it earned, as a caller sent them."""

    step: int
    raw: RawInputs
    cotangent: np.ndarray
    update_id: str = ""
    scored_position: int = 0
    estimator: Estimator = Estimator.VJP
    probes: np.ndarray | None = None
    trust_only: bool = False


@dataclass(frozen=True)
class Taught:
    """The answer to a meta-update: durable at `position` from now on."""

    position: int
    duplicate: bool
    applied_position: int
