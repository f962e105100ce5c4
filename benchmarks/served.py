"""A weighting service as users start it, in a process of its own, for as long as a block takes. Knows no client.

What it logs goes to a file: over a long time it would fill a pipe that nobody reads, and wait."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.forked import READY, WAIT_S

START_S = 300.0  # some seconds, but for a machine that has much else to do
_POLL_S = 0.1


@contextmanager
def served(state: Path) -> Iterator[str]:
    """The gRPC URL of a service on `state`, which is made where it is missing; what it logs is in `state`.log.

    Raises:
        SystemExit: it did not come up, with the last thing that it said.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    log = state.with_name(state.name + ".log")
    command = [sys.executable, "-m", "weighting_service", "--state", str(state), "--threads", "1"]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([*command, "--grpc-port", "0", "--rest-port", "0"], stderr=errors)
    try:
        yield f"grpc://127.0.0.1:{_port(process, log)}"
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    give_up = time.monotonic() + START_S
    while (match := READY.search(said := log.read_text(encoding="utf-8"))) is None:
        if process.poll() is not None or time.monotonic() > give_up:
            raise SystemExit(f"the service did not come up: {(said.strip().splitlines() or ['it said nothing'])[-1]}")
        time.sleep(_POLL_S)
    return int(match[1])
