"""`--dry-run`: what a job would do, take and leave, without training anything or writing to its folder.

The data are read and tokenised, so that its mistakes are found; tokenizers that are trained for it are cached. Knows
the parts of a job, not how they train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from trainer_client.client import Client, connect
from trainer_client.reference.config import COUNTED
from trainer_client.run.afterwards import check_extras
from trainer_client.run.compute import scoring_flops, teaching_flops, training_flops
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Samples
from trainer_client.run.device import set_up_torch
from trainer_client.run.forward import token_losses
from trainer_client.run.methods.names import JUDGED
from trainer_client.run.models import SIZES, count_config_parameters, count_parameters, llama_config
from trainer_client.run.progress import preparing
from trainer_client.run.reference import reference_recipe
from trainer_client.run.runner import RunJob, prepare
from trainer_client.run.session import PASSING, weighter_names
from trainer_client.run.start import Start
from trainer_client.run.task import to_tensor
from trainer_client.run.variants import Variant
from trainer_client.run.workspace import check_workspace
from trainer_client.settings import Timeouts
from trainer_client.transports import is_embedded
from weighting_contract.errors import NotFound

_BYTES = 4  # of a float32
_PATIENCE_S = 3.0  # with a service that is asked once
_WIDTH = 14  # of the names in front of the lines


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes in one process."""

    parameters: int
    gradients: int
    moments: int  # AdamW keeps two a parameter
    teaching: int  # the validation gradient, one more copy of the parameters
    activations: int  # kept by the forward pass for the backward one

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.teaching + self.activations


def show_plan(config: RunConfig, console: Console) -> None:
    """Prints the plan of a job.

    Raises:
        WeighbridgeError: a mistake that the job itself would end with.
    """
    device = set_up_torch(config)
    check_workspace(config)
    check_extras(config, console)
    with preparing(console) as progress:
        job = prepare(config, device, progress, make_reference=False)
    for name, line in (*_model(job), *_data(job), *_runs(job), *_weighter(job), *_costs(job), *_files(job)):
        console.print(f"{name:<{_WIDTH}}{line}", highlight=False, markup=False, soft_wrap=True)
    console.print("Nothing was trained or written.", highlight=False)


def estimate_memory(model: torch.nn.Module, tokens: np.ndarray, samples: int, *, taught: bool) -> Memory:
    """Of training in float32.

    Args:
        model: on any device.
        tokens: [N, T+1] ids; the activations are measured on the first row.
        samples: of a forward pass.
        taught: whether cotangents are computed.
    """
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = _BYTES * count_parameters(model)
    return Memory(
        parameters=held,
        gradients=trained,
        moments=2 * trained,
        teaching=trained if taught else 0,
        activations=samples * _activation_bytes(model, to_tensor(tokens[:1], next(model.parameters()).device)),
    )


def _activation_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """What autograd keeps of a forward pass, without parameters and buffers; every storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # the tensors, too: a storage that is freed could come back as another's

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            kept[where] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(model, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ---- The lines of the plan ------------------------------------------------------------------------------------------

Line = tuple[str, str]


def _model(job: RunJob) -> Iterator[Line]:
    config = job.config
    a_step = config.batch_size * config.seq_len
    yield "model", f"{config.model}: {count_parameters(job.model):,} parameters, on {job.device}"
    yield "tokens", f"{a_step:,} a step ({config.batch_size} samples of {config.seq_len}), in {config.steps:,} steps"
    epochs = config.steps * config.batch_size / len(job.task.train)
    yield "", f"{config.steps * a_step:,} in all, {epochs:.2g} x the training samples"


def _data(job: RunJob) -> Iterator[Line]:
    yield "tokenizer", f"{job.task.tokenizer.vocab_size:,} tokens"
    for split, samples in (("train", job.task.train), ("validation", job.task.val), ("test", job.task.test)):
        yield split, _counted(len(samples), samples)
        if len(samples.sources) > 1:
            for name, count in zip(samples.sources, np.bincount(samples.source_index), strict=True):
                yield "", f"  {name}: {_counted(int(count), samples)}"


def _counted(count: int, samples: Samples) -> str:
    return f"{count:,} samples, {count * samples.inputs.shape[1]:,} tokens"


def _runs(job: RunJob) -> Iterator[Line]:
    for index, variant in enumerate(job.config.variants):
        compared = ", compared with it" if index else ""
        yield "" if index else "runs", f"{variant.label}{compared}: {_way(variant, job.config)}"


def _way(variant: Variant, config: RunConfig) -> str:
    if config.replay_weights and (variant.records_choice or variant.records_weights):
        return f"samples and weights on record in {config.replay_weights}"
    if variant.judged:
        return _judged_way(variant, config)
    if not variant.learned:
        if variant.draws_candidates:
            return f"of {config.candidates} candidates a place the most alike to the target"
        return "every batch as it is drawn"
    ways = [f"the best of {config.candidates} candidates a place"] * variant.selects
    ways += ["weights inside the batch"] * variant.weighs
    beginning = {"pretaught": "pretaught", "none": "fresh"}.get(variant.weighter_from, f"from {variant.weighter_from}")
    return f"{', '.join(ways)}; weighter {variant.weighter!r}, {beginning} where it is new, role {variant.role}"


def _judged_way(variant: Variant, config: RunConfig) -> str:
    by = f"by {JUDGED[variant.method].about}"
    if variant.draws_candidates:
        return f"of {config.candidates} candidates a place those that are best {by}"
    return f"weights inside the batch {by}" if variant.records_weights else f"batches chosen {by}"


def _weighter(job: RunJob) -> Iterator[Line]:
    config = job.config
    if not any(variant.learned for variant in config.variants) or config.replay_weights:
        yield "service", "none is asked"
        return
    if is_embedded(config.weighter):
        state = config.weighter.removeprefix("embedded://") if "://" in config.weighter else f"{config.out}/weighters"
        yield "service", f"in this process, its state in {state}"
    else:
        yield "service", f"{config.weighter}: {_asked(config, job.start)}"
    if any(variant.selects for variant in config.variants):
        reference, parameters, recipe = job.reference, _reference_parameters(job), reference_recipe(job.task)
        what = f"{parameters:,} parameters" if parameters else "counted"
        if reference is not None:
            how = f"{reference.name}, {'cached or given' if reference.files else 'hosted by the service'}"
        elif recipe.size == COUNTED:
            how = "will be counted first, then cached"
        else:
            how = f"will be trained first ({recipe.steps} steps, then cached)"
        yield "reference", f"{what}; {how}"


def _asked(config: RunConfig, start: Start | None) -> str:
    """What a service says of the job's weighters; one short try."""
    timeouts = replace(Timeouts(), admin_s=_PATIENCE_S)
    with connect(config.weighter, **config.credentials, timeouts=timeouts) as client:
        try:
            return "; ".join(_known(client, variant, start) for variant in config.variants if variant.learned)
        except PASSING as exc:
            if config.on_failure == "raise":
                raise
            return f"does not answer now ({exc.message}); weights are uniform until it does"


