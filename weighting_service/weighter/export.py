"""A weighter's published state as the files of an export, and a fresh weighter's parameters from them. Never pickle.

The files themselves are the contract's (`weighting_contract/export.py`); this knows what the parameters mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from weighting_contract.errors import InvalidArgument
from weighting_contract.export import TENSORS, build_export, check_export
from weighting_contract.spec import FeatureSpec, WeighterSpec
from weighting_service.weighter.card import card_of

if TYPE_CHECKING:
    from weighting_service.weighter.learner import Published, Weighter


def weighter_files(weighter: Weighter, about: str = "") -> dict[str, bytes]:
    """The published state as files by name. Complete: a pretrained encoder's config and parameters are in it.

    Args:
        about: Markdown for the card: how the weighter was taught, beside what it knows of that itself.
    """
    published = weighter.published
    spec = _portable_spec(weighter.spec, published)
    tensors = {name: t.to("cpu", copy=True) for name, t in published.model.state_dict().items()}
    return build_export(
        spec,
        tensors_to_bytes(tensors, {"format": "pt"}),
        card_of(spec, published.position, published.statistics, weighter.parameter_count, about),
        position=published.position,
    )


def load_parameters(weighter: Weighter, files: Mapping[str, bytes], where: str = "the export") -> None:
    """Gives a fresh weighter the parameters of an export. Learning settings, temperature and floor may differ.

    Raises:
        InvalidArgument: the files are damaged, or of a weighter with other inputs or another architecture.
        ValueError: `weighter` has applied updates.
    """
    theirs, ours = check_export(files, where).spec, _portable_spec(weighter.spec, weighter.published)
    if difference := _difference(theirs, ours):
        raise InvalidArgument(f"{where} does not fit this weighter's spec: {difference}")
    try:
        tensors = tensors_from_bytes(files[TENSORS])
    except SafetensorError as exc:
        raise InvalidArgument(f"{where}: {TENSORS} is damaged: {exc}") from exc
    try:
        weighter.load_parameters(tensors)
    except InvalidArgument as exc:
        raise InvalidArgument(f"{where}: {TENSORS} is not of the spec beside it: {exc.message}") from exc


def _portable_spec(spec: WeighterSpec, published: Published) -> WeighterSpec:
    """The spec with the encoder's own config, whatever folder or transformers defaults it came from."""
    if spec.tokens is None or published.model.encoder is None:
        return spec
    return replace(
        spec, tokens=replace(spec.tokens, encoder_config=published.model.encoder.config_json(), pretrained="")
    )


def _difference(theirs: WeighterSpec, ours: WeighterSpec) -> str:
    """Why an export's parameters mean something else than a weighter's, whatever their shapes; empty: they fit."""
    read, wanted = theirs.features or FeatureSpec(), ours.features or FeatureSpec()
    if read.hidden_size != wanted.hidden_size:
        return (
            f"spec.features.hidden_size is {read.hidden_size} in the export and {wanted.hidden_size} here, and a "
            "pooled hidden state does not travel between model sizes"
        )
    if read.names != wanted.names:
        missing, extra = (_without(*pair) for pair in ((read.names, wanted.names), (wanted.names, read.names)))
        if missing or extra:
            return f"the columns in spec.features.names differ: only in the export {missing}, only here {extra}"
        return f"the columns in spec.features.names come in the order {list(read.names)} in the export"
    if read.tokenizer_checksum not in ("", wanted.tokenizer_checksum):
        return (
            f"spec.features.tokenizer_checksum is {read.tokenizer_checksum[:12]}... in the export and "
            f"{wanted.tokenizer_checksum[:12] + '...' if wanted.tokenizer_checksum else 'not given'} here"
        )
    for part, value in _architecture(ours).items():
        if (other := _architecture(theirs)[part]) != value:
            return f"{part} is {other!r} in the export and {value!r} here"
    return ""


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> list[str]:
    return [name for name in names if name not in others]


def _architecture(spec: WeighterSpec) -> dict[str, Any]:
    """What the shapes of the parameters follow from, beside the features."""
    return {
        "spec.tokens.encoder_config": json.loads(spec.tokens.encoder_config) if spec.tokens else None,
        "spec.head.width": spec.head.width,
        "spec.head.layers": spec.head.layers,
        "spec.head.attention_heads": spec.head.attention_heads,
    }
