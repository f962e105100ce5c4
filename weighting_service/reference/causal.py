"""Token losses of a trained reference: a causal LM of transformers.

Torch only: no files. Logits, the largest thing by far, exist for a few places at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_service.reference.packing import pad_rows

_LOGIT_BYTES_CPU = 2 << 20  # of 4 MiB and more, each chunk costs fresh pages: three times slower
_LOGIT_BYTES_CUDA = 256 << 20
_LEAST_PLACES = 32  # of a chunk, or the product with the output layer is slow
_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 1e-3  # nats, in float32; what an architecture does otherwise shows in tenths


class CausalModel:
    """A frozen causal LM that gives the token losses of samples.

    Args:
        model: of transformers, in float32 on the CPU; it is moved, frozen and owned by this object.
        name: of its reference, for messages.
        vocab_size: of the tokenizer; the model may know more.
        longest: tokens that it reads.

    Raises:
        InvalidArgument: a model whose losses depend on padding or are not finite, or whose logits are not those of its
            output layer.
    """

    def __init__(
        self, model: Any, name: str, vocab_size: int, longest: int, device: torch.device | str = "cpu"
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._probe(name, vocab_size, longest)
        self._model.to(device)

    def token_losses(self, tokens: Tensor, real: np.ndarray) -> Tensor:
        """[N, T-1] float32, nats, 0 where `real` is False.

        No attention mask: padding on the right is behind every real token, and causal attention does not look there.

        Args:
            tokens: [N, T] int64 on the model's device, padded on the right.
            real: [N, T-1] bool, where a label is none of the padding.
        """
        device, labels = tokens.device, tokens[:, 1:]
        places = torch.from_numpy(np.flatnonzero(real)).to(device, non_blocking=True)  # in [N, T-1], flattened
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = self._decoder(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            losses = self._losses_at(states.flatten(0, 1)[places], labels.flatten()[places])
        dense = torch.zeros(labels.numel(), device=device).index_copy_(0, places, losses)
        return dense.view(labels.shape)

    def _losses_at(self, states: Tensor, labels: Tensor) -> Tensor:
        """[P] float32 from states [P, H] and labels [P]; logits are held for a chunk of places only."""
        held = _LOGIT_BYTES_CUDA if states.device.type == "cuda" else _LOGIT_BYTES_CPU
        places = max(_LEAST_PLACES, held // (4 * self._head.weight.shape[0]))
        chunks = zip(torch.split(states, places), torch.split(labels, places), strict=True)
        return torch.cat([F.cross_entropy(self._head(s).float(), y, reduction="none") for s, y in chunks])

    @torch.inference_mode()
    def _probe(self, name: str, vocab_size: int, longest: int) -> None:
        """Compares a padded pack with the whole model on each sample alone.

        What differs: models that look ahead, such as encoders, and those that do more to logits than their output
        layer does (caps, scales).
        """
        longest = min(_PROBE_TOKENS, longest)
        rows = [np.arange(n, dtype=np.int64) * 7919 % vocab_size for n in (max(2, longest // 2), longest)]
        pack = pad_rows(rows, range(len(rows)))
        losses = self.token_losses(torch.from_numpy(pack.tokens), pack.labels)
        for row, given in zip(rows, losses, strict=True):
            tokens = torch.from_numpy(row)
            logits = self._model(input_ids=tokens[None, :-1], use_cache=False).logits[0].float()
            expected = F.cross_entropy(logits, tokens[1:], reduction="none")
            if not bool(expected.isfinite().all()):
                raise InvalidArgument(f"the reference {name!r} gives losses that are not finite; train it again")
            if not torch.allclose(given[: len(expected)], expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE):
                raise InvalidArgument(
                    f"the reference {name!r} is a {self._model.config.model_type!r} whose losses change with "
                    "padding or are not those of its output layer alone; expected a plain causal language model"
                )
