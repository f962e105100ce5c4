"""Trained models on tasks of lm-evaluation-harness: its own, or those of task files, which need no network.

Knows models and task names, nothing of training. The package `lm_eval` is imported only where tasks were asked for.
Task files may name Python functions, which are run: give folders that you trust.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weighting_contract.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BOOTSTRAP = 1000  # resamples behind the standard error of a metric that has no formula for it
_REPORTED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")


def check_tasks(names: Sequence[str], include: Sequence[str]) -> None:
    """Loads the tasks once, with their data, so that a mistake is found before training.

    Raises:
        InvalidArgument: lm_eval is not installed, a folder of `include` is none, no task has such a name, or a task or
            its data can't be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidArgument(
            "--eval-tasks needs the package lm_eval, which is not installed: pip install 'weighbridge[eval]', or leave "
            "the flag out"
        )
    for folder in include:
        if not Path(folder).is_dir():
            raise InvalidArgument(f"--eval-include {folder} is no folder: expected one of task files (.yaml)")
    with _quiet():
        manager = _manager(names, include)
        for name in names:
            if not manager.match_tasks([name]):
                nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
                hint = f", the nearest is {nearest[0]}" if nearest else ""
                raise InvalidArgument(f"--eval-tasks: there is no task {name}{hint}; --eval-include adds task files")
        for name in manager.match_tasks(list(names)):
            try:
                manager.load([name])
            except Exception as exc:  # a damaged task file, data that is missing or not to be had without a network
                raise InvalidArgument(f"--eval-tasks: {name} can't be loaded: {_line(exc)}") from exc


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Path,
    names: Sequence[str],
    include: Sequence[str],
    *,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """What lm_eval reports of a model: results, versions, numbers of samples and settings; JSON values.

    Args:
        tokenizer: a tokenizer.json. Its texts get no special tokens: the model has seen none.
        names, include: as `check_tasks` accepted them.
        batch_size: samples a forward pass.

    Raises:
        FailedPrecondition: a task fails on this model.
    """
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    from trainer_client.run.export import fast_tokenizer

    wrapped = fast_tokenizer(tokenizer)
    # lm_eval wants a token to pad with, to begin a text with that has no context, and to end at. Documents were cut
    # into samples without any, so the end of a line is the nearest there is.
    end = model.config.eos_token_id
    if end is None:
        end = wrapped.encode("\n", add_special_tokens=False)
    wrapped.eos_token_id = wrapped.pad_token_id = end[0] if isinstance(end, list) else end
    with _quiet():
        try:
            manager = _manager(names, include)
            lm = HFLM(
                pretrained=model.to(device),  # type: ignore[arg-type]
                tokenizer=wrapped,
                batch_size=batch_size,
                add_bos_token=False,
                device=str(device),
            )
            report = simple_evaluate(
                lm,
                tasks=manager.match_tasks(list(names)),
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP,
            )
        except Exception as exc:  # whatever a task's own code may raise
            raise FailedPrecondition(f"--eval-tasks: the evaluation failed: {_line(exc)}") from exc
    return {name: report[name] for name in _REPORTED if name in report}


def scores(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of each task (and group) in a report, by metric; without those of its size."""
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and metric != "sample_len"
        }
        for task, values in {**report["results"], **report.get("groups", {})}.items()
    }


def _manager(names: Sequence[str], include: Sequence[str]) -> Any:
    """Knows the tasks in `include`, and lm_eval's own only where they are needed: there are thousands to index."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    if include:
        manager = TaskManager(include_path=list(include), include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    return TaskManager(include_path=list(include) or None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's remarks on how it is used: what a user can do something about is raised."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
