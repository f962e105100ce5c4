"""Values that all layers of the service know; plain data, no I/O, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from weighting_contract.spec import WeighterSpec

EVERYONE = "*"  # among the tenants that a weighter is shared with: all of them


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
    initial: str = ""  # what its parameters started from: fresh ones, "pretaught", or `ExportInfo.initial`
    shared_with: tuple[str, ...] = ()  # tenants that may use it beside its own, or EVERYONE


@dataclass(frozen=True)
class JobRecord:
    job_id: str
    weighter_uid: str
    role: Role
    feature_names: tuple[str, ...] = ()  # the job's column order; empty: the spec's
    open: bool = True
    reference: str = ""  # name of the reference that turns its tokens into statistics
    reference_checksum: str = ""
    documents_checksum: str = ""  # of the target profile, which the log keeps beside the record; empty: it has none
    quarantined: str = ""  # why the job may not teach for now; empty: it may


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
    probes: np.ndarray | None = None  # [B] bool, drawn evenly; None: all with VJP, none with the score function
    trust_only: bool = False  # counts for the job's trust, teaches nothing

    @property
    def drawn_evenly(self) -> np.ndarray:
        """[B] bool: the samples that came whatever their weights were."""
        if self.probes is not None:
            return self.probes
        return np.full(len(self.cotangent), self.estimator is Estimator.VJP)

    def digest(self) -> bytes:
        """SHA-256 of what is taught: equal exactly for a true retry. The scored position is not part of it."""
        h = hashlib.sha256()
        for name, array in {**self.inputs.arrays(), "cotangent": self.cotangent}.items():
            h.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            h.update(np.ascontiguousarray(array).tobytes())
        h.update(f"{self.job_id};{self.step};{self.estimator}".encode())
        if self.probes is not None:
            h.update(b";probes:" + np.packbits(self.probes).tobytes())
        if self.trust_only:
            h.update(b";trust_only")
        return h.digest()


@dataclass(frozen=True)
class Rollback:
    """One entry of a weighter's update log: an earlier state is put back.

    It carries that state whole, so that replay needs no snapshot that may be gone by then.
    """

    to_position: int
    state: bytes  # a snapshot file


Entry = MetaUpdate | Rollback


@dataclass(frozen=True)
class ScoreOptions:
    """How one batch is to be weighted."""

    job_id: str = ""  # whose trust applies; empty: full trust
    min_effective_share: float | None = None  # in place of the spec's


@dataclass(frozen=True)
class Scores:
    """What Score returns for one batch of B samples."""

    weights: np.ndarray  # [B] float32, mean 1
    logits: np.ndarray  # [B] float32, before trust, temperature and guard
    position: int
    effective_sample_size: float  # (sum w)^2 / sum w^2, in samples
    trust: float = 1.0  # the factor that was on the logits
    statistics: np.ndarray | None = None  # [B, F] float32 that the reference gave, columns as in the spec
    computed_samples: int = 0  # that the reference computed for this batch; the others were known, or needed none


@dataclass(frozen=True)
class JobStatistics:
    updates_applied: int = 0
    cotangent_rms: float = 0.0
    signal_correlation: float = 0.0
    trust: float = 1.0
    trust_t: float = 0.0
    probed_updates: int = 0


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
