"""Which samples the runs of a job were made of, in a file of the job: other data under the same names is noticed.

Knows samples, not what is done with them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer_client.run.data import Samples
from trainer_client.run.report import write_json
from trainer_client.run.task import Task
from weighting_contract.errors import InvalidArgument

_FLAGS = {"train": "--data", "validation": "--val", "test": "--test"}


def write_fingerprint(path: Path, task: Task) -> None:
    """Number and checksum of the samples of each split."""
    splits = {"train": task.train, "validation": task.val, "test": task.test}
    write_json(path, {name: _of(samples) for name, samples in splits.items()})


def check_fingerprint(path: Path, task: Task, run: str, splits: tuple[str, ...] = tuple(_FLAGS)) -> None:
    """Raises InvalidArgument where samples are not those of a file of `write_fingerprint`, naming split and flag.

    Args:
        run: what the file belongs to, for the message.
    """
    try:
        known = json.loads(path.read_text("utf-8"))
        expected = {name: (int(known[name]["samples"]), str(known[name]["checksum"])) for name in splits}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidArgument(f"{path}, which says what {run} was made of, can't be read: {exc}") from exc
    for name in splits:
        now = _of({"train": task.train, "validation": task.val, "test": task.test}[name])
        if (now["samples"], now["checksum"]) != expected[name]:
            raise InvalidArgument(
                f"{_FLAGS[name]} gives other {name} samples than {run} was made of ({now['samples']:,} now, "
                f"{expected[name][0]:,} then): give it the documents and the tokenizer that it had"
            )


def _of(samples: Samples) -> dict[str, Any]:
    digest = hashlib.sha256(f"{samples.tokens.dtype.str}:{samples.tokens.shape}:".encode())
    digest.update(np.ascontiguousarray(samples.tokens).data)
    return {"samples": len(samples), "checksum": digest.hexdigest()}
