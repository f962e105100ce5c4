"""The shell around a command of this package: a console, logging to it, and mistakes as one sentence on stderr.

Knows nothing of what a command does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

from weighting_contract.errors import WeighbridgeError

_MISTAKE, _INTERRUPTED = 2, 130


def in_shell(name: str, command: Callable[[Console], int]) -> int:
    """Runs a command.

    Args:
        name: of the command, for messages.
        command: what it does with a console; returns its exit code.

    Returns:
        The command's exit code; 2: the user's mistake, said in one sentence on stderr; 130: interrupted.
    """
    console = Console()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    try:
        return command(console)
    except (WeighbridgeError, OSError) as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return _MISTAKE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
