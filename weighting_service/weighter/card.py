"""The card of an exported weighter: what it reads, how it was taught, how to use it. Words for people alone."""

from __future__ import annotations

from weighting_contract.columns import needs_profile, unknown_columns
from weighting_contract.spec import WeighterSpec
from weighting_service.domain import LearningStatistics


def card_of(spec: WeighterSpec, position: int, statistics: LearningStatistics, parameters: int, about: str = "") -> str:
    """README.md of an export, in Markdown with the front matter of a model card.

    Args:
        position: of the state that is exported.
        statistics: of what it was taught.
        parameters: how many it has.
        about: Markdown for the part on how it was taught.
    """
    told = f"\n{about.strip()}\n" if about.strip() else ""
    return f"""---
library_name: weighbridge
tags:
- data-weighting
- pretraining
---
# Data weighting model

Gives each sample of a pretraining batch a weight (mean 1), learned from validation gradients by Weighbridge.
Method: Yu et al., "LLM Data Selection and Utilization via Dynamic Bi-level Optimization", arXiv 2507.16178.
{parameters:,} parameters: `model.safetensors`; spec and checksums: `config.json`.

## What it reads

| of each sample | |
|---|---|
{_inputs(spec)}

## How it was taught

| | |
|---|---|
| position | {position} |
| meta-updates | {statistics.updates_applied} applied, {statistics.updates_skipped} skipped |
| taught by | {len(statistics.jobs)} job(s) |
| correlation of its logits with -cotangent, before learning it | {statistics.signal_correlation:.4f} |
{told}
## How to use it

Each of these makes a new weighter of it, at position 0, that can learn on.

{_uses(spec)}"""


def _inputs(spec: WeighterSpec) -> str:
    rows = []
    if spec.features and spec.features.names:
        names = spec.features.names
        against = ", some of them against the job's target profile" if needs_profile(names) else ""
        rows.append(f"{len(names)} features{against} | {', '.join(names)}")
    if spec.features and spec.features.tokenizer_checksum:
        rows.append(f"samples of one tokenizer only | its SHA-256: {spec.features.tokenizer_checksum}")
    if spec.features and spec.features.hidden_size:
        rows.append(
            f"a pooled hidden state | of {spec.features.hidden_size} numbers; it does not travel between model sizes"
        )
    if spec.tokens:
        rows.append(f"token ids | up to {spec.tokens.max_tokens}")
    return "\n".join(f"| {row} |" for row in rows)


def _uses(spec: WeighterSpec) -> str:
    ways = [
        """In Python, without a service:

    from weighting_service.weighter import Weighter

    weighter = Weighter.from_pretrained("this-folder")
""",
        """At a service, for jobs of any trainer:

    from trainer_client import connect

    with connect("grpc://HOST:PORT") as client:
        client.create_weighter("its-name", initial="this-folder")
""",
    ]
    features = spec.features
    if features and features.names and not (features.hidden_size or spec.tokens or unknown_columns(features.names)):
        ways.append(
            """For a run:

    python -m trainer_client.run --weighter-from this-folder
"""
        )
    return "\n".join(ways)
