from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_LEARN: _ClassVar[Role]
    ROLE_FROZEN: _ClassVar[Role]

class Estimator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ESTIMATOR_UNSPECIFIED: _ClassVar[Estimator]
    ESTIMATOR_VJP: _ClassVar[Estimator]
    ESTIMATOR_SCORE_FUNCTION: _ClassVar[Estimator]
ROLE_UNSPECIFIED: Role
ROLE_LEARN: Role
ROLE_FROZEN: Role
ESTIMATOR_UNSPECIFIED: Estimator
ESTIMATOR_VJP: Estimator
ESTIMATOR_SCORE_FUNCTION: Estimator

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WeighterSpec(_message.Message):
    __slots__ = ("features", "tokens", "head", "learning", "seed")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    LEARNING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    features: FeatureSpec
    tokens: TokenSpec
    head: HeadSpec
    learning: LearningSpec
    seed: int
    def __init__(self, features: _Optional[_Union[FeatureSpec, _Mapping]] = ..., tokens: _Optional[_Union[TokenSpec, _Mapping]] = ..., head: _Optional[_Union[HeadSpec, _Mapping]] = ..., learning: _Optional[_Union[LearningSpec, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class FeatureSpec(_message.Message):
    __slots__ = ("names", "hidden_size", "tokenizer_checksum")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    hidden_size: int
    tokenizer_checksum: str
    def __init__(self, names: _Optional[_Iterable[str]] = ..., hidden_size: _Optional[int] = ..., tokenizer_checksum: _Optional[str] = ...) -> None: ...

class TokenSpec(_message.Message):
    __slots__ = ("encoder_config", "pretrained", "tokenizer", "max_tokens", "train_encoder")
    ENCODER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    PRETRAINED_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_ENCODER_FIELD_NUMBER: _ClassVar[int]
    encoder_config: str
    pretrained: str
    tokenizer: str
    max_tokens: int
    train_encoder: bool
    def __init__(self, encoder_config: _Optional[str] = ..., pretrained: _Optional[str] = ..., tokenizer: _Optional[str] = ..., max_tokens: _Optional[int] = ..., train_encoder: bool = ...) -> None: ...

class HeadSpec(_message.Message):
    __slots__ = ("width", "layers", "attention_heads", "temperature", "floor", "min_effective_share")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_HEADS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    MIN_EFFECTIVE_SHARE_FIELD_NUMBER: _ClassVar[int]
    width: int
    layers: int
    attention_heads: int
    temperature: float
    floor: float
    min_effective_share: float
    def __init__(self, width: _Optional[int] = ..., layers: _Optional[int] = ..., attention_heads: _Optional[int] = ..., temperature: _Optional[float] = ..., floor: _Optional[float] = ..., min_effective_share: _Optional[float] = ...) -> None: ...

class LearningSpec(_message.Message):
    __slots__ = ("learning_rate", "weight_decay", "max_gradient_norm", "cotangent_clip", "cotangent_memory", "max_staleness", "trust", "averaging", "logit_penalty", "settle_after")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    COTANGENT_CLIP_FIELD_NUMBER: _ClassVar[int]
    COTANGENT_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    AVERAGING_FIELD_NUMBER: _ClassVar[int]
    LOGIT_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SETTLE_AFTER_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    weight_decay: float
    max_gradient_norm: float
    cotangent_clip: float
    cotangent_memory: float
    max_staleness: int
    trust: bool
    averaging: float
    logit_penalty: float
    settle_after: int
    def __init__(self, learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., max_gradient_norm: _Optional[float] = ..., cotangent_clip: _Optional[float] = ..., cotangent_memory: _Optional[float] = ..., max_staleness: _Optional[int] = ..., trust: bool = ..., averaging: _Optional[float] = ..., logit_penalty: _Optional[float] = ..., settle_after: _Optional[int] = ...) -> None: ...

class Weighter(_message.Message):
    __slots__ = ("name", "spec", "position", "applied_position", "parameters", "jobs_open", "learning", "created_unix_ms", "initial", "shared_with", "snapshot_positions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_POSITION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    JOBS_OPEN_FIELD_NUMBER: _ClassVar[int]
    LEARNING_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    SHARED_WITH_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: WeighterSpec
    position: int
    applied_position: int
    parameters: int
    jobs_open: int
    learning: LearningStatistics
    created_unix_ms: int
    initial: str
    shared_with: _containers.RepeatedScalarFieldContainer[str]
    snapshot_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[WeighterSpec, _Mapping]] = ..., position: _Optional[int] = ..., applied_position: _Optional[int] = ..., parameters: _Optional[int] = ..., jobs_open: _Optional[int] = ..., learning: _Optional[_Union[LearningStatistics, _Mapping]] = ..., created_unix_ms: _Optional[int] = ..., initial: _Optional[str] = ..., shared_with: _Optional[_Iterable[str]] = ..., snapshot_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class LearningStatistics(_message.Message):
    __slots__ = ("updates_applied", "updates_skipped", "duplicates", "refused", "gradient_norm", "logit_std", "effective_share", "signal_correlation", "jobs")
    class JobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: JobStatistics
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[JobStatistics, _Mapping]] = ...) -> None: ...
    UPDATES_APPLIED_FIELD_NUMBER: _ClassVar[int]
    UPDATES_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LOGIT_STD_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_SHARE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    updates_applied: int
    updates_skipped: int
    duplicates: int
    refused: int
    gradient_norm: float
    logit_std: float
    effective_share: float
    signal_correlation: float
    jobs: _containers.MessageMap[str, JobStatistics]
    def __init__(self, updates_applied: _Optional[int] = ..., updates_skipped: _Optional[int] = ..., duplicates: _Optional[int] = ..., refused: _Optional[int] = ..., gradient_norm: _Optional[float] = ..., logit_std: _Optional[float] = ..., effective_share: _Optional[float] = ..., signal_correlation: _Optional[float] = ..., jobs: _Optional[_Mapping[str, JobStatistics]] = ...) -> None: ...

class JobStatistics(_message.Message):
    __slots__ = ("updates_applied", "cotangent_rms", "signal_correlation", "trust", "trust_t", "probed_updates")
    UPDATES_APPLIED_FIELD_NUMBER: _ClassVar[int]
    COTANGENT_RMS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    TRUST_T_FIELD_NUMBER: _ClassVar[int]
    PROBED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates_applied: int
    cotangent_rms: float
    signal_correlation: float
    trust: float
    trust_t: float
    probed_updates: int
    def __init__(self, updates_applied: _Optional[int] = ..., cotangent_rms: _Optional[float] = ..., signal_correlation: _Optional[float] = ..., trust: _Optional[float] = ..., trust_t: _Optional[float] = ..., probed_updates: _Optional[int] = ...) -> None: ...

class CreateWeighterRequest(_message.Message):
    __slots__ = ("name", "spec", "exist_ok", "initial", "files")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    EXIST_OK_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: WeighterSpec
    exist_ok: bool
    initial: str
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[WeighterSpec, _Mapping]] = ..., exist_ok: bool = ..., initial: _Optional[str] = ..., files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class GetWeighterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListWeightersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWeightersResponse(_message.Message):
    __slots__ = ("weighters",)
    WEIGHTERS_FIELD_NUMBER: _ClassVar[int]
    weighters: _containers.RepeatedCompositeFieldContainer[Weighter]
    def __init__(self, weighters: _Optional[_Iterable[_Union[Weighter, _Mapping]]] = ...) -> None: ...

class DeleteWeighterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteWeighterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShareWeighterRequest(_message.Message):
    __slots__ = ("name", "tenants")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    tenants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., tenants: _Optional[_Iterable[str]] = ...) -> None: ...

class RollbackWeighterRequest(_message.Message):
    __slots__ = ("name", "to_position", "expected_position")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TO_POSITION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_POSITION_FIELD_NUMBER: _ClassVar[int]
    name: str
    to_position: int
    expected_position: int
    def __init__(self, name: _Optional[str] = ..., to_position: _Optional[int] = ..., expected_position: _Optional[int] = ...) -> None: ...

class RollbackWeighterResponse(_message.Message):
    __slots__ = ("position", "applied_position")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    applied_position: int
    def __init__(self, position: _Optional[int] = ..., applied_position: _Optional[int] = ...) -> None: ...

class WatchWeighterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ExportWeighterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ExportWeighterResponse(_message.Message):
    __slots__ = ("files",)
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Reference(_message.Message):
    __slots__ = ("name", "checksum", "tokenizer_checksum", "vocab_size", "seq_len", "ngram_buckets", "trained_on", "command", "steps", "loss", "loaded", "files")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    NGRAM_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_ON_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    checksum: str
    tokenizer_checksum: str
    vocab_size: int
    seq_len: int
    ngram_buckets: int
    trained_on: str
    command: str
    steps: int
    loss: float
    loaded: bool
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, name: _Optional[str] = ..., checksum: _Optional[str] = ..., tokenizer_checksum: _Optional[str] = ..., vocab_size: _Optional[int] = ..., seq_len: _Optional[int] = ..., ngram_buckets: _Optional[int] = ..., trained_on: _Optional[str] = ..., command: _Optional[str] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., loaded: bool = ..., files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class PutReferenceRequest(_message.Message):
    __slots__ = ("name", "files", "exist_ok")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    EXIST_OK_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.ScalarMap[str, bytes]
    exist_ok: bool
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Mapping[str, bytes]] = ..., exist_ok: bool = ...) -> None: ...

