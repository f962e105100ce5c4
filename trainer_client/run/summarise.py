"""From a finished loop to its summary: final losses, what was trained on, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer_client.run.choose import Choice, Selected
from trainer_client.run.compute import Compute, scoring_flops, teaching_flops, training_flops
from trainer_client.run.loop import Loop
from trainer_client.run.methods.judged import JudgedChooser, JudgedWeigher
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import count_parameters
from trainer_client.run.plot import SourceHistory
from trainer_client.run.reference import RunReference
from trainer_client.run.report import RunSummary, mean_effective_size, shares_by_source, weights_by_source
from trainer_client.run.variants import Variant


def source_history(loop: Loop, choices: Sequence[Choice]) -> SourceHistory:
    """What a finished run was trained on."""
    train = loop.task.train
    return SourceHistory(
        weights=loop.weigher.recorded(loop.config.steps),
        sources=np.stack([train.source_index[choice.indices] for choice in choices]),
        drawn=np.stack([train.source_index[choice.drawn] for choice in choices]),
        names=list(train.sources),
    )


def summarise(
    variant: Variant,
    loop: Loop,
    choices: Sequence[Choice],
    history: SourceHistory,
    weighter: dict[str, Any] | None,
    reference: RunReference | None,
    losses: tuple[float, float],
) -> RunSummary:
    """The summary of a finished run.

    Args:
        losses: on all validation and on all test samples.
        weighter: what is known of it; None: the run has none.
        reference: of the job, if it has one.
    """
    config, totals = loop.config, loop.totals
    val_loss, test_loss = losses
    lines = read_metrics(loop.folder / "metrics.jsonl")
    counts = loop.teacher.counts if loop.teacher else None
    selected = loop.chooser if isinstance(loop.chooser, Selected) else None
    compute = _compute(loop, variant, choices, reference)
    test_curve = [(line["step"], line["seconds"], line["test_loss"]) for line in lines if "test_loss" in line]
    return RunSummary(
        label=variant.label,
        method=variant.method,
        mode=variant.mode,
        weighter_from=variant.weighter_from,
        role=variant.role,
        candidates=config.candidates if variant.draws_candidates else 1,
        seed=config.seed,
        steps=config.steps,
        tokens_seen=config.steps * config.batch_size * config.seq_len,
        val_loss=val_loss,
        test_loss=test_loss,
        **asdict(totals),
        wait_seconds=selected.wait_seconds if selected else 0.0,
        meta_updates=counts.sent if counts else 0,
        meta_updates_skipped=counts.degenerate if counts else 0,
        effective_sample_size=mean_effective_size(history.weights),
        weights_by_source=weights_by_source(history.weights, history.sources, history.names),
        shares_by_source=shares_by_source(history.weights, history.sources, history.names),
        trust=next((line["trust"] for line in reversed(lines) if "trust" in line and not line["fallback"]), None),
        compute=compute.to_dict(),
        reference=reference.about() if reference else None,
        replayed_from=(config.replay_weights or None) if variant.records_choice or variant.records_weights else None,
        weighter=weighter,
        warnings=loop.task.warnings,
        test_curve=test_curve,
        spent_curve=_spent(compute, loop, choices, reference, [step for step, _, _ in test_curve]),
    )


def _compute(loop: Loop, variant: Variant, choices: Sequence[Choice], reference: RunReference | None) -> Compute:
    config, parameters = loop.config, count_parameters(loop.model)
    taught = loop.teacher.counts.computed * config.seq_len if loop.teacher else 0  # tokens for each sample of an update
    trained = reference.trained_flops if variant.selects and reference is not None else 0.0
    return Compute(
        training_flops=training_flops(parameters, config.steps * config.batch_size * config.seq_len),
        teaching_flops=teaching_flops(
            parameters, config.hypergradient, taught * config.meta_batch, taught * config.val_batch
        ),
        scoring_flops=_scoring_flops(loop, choices, reference),
        reference_flops=trained + sum(judged.trained_flops for judged in _judged(loop)),
    )


def _scoring_flops(loop: Loop, choices: Sequence[Choice], reference: RunReference | None) -> float:
    """What choosing and weighing the first steps took, `choices` being theirs."""
    flops = sum(judged.flops(len(choices)) for judged in _judged(loop))
    if isinstance(loop.chooser, Selected) and reference is not None:
        computed = loop.chooser.computed_again + sum(choice.computed for choice in choices)
        flops += scoring_flops(reference.parameters, computed * min(loop.config.seq_len, reference.seq_len))
    return flops


def _judged(loop: Loop) -> list[JudgedChooser | JudgedWeigher]:
    return [part for part in (loop.chooser, loop.weigher) if isinstance(part, JudgedChooser | JudgedWeigher)]


def _spent(
    compute: Compute, loop: Loop, choices: Sequence[Choice], reference: RunReference | None, steps: Sequence[int]
) -> list[float]:
    """What all of it had taken after so many steps. A sample is scored when it comes first: early steps cost more."""
    a_step = (compute.training_flops + compute.teaching_flops) / loop.config.steps
    return [a_step * step + _scoring_flops(loop, choices[:step], reference) for step in steps]
