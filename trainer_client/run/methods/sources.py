"""Which sources of the training samples are the target's, for methods that go by label. Knows samples only."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from trainer_client.run.choose import likeness
from trainer_client.run.task import Task
from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)


def target_samples(task: Task, named: Sequence[str] = ()) -> np.ndarray:
    """[N] bool: the training samples of the target's sources.

    Args:
        named: the sources; none: those that validation documents have, too, or else the one whose n-grams are nearest
            to them.

    Raises:
        InvalidArgument: a name that no training document has as its source.
    """
    sources = task.train.sources
    if unknown := [name for name in named if name not in sources]:
        raise InvalidArgument(
            f"--oracle-source is {unknown[0]!r}, but the training documents are of {', '.join(sources)}"
        )
    target = tuple(named) or tuple(name for name in sources if name in task.val.sources) or (_nearest(task),)
    logger.info("the target's samples are those of %s", ", ".join(target))
    return np.isin(task.train.source_index, [sources.index(name) for name in target])


def _nearest(task: Task) -> str:
    alike = likeness(task)
    present = np.unique(task.train.source_index)
    means = [alike[task.train.source_index == index].mean() for index in present]
    nearest = int(present[int(np.argmax(means))])
    return task.train.sources[nearest]