class GetReferenceRequest(_message.Message):
    __slots__ = ("name", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Iterable[str]] = ...) -> None: ...

class ListReferencesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReferencesResponse(_message.Message):
    __slots__ = ("references",)
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    references: _containers.RepeatedCompositeFieldContainer[Reference]
    def __init__(self, references: _Optional[_Iterable[_Union[Reference, _Mapping]]] = ...) -> None: ...

class DeleteReferenceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteReferenceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenJobRequest(_message.Message):
    __slots__ = ("weighter", "job_id", "role", "feature_names", "reference", "profile")
    WEIGHTER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_NAMES_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    weighter: str
    job_id: str
    role: Role
    feature_names: _containers.RepeatedScalarFieldContainer[str]
    reference: JobReference
    profile: TargetProfile
    def __init__(self, weighter: _Optional[str] = ..., job_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., feature_names: _Optional[_Iterable[str]] = ..., reference: _Optional[_Union[JobReference, _Mapping]] = ..., profile: _Optional[_Union[TargetProfile, _Mapping]] = ...) -> None: ...

class JobReference(_message.Message):
    __slots__ = ("name", "checksum", "tokenizer_checksum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    checksum: str
    tokenizer_checksum: str
    def __init__(self, name: _Optional[str] = ..., checksum: _Optional[str] = ..., tokenizer_checksum: _Optional[str] = ...) -> None: ...

class TargetProfile(_message.Message):
    __slots__ = ("log_ratios", "documents", "lengths", "documents_checksum")
    LOG_RATIOS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    log_ratios: Tensor
    documents: Tensor
    lengths: Tensor
    documents_checksum: str
    def __init__(self, log_ratios: _Optional[_Union[Tensor, _Mapping]] = ..., documents: _Optional[_Union[Tensor, _Mapping]] = ..., lengths: _Optional[_Union[Tensor, _Mapping]] = ..., documents_checksum: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "weighter", "role", "open", "resumed", "position", "last_step", "last_position", "spec", "reference", "reference_checksum", "documents_checksum", "quarantined")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_POSITION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    weighter: str
    role: Role
    open: bool
    resumed: bool
    position: int
    last_step: int
    last_position: int
    spec: WeighterSpec
    reference: str
    reference_checksum: str
    documents_checksum: str
    quarantined: str
    def __init__(self, job_id: _Optional[str] = ..., weighter: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., open: bool = ..., resumed: bool = ..., position: _Optional[int] = ..., last_step: _Optional[int] = ..., last_position: _Optional[int] = ..., spec: _Optional[_Union[WeighterSpec, _Mapping]] = ..., reference: _Optional[str] = ..., reference_checksum: _Optional[str] = ..., documents_checksum: _Optional[str] = ..., quarantined: _Optional[str] = ...) -> None: ...

class CloseJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("job_id", "fallback_steps")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_STEPS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    fallback_steps: int
    def __init__(self, job_id: _Optional[str] = ..., fallback_steps: _Optional[int] = ...) -> None: ...

class QuarantineJobRequest(_message.Message):
    __slots__ = ("job_id", "reason")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    reason: str
    def __init__(self, job_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("position", "applied_position")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    applied_position: int
    def __init__(self, position: _Optional[int] = ..., applied_position: _Optional[int] = ...) -> None: ...

class Inputs(_message.Message):
    __slots__ = ("features", "hidden", "tokens", "lengths", "texts")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    features: Tensor
    hidden: Tensor
    tokens: Tensor
    lengths: Tensor
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, features: _Optional[_Union[Tensor, _Mapping]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., tokens: _Optional[_Union[Tensor, _Mapping]] = ..., lengths: _Optional[_Union[Tensor, _Mapping]] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("job_id", "step", "inputs", "min_position", "min_effective_share", "return_statistics")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    MIN_POSITION_FIELD_NUMBER: _ClassVar[int]
    MIN_EFFECTIVE_SHARE_FIELD_NUMBER: _ClassVar[int]
    RETURN_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    step: int
    inputs: Inputs
    min_position: int
    min_effective_share: float
    return_statistics: bool
    def __init__(self, job_id: _Optional[str] = ..., step: _Optional[int] = ..., inputs: _Optional[_Union[Inputs, _Mapping]] = ..., min_position: _Optional[int] = ..., min_effective_share: _Optional[float] = ..., return_statistics: bool = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("weights", "position", "effective_sample_size", "logits", "statistics", "trust", "computed_samples")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_SAMPLE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    weights: Tensor
    position: int
    effective_sample_size: float
    logits: Tensor
    statistics: Tensor
    trust: float
    computed_samples: int
    def __init__(self, weights: _Optional[_Union[Tensor, _Mapping]] = ..., position: _Optional[int] = ..., effective_sample_size: _Optional[float] = ..., logits: _Optional[_Union[Tensor, _Mapping]] = ..., statistics: _Optional[_Union[Tensor, _Mapping]] = ..., trust: _Optional[float] = ..., computed_samples: _Optional[int] = ...) -> None: ...

class MetaUpdateRequest(_message.Message):
    __slots__ = ("job_id", "update_id", "step", "inputs", "cotangent", "scored_position", "estimator", "probes", "trust_only")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    COTANGENT_FIELD_NUMBER: _ClassVar[int]
    SCORED_POSITION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    TRUST_ONLY_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    update_id: str
    step: int
    inputs: Inputs
    cotangent: Tensor
    scored_position: int
    estimator: Estimator
    probes: Tensor
    trust_only: bool
    def __init__(self, job_id: _Optional[str] = ..., update_id: _Optional[str] = ..., step: _Optional[int] = ..., inputs: _Optional[_Union[Inputs, _Mapping]] = ..., cotangent: _Optional[_Union[Tensor, _Mapping]] = ..., scored_position: _Optional[int] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., probes: _Optional[_Union[Tensor, _Mapping]] = ..., trust_only: bool = ...) -> None: ...

class MetaUpdateResponse(_message.Message):
    __slots__ = ("position", "duplicate", "applied_position")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    duplicate: bool
    applied_position: int
    def __init__(self, position: _Optional[int] = ..., duplicate: bool = ..., applied_position: _Optional[int] = ...) -> None: ...
