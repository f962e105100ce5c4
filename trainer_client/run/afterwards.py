"""What comes after the training of a job: the main run's model exported, and all runs evaluated on tasks.

One process does it alone, from the checkpoints that the runs left. Puts parts together; knows nothing of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from trainer_client.run.config import RunConfig
from trainer_client.run.eval_tasks import check_tasks, evaluate_tasks, scores
from trainer_client.run.export import export_model, trained_model
from trainer_client.run.report import RunSummary, job_summary, write_json
from trainer_client.run.tracking import check_wandb
from trainer_client.run.workspace import Workspace
from weighting_contract.errors import FailedPrecondition


def check_extras(config: RunConfig, console: Console) -> None:
    """Raises InvalidArgument where a package or a task that `config` asks for is missing."""
    if config.wandb:
        check_wandb()
    if config.eval_tasks:
        with console.status("looking for the evaluation tasks"):
            check_tasks(config.eval_tasks, config.eval_include)


def finish_job(
    config: RunConfig,
    workspace: Workspace,
    model: PreTrainedModel,
    runs: dict[str, RunSummary],
    device: torch.device,
    console: Console,
) -> dict[str, RunSummary]:
    """Exports and evaluates what is not yet; the summaries with the results, which are written, too.

    Args:
        model: as every run began, on any device.

    Raises:
        FailedPrecondition: an evaluation failed; everything else is written.
    """
    folder = workspace.exported_model
    if not folder.exists():  # always: it takes a sixth of what the two checkpoints do
        export_model(trained_model(model, _checkpoints(workspace, config.main.label)), workspace.tokenizer, folder)
    missing = [label for label, run in runs.items() if config.eval_tasks and run.eval_tasks != config.eval_tasks]
    for label in missing:
        with console.status(f"evaluating the {label} run"):
            runs = {**runs, label: _evaluated(config, workspace, model, runs[label], device)}
        runs[label].write(workspace.run_summary(label))
    if missing:
        write_json(workspace.summary, job_summary(runs, config.main.label))
    return runs


def _evaluated(
    config: RunConfig, workspace: Workspace, model: PreTrainedModel, run: RunSummary, device: torch.device
) -> RunSummary:
    trained = trained_model(model, _checkpoints(workspace, run.label))
    try:
        report = evaluate_tasks(
            trained,
            workspace.tokenizer,
            config.eval_tasks,
            config.eval_include,
            batch_size=config.batch_size,
            device=device,
        )
    except FailedPrecondition as exc:
        raise FailedPrecondition(
            f"{exc.message}; the {run.label} run itself is finished, and --resume --out {config.out} tries again"
        ) from exc
    write_json(workspace.run(run.label) / "eval.json", report)
    return replace(run, eval_tasks=config.eval_tasks, eval_scores=scores(report))


def _checkpoints(workspace: Workspace, label: str) -> Path:
    return workspace.run(label) / "checkpoints"
