"""Token encoders of `transformers`, from a config or from a folder of the models directory, mean-pooled.

The only module that needs transformers, and it imports it when an encoder is built: weighters that read features alone
work without it. Runs no code and fetches nothing that a config or folder names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weighting_contract.building import ONE_AT_A_TIME
from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import TokenSpec
from weighting_service.models_dir import model_folder

TOKENS_PER_CHUNK = 65_536  # padded; bounds the activations of one pass of the encoder
# What a config may not choose: code from elsewhere, kernels from a hub, other weights.
FORBIDDEN_KEYS = frozenset({"auto_map", "attn_implementation", "experts_implementation", "quantization_config"})
# Of these transformers makes Python objects, one each, before anybody can ask how large the model is.
COUNTS = re.compile(r"(layer|label|group|expert|block|stage|head)s?$")
LARGEST_COUNT = 1024


class TokenEncoder(nn.Module):
    """Token ids to one vector a sample: the mean of the last hidden states over its real tokens.

    Args:
        spec: which encoder, and whether it learns.
        models_dir: holds the folders that `spec.pretrained` may name.
        empty: only to look at its size: nothing is read or initialised, no sample can be encoded.

    Raises:
        InvalidArgument: no such encoder, or one that can't encode `spec.max_tokens` tokens.
    """

    def __init__(self, spec: TokenSpec, models_dir: Path | None = None, empty: bool = False) -> None:
        super().__init__()
        field = "spec.tokens.pretrained" if spec.pretrained else "spec.tokens.encoder_config"
        self.model = _pretrained(spec, models_dir, field, empty) if spec.pretrained else _from_config(spec, field)
        self.model.eval()  # dropout off, for learning too: an update must be a function of the log alone
        self.model.config.use_cache = False
        self.frozen = not spec.train_encoder
        if self.frozen:
            self.model.requires_grad_(False)
        if not empty:
            self._probe(spec, field)

    @torch.no_grad()
    def _probe(self, spec: TokenSpec, field: str) -> None:
        """Encodes one sample, so that an encoder that can't is refused now and not at its first batch."""
        length = min(spec.max_tokens, 1024)
        try:
            states = self(torch.full((1, length), self.vocabulary_size - 1), torch.tensor([length]))
        except Exception as exc:  # whatever an architecture raises when inputs don't suit it
            raise InvalidArgument(
                f"{field} is a {self.model.config.model_type!r} that can't encode a sample of {length} tokens: "
                f"{_first_line(exc)}"
            ) from exc
        if states.shape != (1, self.width):
            raise InvalidArgument(f"{field} gives states of shape {list(states.shape)}, expected [1, {self.width}]")

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.config.vocab_size)

    def config_json(self) -> str:
        """The encoder's config as `TokenSpec.encoder_config` takes it: architecture only."""
        return json.dumps(_architecture(self.model.config.to_dict()), sort_keys=True)

    def train(self, mode: bool = True) -> TokenEncoder:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [N, T] padded on the right, lengths [N] of 1 or more -> [N, width] float32."""
        rows = max(1, TOKENS_PER_CHUNK // tokens.shape[1])
        # bf16 for the encoder alone: it is the work, and the small head keeps float32's precision.
        bf16 = tokens.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with (
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
        ):
            chunks = zip(torch.split(tokens, rows), torch.split(lengths, rows), strict=True)
            return torch.cat([self._pool(t, n) for t, n in chunks])

    def _pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        tokens = tokens[:, : int(lengths.max())]
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [N, T]
        states = self.model(input_ids=tokens, attention_mask=real.long()).last_hidden_state  # [N, T, width]
        pooled: Tensor = (states.float() * real[..., None]).sum(1) / lengths[:, None]
        return pooled


def _from_config(spec: TokenSpec, field: str) -> Any:
    values = json.loads(spec.encoder_config)
    forbidden = sorted(k for k in values if k.startswith("_") or k in FORBIDDEN_KEYS)
    if forbidden:
        raise InvalidArgument(f"{field} sets {forbidden[0]!r}, which a weighter's encoder may not choose; leave it out")
    for name, value in values.items():
        if COUNTS.search(name) and isinstance(value, int) and value > LARGEST_COUNT:
            raise InvalidArgument(f"{field} sets {name!r} to {value}, expected at most {LARGEST_COUNT}")
    auto = _transformers(field)
    try:
        config = auto.AutoConfig.for_model(**values)
        _check_config(config, spec, field)
        with ONE_AT_A_TIME:
            return auto.AutoModel.from_config(
                config, trust_remote_code=False, dtype=torch.float32, attn_implementation=_attention(spec)
            )
    except InvalidArgument:
        raise
    except Exception as exc:  # each architecture has its own ways to reject a config
        raise InvalidArgument(f"{field} of type {values['model_type']!r} can't be built: {_first_line(exc)}") from exc


def _pretrained(spec: TokenSpec, models_dir: Path | None, field: str, empty: bool) -> Any:
    folder = model_folder(spec.pretrained, models_dir, field)
    auto = _transformers(field)
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = auto.AutoConfig.from_pretrained(folder, **safe)
        _check_config(config, spec, field)
        with ONE_AT_A_TIME:
            if empty:
                return auto.AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
            model, report = auto.AutoModel.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=_attention(spec),
                output_loading_info=True,
                **safe,
            )
    except InvalidArgument:
        raise
    except Exception as exc:  # missing or damaged files, code that would have to run, unknown architectures
        raise InvalidArgument(
            f"{field} is {spec.pretrained!r}, but that folder can't be loaded: {_first_line(exc)}; "
            "expected config.json and model.safetensors of a transformers model"
        ) from exc
    missing = sorted(k for k in report["missing_keys"] if "pooler" not in k)  # poolers are heads; mean-pooling has none
    if missing:
        raise InvalidArgument(
            f"{field} is {spec.pretrained!r}, but that folder's file lacks {len(missing)} of the encoder's tensors, "
            f"the first is {missing[0]!r}"
        )
    return model


def _attention(spec: TokenSpec) -> str | None:
    """Fused attention has backward passes that aren't reproducible on CUDA; None is the architecture's default."""
    return "eager" if spec.train_encoder else None


def _check_config(config: Any, spec: TokenSpec, field: str) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidArgument(f"{field} is a {kind!r}, an encoder-decoder; expected an encoder or a causal model")
    for name in ("vocab_size", "hidden_size"):
        if not isinstance(getattr(config, name, None), int):
            raise InvalidArgument(f"{field} is a {kind!r} without {name}; expected a model that reads token ids")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < spec.max_tokens:
        raise InvalidArgument(f"spec.tokens.max_tokens is {spec.max_tokens}, but this encoder takes at most {longest}")


def _architecture(values: dict[str, Any]) -> dict[str, Any]:
    unportable = FORBIDDEN_KEYS | {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in unportable}


def _transformers(field: str) -> Any:
    try:
        import transformers
    except ImportError as exc:
        raise InvalidArgument(
            f"{field} is given, but transformers isn't installed here; install weighbridge[tokens] for token encoders"
        ) from exc
    return transformers


def _first_line(exc: Exception) -> str:
    """For a sentence: some libraries list all that they know."""
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"
