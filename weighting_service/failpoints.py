"""Named places where a test makes the process die or fail, as etcd does it; nothing happens where none is set.

The environment variable WEIGHBRIDGE_FAILPOINTS says which: `name=action[@n]`, several separated by commas. The action
is taken the n-th time (default 1) that the process comes by, once:

    kill        SIGKILL to the process itself: nothing is flushed, nothing is said
    full        OSError ENOSPC, as of a full disk
    error       OSError EIO, as of a disk that fails
    pause:S     S seconds of sleep
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass

VARIABLE = "WEIGHBRIDGE_FAILPOINTS"
NAMES = (
    "before_append",
    "after_append",  # durable, not yet answered
    "during_apply",  # between two updates of a turn
    "during_snapshot_write",  # some of its bytes are on the disk
    "after_snapshot",  # before the log is trimmed behind it
    "during_trim",
)


@dataclass
class _Failpoint:
    action: str
    remaining: int


def hit(name: str) -> None:
    """Takes the action that is set for `name`, if any."""
    if _SET is None:
        return
    with _MUTEX:
        point = _SET.get(name)
        if point is None:
            return
        point.remaining -= 1
        due = point.remaining == 0
    if due:
        _act(point.action)


def _act(action: str) -> None:
    kind, _, value = action.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "error":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    elif kind == "pause":
        time.sleep(float(value))


def _parsed(text: str) -> dict[str, _Failpoint] | None:
    """None where no failpoint is set. Raises ValueError for one that does not exist."""
    points = {}
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition("=")
        action, _, count = rest.partition("@")
        if name not in NAMES or action.partition(":")[0] not in ("kill", "full", "error", "pause"):
            raise ValueError(f"{VARIABLE} has {part!r}, expected NAME=kill|full|error|pause:S[@N], NAME of {NAMES}")
        points[name] = _Failpoint(action, int(count or 1))
    return points or None


_MUTEX = threading.Lock()
_SET = _parsed(os.environ.get(VARIABLE, ""))
