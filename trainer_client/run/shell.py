"""The shell around a command of this package: a console, logging to it, and mistakes as one sentence on stderr.

Knows nothing of what a command does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

from weighting_contract.errors import WeighbridgeError

_MISTAKE, _INTERRUPTED = 2, 130


def in_shell(name: str, command: Callable[[Console], int]) -> int:
    """Runs a command. Of several ranks of torchrun the first one alone has a say.

    Args:
        name: of the command, for messages.
        command: what it does with a console; returns its exit code.

    Returns:
        The command's exit code; 2: the user's mistake, said in one sentence on stderr; 130: interrupted.
    """
    first = is_first_rank()
    console = Console(quiet=not first)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    try:
        return command(console)
    except (WeighbridgeError, OSError) as exc:
        if first or not _is_told_elsewhere(exc):
            print(f"{name}: {exc}", file=sys.stderr)
        return _MISTAKE
    except KeyboardInterrupt:
        if first:
            print(f"{name}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def is_first_rank() -> bool:
    """Whether this process is the first of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _is_told_elsewhere(exc: Exception) -> bool:
    from trainer_client.ranks import Elsewhere  # torch is there where ranks are

    return isinstance(exc, Elsewhere)
