"""Starts ranks as torchrun does: all of a job by torchrun itself, or one by one, to see what becomes of each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE_S = 400


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}


def torchrun(ranks: int, module: str, *arguments: str, cache: Path) -> None:
    """Runs a module on so many ranks; fails where it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = subprocess.Popen(
        [*launch, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = run.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        run.terminate()  # it ends its ranks; a kill would leave them behind
        run.communicate()
        raise
    assert run.returncode == 0, said[-4000:]


@dataclass(frozen=True)
class Ended:
    """What became of a rank."""

    code: int
    out: str
    err: str


def start(ranks: int, module: str, *arguments: list[str], cache: Path) -> list[subprocess.Popen[str]]:
    """Starts a module on so many ranks, without torchrun's agent around them; arguments are each rank's, or all's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments[rank % len(arguments)]],
                cwd=ROOT,
                env={**environment(cache), **{name: str(value) for name, value in {**place, **address}.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ended(started: list[subprocess.Popen[str]]) -> list[Ended]:
    """Waits for all ranks; one that hangs is killed, and the test fails."""
    try:
        texts = [process.communicate(timeout=PATIENCE_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, out, err) for process, (out, err) in zip(started, texts, strict=True)]


def run_checks(checks: dict[str, Callable[[], None]]) -> None:
    """On each rank of torchrun: runs checks one after the other and writes what became of each.

    Into the folder that the command line names, rank-N.json: "passed", or the traceback.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {}
    for name, check in checks.items():
        try:
            check()
            outcomes[name] = "passed"
        except BaseException:  # the other ranks go on to the next one, and so must this one
            outcomes[name] = traceback.format_exc()
        Path(sys.argv[1], f"rank-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def checks_of(namespace: dict[str, object]) -> dict[str, Callable[[], None]]:
    """The functions of a module called check_NAME, by name, in their order."""
    return {n.removeprefix("check_"): c for n, c in namespace.items() if n.startswith("check_") and callable(c)}
