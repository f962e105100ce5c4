"""Values that all layers of the service know; plain data, no I/O, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from weighting_contract.spec import WeighterSpec


class Role(StrEnum):
    LEARN = "learn"
    FROZEN = "frozen"


class Estimator(StrEnum):
    VJP = "vjp"
    SCORE_FUNCTION = "score_function"


@dataclass(frozen=True)
class Inputs:
    """The samples of one batch, B rows each; what is absent is None. Texts are tokenised before they get here."""

    features: np.ndarray | None = None  # [B, F] float32, columns in the spec's order
    hidden: np.ndarray | None = None  # [B, H] float32
    tokens: np.ndarray | None = None  # [B, T] int64, padded on the right
    lengths: np.ndarray | None = None  # [B] int64, real tokens of each row; with tokens always there

    def arrays(self) -> dict[str, np.ndarray]:
        """The parts that are present, by name, in a fixed order."""
        named = (
            ("features", self.features),
            ("hidden", self.hidden),
            ("tokens", self.tokens),
            ("lengths", self.lengths),
        )
        return {name: array for name, array in named if array is not None}

    @property
    def samples(self) -> int:
        return len(next(iter(self.arrays().values())))

    @property
    def token_count(self) -> int:
        """Padded tokens: what the encoder's forward pass costs."""
        return 0 if self.tokens is None else int(self.tokens.size)


@dataclass(frozen=True)
class RawInputs:
    """The samples of one batch as a caller sent them; `inputs.check_inputs` makes Inputs of them."""

    features: np.ndarray | None = None
    hidden: np.ndarray | None = None
    tokens: np.ndarray | None = None
    lengths: np.ndarray | None = None
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class WeighterRecord:
    name: str
    uid: str  # hex; keys the log and the snapshots, so that a name can be used again after a deletion
    spec: WeighterSpec
    created_unix_ms: int


@dataclass(frozen=True)
class JobRecord:
    job_id: str
    weighter_uid: str
    role: Role
    feature_names: tuple[str, ...] = ()  # the job's column order; empty: the spec's
    open: bool = True


@dataclass(frozen=True)
class MetaUpdate:
    """One entry of a weighter's update log: a batch and the cotangent that it earned."""

    job_id: str
    update_id: str  # idempotency key within the job
    step: int
    inputs: Inputs
    cotangent: np.ndarray  # [B] float32, dL_val/dw
    scored_position: int
    estimator: Estimator = Estimator.VJP

    def digest(self) -> bytes:
        """SHA-256 of what is taught: equal exactly for a true retry. The scored position is not part of it."""
        h = hashlib.sha256()
        for name, array in {**self.inputs.arrays(), "cotangent": self.cotangent}.items():
            h.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            h.update(np.ascontiguousarray(array).tobytes())
        h.update(f"{self.job_id};{self.step};{self.estimator}".encode())
        return h.digest()


@dataclass(frozen=True)
class Scores:
    """What Score returns for one batch of B samples."""

    weights: np.ndarray  # [B] float32, mean 1
    logits: np.ndarray  # [B] float32, before temperature and guard
    position: int
    effective_sample_size: float  # (sum w)^2 / sum w^2, in samples


@dataclass(frozen=True)
class JobStatistics:
    updates_applied: int = 0
    cotangent_rms: float = 0.0
    signal_correlation: float = 0.0


@dataclass(frozen=True)
class LearningStatistics:
    """What the last applied update left behind; part of the state, equal on every replica at equal positions."""

    updates_applied: int = 0
    updates_skipped: int = 0
    gradient_norm: float = 0.0
    logit_std: float = 0.0
    effective_share: float = 0.0
    signal_correlation: float = 0.0
    jobs: dict[str, JobStatistics] = field(default_factory=dict)