def _known(client: Client, variant: Variant, start: Start | None) -> str:
    found = []
    for name, begun in weighter_names(variant, start):
        try:
            view = client.get_weighter(name)
        except NotFound:
            found.append(f"answers, weighter {name!r} is to be made")
            continue
        client.create_weighter(name, **begun)  # it is there: this only finds out whether it is of this spec
        found.append(f"answers, weighter {name!r} is at position {view.applied_position}")
    return "; ".join(found)


def _reference_parameters(job: RunJob) -> int:
    if job.reference is not None:
        return job.reference.parameters
    recipe = reference_recipe(job.task)
    if recipe.size == COUNTED:
        return 0
    described = llama_config(SIZES[recipe.size], job.task.tokenizer.vocab_size, job.config.seq_len)
    return count_config_parameters(described.to_json_string(use_diff=False).encode())


def _costs(job: RunJob) -> Iterator[Line]:
    config, parameters = job.config, count_parameters(job.model)
    training = training_flops(parameters, config.batch_size * config.seq_len)
    yield "compute", f"{training:.3g} FLOPs a step to train"
    for variant in () if config.replay_weights else config.variants:
        if not variant.learned:
            continue
        teaching = teaching_flops(
            parameters,
            config.hypergradient,
            config.meta_batch * config.seq_len,
            config.val_batch * config.seq_len,
        )
        updates = _updates(config, variant)
        scoring = 0.0
        if variant.selects:
            scored = len(job.task.candidate_order.drawn(config.steps)) / config.steps  # each sample once
            scoring = scoring_flops(_reference_parameters(job), 1) * scored * config.seq_len
        share = teaching * updates / config.steps / training
        more = f"teaching {share:.1%} ({updates:,} meta-updates), scoring {scoring / training:.1%} of it on top"
        yield "", f"  {variant.label}: {more}"
    taught = any(variant.learned for variant in config.variants) and not config.replay_weights
    memory = estimate_memory(job.model, job.task.train.tokens, config.batch_size, taught=taught)
    yield (
        "memory",
        f"about {_size(memory.total)}: parameters {_size(memory.parameters)}, gradients "
        + (
            f"{_size(memory.gradients)}, AdamW {_size(memory.moments)}, teaching {_size(memory.teaching)}, activations "
            f"{_size(memory.activations)}"
        ),
    )
    yield "", "  in float32, in one process; activations as measured on one sample, times those of a step"


def _updates(config: RunConfig, variant: Variant) -> int:
    if config.schedule == "staged":
        return (config.stages - 1) * config.stage_updates
    cadence = config.cadence(variant)
    return sum(cadence.due(step) for step in range(config.steps))


def _files(job: RunJob) -> Iterator[Line]:
    config, model = job.config, _BYTES * count_parameters(job.model)
    out, runs = Path(config.out), ", ".join(variant.label for variant in config.variants)
    yield "files", f"{out}/: config, summary, tokenizer, weights over time, exported weighter; of each run ({runs}):"
    yield "", f"  metrics and TensorBoard events; the newest two checkpoints of {_size(3 * model)} each"
    yield "", f"  {out / config.main.label / 'model'}: the trained model, {_size(model)}"
    if config.wandb:
        yield "", f"  metrics go to the W&B project {config.wandb}, too"
    if config.eval_tasks:
        yield "", f"  eval.json of each run: {', '.join(config.eval_tasks)}"
    if config.resume:
        yield "", "  the run that is there is continued"
    elif config.overwrite and (out / "config.json").exists():
        yield "", "  the run that is there is replaced"


def _size(count: int) -> str:
    """In MB, or in GB from there on."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
