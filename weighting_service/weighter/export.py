"""Weighters as files: safetensors, a config and a card, enough to start a new weighter from. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import WeighterSpec
from weighting_service.weighter.learner import Published, Weighter

FORMAT = 1
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_weighter(weighter: Weighter, folder: Path) -> None:
    """Writes `weighter_files` into `folder`, which is made if it isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in weighter_files(weighter).items():
        (folder / name).write_bytes(data)


def weighter_files(weighter: Weighter) -> dict[str, bytes]:
    """The published state as files by name. Complete: a pretrained encoder's config and parameters are in it."""
    published = weighter.published
    spec = _portable_spec(weighter.spec, published)
    config = {"format": FORMAT, "position": published.position, "spec": spec.to_dict()}
    tensors = {name: t.to("cpu", copy=True) for name, t in published.model.state_dict().items()}
    return {
        TENSORS: tensors_to_bytes(tensors, {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        CARD: _card(spec, published, weighter.parameter_count).encode(),
    }


def load_weighter(folder: Path, *, device: torch.device | None = None) -> Weighter:
    """A new weighter, at position 0 with a fresh optimiser, with the parameters that `folder` holds.

    Raises:
        InvalidArgument: the folder isn't a complete export; the message names the file.
    """
    files = read_export(folder)
    weighter = Weighter(_read_spec(files), device=device or torch.device("cpu"))
    load_parameters(weighter, files)
    return weighter


def read_export(folder: Path) -> dict[str, bytes]:
    """The files that `load_parameters` needs. Raises InvalidArgument naming the one that the folder lacks."""
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise InvalidArgument(f"{folder} has no {missing[0]}, expected the folder of an exported weighter")
    return {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}


def load_parameters(weighter: Weighter, files: Mapping[str, bytes]) -> None:
    """Gives a fresh weighter the parameters of an export. Learning settings, temperature and floor may differ.

    Raises:
        InvalidArgument: the files are damaged, or of a weighter with other inputs or another architecture.
        ValueError: `weighter` has applied updates.
    """
    theirs, ours = _read_spec(files), _portable_spec(weighter.spec, weighter.published)
    for part, value in _architecture(ours).items():
        if _architecture(theirs)[part] != value:
            raise InvalidArgument(
                f"the export's {part} is {_architecture(theirs)[part]!r}, but this weighter's is {value!r}"
            )
    try:
        tensors = tensors_from_bytes(_file(files, TENSORS))
    except SafetensorError as exc:
        raise InvalidArgument(f"the export's {TENSORS} is damaged: {exc}") from exc
    weighter.load_parameters(tensors)


def _portable_spec(spec: WeighterSpec, published: Published) -> WeighterSpec:
    """The spec with the encoder's own config, whatever folder or transformers defaults it came from."""
    if spec.tokens is None or published.model.encoder is None:
        return spec
    return replace(
        spec, tokens=replace(spec.tokens, encoder_config=published.model.encoder.config_json(), pretrained="")
    )


def _architecture(spec: WeighterSpec) -> dict[str, Any]:
    """What parameters mean: they fit no weighter that differs here, even where their shapes do."""
    return {
        "spec.features.names": spec.features.names if spec.features else (),
        "spec.features.hidden_size": spec.features.hidden_size if spec.features else 0,
        "spec.tokens.encoder_config": json.loads(spec.tokens.encoder_config) if spec.tokens else None,
        "spec.head.width": spec.head.width,
        "spec.head.layers": spec.head.layers,
        "spec.head.attention_heads": spec.head.attention_heads,
    }


def _read_spec(files: Mapping[str, bytes]) -> WeighterSpec:
    try:
        config = json.loads(_file(files, CONFIG))
    except ValueError as exc:
        raise InvalidArgument(f"the export's {CONFIG} is not JSON: {exc}") from exc
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InvalidArgument(f"the export's {CONFIG} is not of format {FORMAT}, the one that this version reads")
    return WeighterSpec.from_dict(config.get("spec"))


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise InvalidArgument(f"the export has no {name}, only {', '.join(sorted(files)) or 'nothing'}")
    return files[name]


def _card(spec: WeighterSpec, published: Published, parameters: int) -> str:
    inputs = []
    if spec.features and spec.features.names:
        inputs.append(f"{len(spec.features.names)} features ({', '.join(spec.features.names)})")
    if spec.features and spec.features.hidden_size:
        inputs.append(f"a pooled hidden state of {spec.features.hidden_size}")
    if spec.tokens:
        inputs.append(f"up to {spec.tokens.max_tokens} tokens")
    statistics = published.statistics
    return f"""# Data weighting model

Gives each sample of a pretraining batch a weight (mean 1), learned from validation gradients by Weighbridge.
Method: Yu et al., "LLM Data Selection and Utilization via Dynamic Bi-level Optimization", arXiv 2507.16178.

| | |
|---|---|
| inputs per sample | {"; ".join(inputs)} |
| parameters | {parameters:,} |
| position | {published.position} |
| meta-updates | {statistics.updates_applied} applied, {statistics.updates_skipped} skipped |
| taught by | {len(statistics.jobs)} job(s) |
| correlation of its logits with -cotangent, before learning it | {statistics.signal_correlation:.4f} |

Start a weighter from it:

    from pathlib import Path
    from weighting_service.weighter import load_weighter

    weighter = load_weighter(Path("this-folder"))
"""
