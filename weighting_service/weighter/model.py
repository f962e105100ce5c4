"""The data weighting model (DWM): per-sample inputs, attention across the samples of a batch, one logit a sample.

Knows tensors and the spec; nothing of jobs, learning or weights (see normalise.py, learner.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from weighting_contract.spec import HeadSpec, WeighterSpec
from weighting_service.domain import Inputs
from weighting_service.weighter.attention import attention
from weighting_service.weighter.encoder import TokenEncoder

Module = TypeVar("Module", bound=nn.Module)

LARGEST_INPUT = 1e15  # beyond it the squares inside LayerNorm could overflow float32


class Samples(NamedTuple):
    """Inputs of N samples, those of several batches one after the other; absent parts are None."""

    features: Tensor | None  # [N, F] float32
    hidden: Tensor | None  # [N, H] float32
    tokens: Tensor | None  # [N, T] int64, padded on the right
    lengths: Tensor | None  # [N] int64

    @classmethod
    def of(cls, batches: Sequence[Inputs], device: torch.device) -> Samples:
        """The samples of `batches`, which all have the same parts; token rows are padded to the longest."""

        def joined(arrays: list[np.ndarray | None], dtype: type) -> Tensor | None:
            present = [a for a in arrays if a is not None]
            if not present:
                return None
            return torch.from_numpy(np.concatenate(present, dtype=dtype, casting="same_kind")).to(device)

        return cls(
            features=joined([b.features for b in batches], np.float32),
            hidden=joined([b.hidden for b in batches], np.float32),
            tokens=joined(_equally_long([b.tokens for b in batches]), np.int64),
            lengths=joined([b.lengths for b in batches], np.int64),
        )


class DataWeightingModel(nn.Module):
    """Logits for the samples of a batch; a fresh model gives every sample the logit 0, whatever the inputs.

    Initialised from `spec.seed` alone; the process's random state is left as it was.

    Args:
        spec: inputs and head.
        models_dir: holds the folders of pretrained token encoders.
        device: "meta" makes a model without memory, to look at its size.

    Raises:
        InvalidArgument: the token encoder can't be built or loaded.
    """

    def __init__(self, spec: WeighterSpec, models_dir: Path | None = None, device: str = "cpu") -> None:
        super().__init__()
        # The CPU's generator and no other: torch.manual_seed would also reseed every CUDA device.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.default_generator.manual_seed(spec.seed)
            self._build(spec, models_dir, empty=device == "meta")

    def _build(self, spec: WeighterSpec, models_dir: Path | None, empty: bool) -> None:
        width = spec.head.width
        features = len(spec.features.names) if spec.features else 0
        hidden = spec.features.hidden_size if spec.features else 0
        self.features = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.GELU()) if features else None
        self.hidden = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.GELU()) if hidden else None
        self.encoder = TokenEncoder(spec.tokens, models_dir, empty) if spec.tokens else None
        self.tokens = (
            nn.Sequential(nn.Linear(self.encoder.width, width), nn.LayerNorm(width), nn.GELU())
            if self.encoder
            else None
        )
        parts = sum(part is not None for part in (self.features, self.hidden, self.tokens))
        self.join = nn.Linear(parts * width, width)
        self.blocks = nn.ModuleList(Block(spec.head) for _ in range(spec.head.layers))
        # No biases from here on: the softmax ignores what all logits share, and AdamW would blow up the rounding noise
        # that is all the gradient they get.
        self.norm = nn.LayerNorm(width, bias=False)
        self.logit = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.logit.weight)

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids lie below it; None where the model reads no tokens."""
        return self.encoder.vocabulary_size if self.encoder is not None else None

    def frozen_copy(self) -> DataWeightingModel:
        """The model as it is now, for good: no parameter learns, and only those that never do are shared."""
        return _frozen_copy(self)

    def forward(self, samples: Samples) -> Tensor:
        """Logits [N] of the samples of ONE batch."""
        logits: Tensor = self.compare(self.embed(samples)[None])[0]
        return logits

    def embed(self, samples: Samples) -> Tensor:
        """[N, width]: each sample on its own, so those of different batches may come together."""
        parts = []
        if self.features is not None and samples.features is not None:
            parts.append(self.features(samples.features.clamp(-LARGEST_INPUT, LARGEST_INPUT)))
        if self.hidden is not None and samples.hidden is not None:
            parts.append(self.hidden(samples.hidden.clamp(-LARGEST_INPUT, LARGEST_INPUT)))
        if self.encoder is not None and self.tokens is not None and samples.tokens is not None:
            parts.append(self.tokens(self.encoder(samples.tokens, samples.lengths)))
        joined: Tensor = self.join(torch.cat(parts, dim=-1))
        return joined

    def compare(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [J, B] of J batches that never attend to each other.

        Args:
            x: [J, B, width], from `embed`.
            mask: [J, B] bool, True for a real sample; absent: all are. Logits of the others mean nothing.
        """
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.logit(self.norm(x)).squeeze(-1)
        return logits


def count_parameters(spec: WeighterSpec, models_dir: Path | None = None) -> int:
    """How many parameters a model of this spec has, its token encoder's included; takes no memory for them.

    Raises:
        InvalidArgument: the token encoder can't be built.
    """
    return sum(p.numel() for p in DataWeightingModel(spec, models_dir, device="meta").parameters())


class Block(nn.Module):
    """Pre-LayerNorm self-attention across the samples of a batch, then an MLP. No positions: order doesn't count."""

    def __init__(self, head: HeadSpec) -> None:
        super().__init__()
        self.heads = head.attention_heads
        self.attention_norm = nn.LayerNorm(head.width)
        self.qkv = nn.Linear(head.width, 3 * head.width, bias=False)  # the softmax would ignore the keys'
        self.out = nn.Linear(head.width, head.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(head.width),
            nn.Linear(head.width, 4 * head.width),
            nn.GELU(),
            nn.Linear(4 * head.width, head.width),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [J, B, width], mask [J, B] -> [J, B, width]."""
        x = x + self.out(self._attend(self.qkv(self.attention_norm(x)), mask))
        mixed: Tensor = x + self.mlp(x)
        return mixed

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        jobs, samples, triple = qkv.shape
        q, k, v = qkv.transpose(1, 2).reshape(jobs, 3, self.heads, -1, samples).unbind(1)
        mixed = attention(q, k, v, mask)  # [J, heads, d, B]
        return mixed.reshape(jobs, triple // 3, samples).transpose(1, 2)


def _frozen_copy(module: Module) -> Module:
    """Our own modules keep tensors in the usual places alone, so a copy of each place does: a quarter of a deep copy's
    time, and there is one for every update. An encoder may keep its tensors anywhere.
    """
    if isinstance(module, TokenEncoder):
        shared = {id(p): p for p in module.parameters()} if module.frozen else {}
        return copy.deepcopy(module, shared).requires_grad_(False)
    twin = copy.copy(module)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    twin._modules = {name: None if m is None else _frozen_copy(m) for name, m in module._modules.items()}
    return twin


def _equally_long(rows: list[np.ndarray | None]) -> list[np.ndarray | None]:
    longest = max((r.shape[1] for r in rows if r is not None), default=0)
    return [r if r is None or r.shape[1] == longest else np.pad(r, ((0, 0), (0, longest - r.shape[1]))) for r in rows]
