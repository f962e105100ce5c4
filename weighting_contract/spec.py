"""Weighter specs: what a data weighting model takes in and how it is built. The defaults live here and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from weighting_contract.errors import InvalidArgument

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class FeatureSpec:
    """Per-sample columns by name, and the width of a pooled hidden state that comes along (0: none).

    `tokenizer_checksum`, the SHA-256 of a tokenizer.json in hex, admits only jobs whose samples are of that tokenizer.
    """

    names: tuple[str, ...] = ()
    hidden_size: int = 0
    tokenizer_checksum: str = ""


@dataclass(frozen=True)
class TokenSpec:
    """Token ids (or texts), encoded by a transformers model and mean-pooled.

    Exactly one of `encoder_config` (JSON of a transformers config) and `pretrained` (a folder of the service's
    `--models` directory). `tokenizer` is "bytes" (ids 0..255 are UTF-8 bytes) or such a folder; texts need it.
    """

    encoder_config: str = ""
    pretrained: str = ""
    tokenizer: str = ""
    max_tokens: int = 512
    train_encoder: bool = True


@dataclass(frozen=True)
class HeadSpec:
    """Cross-sample attention and normalisation. Width in units, floor as a weight, min_effective_share as ESS / B."""

    width: int = 32
    layers: int = 1
    attention_heads: int = 4
    temperature: float = 1.0
    floor: float = 0.0
    min_effective_share: float = 0.6


@dataclass(frozen=True)
class LearningSpec:
    """The weighter's optimiser (AdamW), how cotangents of different jobs are brought to one scale, and what scores.

    Cotangents are mostly noise, so single updates swing the parameters; scores come from their running mean, with the
    decay `averaging` per update (less in the first ones). `logit_penalty` is on half the variance of a batch's logits
    where the score function teaches: logits z tend to -E[c | inputs] / logit_penalty, with c in running RMS. After
    `settle_after` updates (0: never) the learning rate falls in proportion to 1 / updates, down to a tenth: large steps
    find a weighter soon, small ones keep it.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    cotangent_clip: float = 5.0
    cotangent_memory: float = 0.95
    max_staleness: int = 1000
    trust: bool = True
    averaging: float = 0.95
    logit_penalty: float = 0.1
    settle_after: int = 0


@dataclass(frozen=True)
class WeighterSpec:
    """Everything that determines a fresh weighter, bit for bit."""

    features: FeatureSpec | None = None
    tokens: TokenSpec | None = None
    head: HeadSpec = field(default_factory=HeadSpec)
    learning: LearningSpec = field(default_factory=LearningSpec)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; absent inputs are left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: Any) -> WeighterSpec:
        """The spec that `values` describes, checked.

        Raises:
            InvalidArgument: an unknown key, a value of the wrong type or out of range; the message names the field.
        """
        spec: WeighterSpec = _build(cls, values, "spec")
        spec.check()
        return spec

    def check(self) -> None:
        """Raises InvalidArgument where a value is out of range or inputs contradict each other."""
        if self.features is None and self.tokens is None:
            raise InvalidArgument("spec has neither features nor tokens; a weighter needs at least one of them")
        if self.features is not None:
            f = self.features
            if not f.names and not f.hidden_size:
                raise InvalidArgument("spec.features names no columns and no hidden_size; give at least one of them")
            if any(not n for n in f.names) or len(set(f.names)) != len(f.names):
                raise InvalidArgument(f"spec.features.names must be non-empty and distinct, got {list(f.names)}")
            _bound("spec.features.names (count)", len(f.names), 0, 4096)
            _bound("spec.features.hidden_size", f.hidden_size, 0, 65536)
            check_checksum(f.tokenizer_checksum, "spec.features.tokenizer_checksum")
        if self.tokens is not None:
            t = self.tokens
            if bool(t.encoder_config) == bool(t.pretrained):
                raise InvalidArgument("spec.tokens needs exactly one of encoder_config and pretrained")
            _bound("spec.tokens.max_tokens", t.max_tokens, 1, 131072)
            if t.encoder_config:
                _check_encoder_config(t.encoder_config)
        h, u = self.head, self.learning
        _bound("spec.head.width", h.width, 1, 4096)
        _bound("spec.head.layers", h.layers, 0, 32)
        _bound("spec.head.attention_heads", h.attention_heads, 1, 256)
        if h.width % h.attention_heads:
            raise InvalidArgument(
                f"spec.head.width ({h.width}) must be a multiple of spec.head.attention_heads ({h.attention_heads})"
            )
        _bound("spec.head.temperature", h.temperature, 1e-3, 1e3)
        _bound("spec.head.floor", h.floor, 0.0, 0.999)
        _bound("spec.head.min_effective_share", h.min_effective_share, 0.0, 1.0)
        _bound("spec.learning.learning_rate", u.learning_rate, 0.0, 10.0)
        _bound("spec.learning.weight_decay", u.weight_decay, 0.0, 10.0)
        _bound("spec.learning.max_gradient_norm", u.max_gradient_norm, 1e-9, 1e9)
        _bound("spec.learning.cotangent_clip", u.cotangent_clip, 1e-3, 1e6)
        _bound("spec.learning.cotangent_memory", u.cotangent_memory, 0.0, 0.9999)
        _bound("spec.learning.averaging", u.averaging, 0.0, 0.9999)
        _bound("spec.learning.logit_penalty", u.logit_penalty, 0.0, 1e3)
        _bound("spec.learning.settle_after", u.settle_after, 0, 2**31 - 1)
        _bound("spec.learning.max_staleness", u.max_staleness, 0, 2**31 - 1)
        _bound("spec.seed", self.seed, 0, 2**32 - 1)


def _bound(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidArgument(f"{name} is {value}, expected a value from {low} to {high}")


def _check_encoder_config(text: str) -> None:
    try:
        config = json.loads(text)
    except ValueError as exc:
        raise InvalidArgument(f"spec.tokens.encoder_config is not JSON: {exc}") from exc
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InvalidArgument('spec.tokens.encoder_config must be a JSON object with a "model_type" of transformers')


def _build(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InvalidArgument(f"{path} has no field {unknown[0]!r}; known fields: {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()})


def check_name(value: str, field: str) -> None:
    """Raises InvalidArgument for what can't name a weighter or a job."""
    if not _NAME.fullmatch(value):
        raise InvalidArgument(
            f"{field} is {value!r}, expected 1 to 128 letters, digits, dots, dashes or underscores, "
            "the first a letter or digit"
        )


def check_checksum(value: str, field: str) -> None:
    """Raises InvalidArgument for what is neither empty nor a SHA-256 in hex."""
    if value and not _SHA256.fullmatch(value):
        raise InvalidArgument(f"{field} is {value!r}, expected a SHA-256 of 64 lower-case hex digits, or nothing")


def check_text(value: str, path: str) -> None:
    """Raises InvalidArgument for a string that is no Unicode text, such as a lone surrogate: it could not be stored."""
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"{path} is {value!r}, which is not valid Unicode text") from exc


def _convert(hint: Any, value: Any, path: str) -> Any:
    options = [a for a in typing.get_args(hint) if a is not type(None)] if type(None) in typing.get_args(hint) else []
    if options:  # X | None
        return None if value is None else _convert(options[0], value, path)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise InvalidArgument(f"{path} must be a list of strings, got {value!r}")
        for text in value:
            check_text(text, path)
        return tuple(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InvalidArgument(f"{path} must be a {hint.__name__}, got {value!r}")
    if isinstance(value, str):
        check_text(value, path)
    return value
