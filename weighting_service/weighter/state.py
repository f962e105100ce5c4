"""A weighter's state apart from its tensors, to and from plain JSON values, and checks of tensors against a spec.

Python floats survive JSON exactly, so a state that went through it continues bit for bit. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_service.domain import LearningStatistics
from weighting_service.weighter.cotangents import JobSignal, RunningMean
from weighting_service.weighter.trust import TrustSignal

FORMAT = 6  # to be raised, too, where the same updates lead to another state than before
READABLE = (1, 2, 3, 4, 5, 6)
WITH_TRUST = (4, 5, 6)  # 1 had none, those of 2 and 3 were in other units: a job's starts anew; later ones go on


@dataclass(frozen=True)
class State:
    """What a weighter is besides tensors. `statistics.jobs` follows from `jobs` and is not stored."""

    position: int
    statistics: LearningStatistics
    jobs: dict[str, JobSignal]
    agreement: RunningMean  # over all jobs
    optimiser_steps: dict[str, int]  # by parameter


def state_to_json(state: State) -> dict[str, Any]:
    """Plain JSON values."""
    statistics = {name: value for name, value in asdict(state.statistics).items() if name != "jobs"}
    return {
        "format": FORMAT,
        "position": state.position,
        "statistics": statistics,
        "jobs": {name: asdict(job) for name, job in state.jobs.items()},
        "agreement": asdict(state.agreement),
        "optimiser_steps": state.optimiser_steps,
    }


def state_from_json(values: Mapping[str, Any]) -> State:
    """What `state_to_json` wrote. Raises InvalidArgument where it didn't."""
    if values.get("format") not in READABLE:
        raise InvalidArgument(
            f"the state has format {values.get('format')!r}, this version reads formats {READABLE[0]} to {FORMAT}"
        )
    try:
        return State(
            position=int(values["position"]),
            statistics=LearningStatistics(**values["statistics"]),
            jobs={name: _job(job, with_trust=values["format"] in WITH_TRUST) for name, job in values["jobs"].items()},
            agreement=RunningMean(**values["agreement"]),
            optimiser_steps={name: int(steps) for name, steps in values["optimiser_steps"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise InvalidArgument(f"the state's metadata is incomplete: {type(exc).__name__}: {exc}") from exc


def _job(values: Mapping[str, Any], with_trust: bool) -> JobSignal:
    trust = TrustSignal(**values["trust"]) if with_trust else TrustSignal()
    return JobSignal(**{**values, "correlation": RunningMean(**values["correlation"]), "trust": trust})


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises InvalidArgument where names, shapes or dtypes differ; the message names the first tensor that does."""
    for name in sorted(expected.keys() ^ given.keys()):
        fault = "is missing" if name in expected else "is not part of it"
        raise InvalidArgument(f"tensor {name!r} {fault}: the tensors are not those of {what}")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            raise InvalidArgument(
                f"tensor {name!r} is {given[name].dtype} of shape {list(given[name].shape)}, "
                f"but in {what} it is {tensor.dtype} of shape {list(tensor.shape)}"
            )
