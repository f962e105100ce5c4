"""What the README promises, done: its links lead somewhere, its Python parses, its shell commands run."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from tests.conftest import READY, Address
from tests.redis_server import RedisServer, server_binary
from trainer_client import connect

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing
    assert not re.findall(r"\b[A-Z]{3,}_TABLE\b|TODO|TBD", text)


def test_python_parses() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


def run_curl(block: str, service: Address) -> str:
    script = block.replace("localhost:8080", f"127.0.0.1:{service.rest_port}")
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=120, check=True).stdout


def test_curl_commands(service: Address) -> None:
    fresh, own = [block for block in blocks("bash") if "curl" in block]
    weights = json.loads(run_curl(fresh, service))["weights"]
    assert min(weights[:2]) > max(weights[2:]), "the two texts that are like the target"
    created, scored = run_curl(own, service).replace("}{", "}\n{").splitlines()
    assert json.loads(created)["name"] == "texts"
    assert json.loads(scored)["weights"] == [1.0, 1.0]


SMALL = "--vocab-size 280 --seq-len 16 --batch-size 8 --meta-batch 4 --val-batch 4 --steps 6"


def write_texts(folder: Path) -> None:
    for name, words in (("pool", "one two three"), ("target", "a few other words")):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            for i in range(40):
                file.write(json.dumps({"text": f"{words} {i} " * 20}) + "\n")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=120, env=environment(folder)
    )
    assert done.returncode == 0, done.stderr
    return done


def test_pretraining_on_own_text(tmp_path: Path) -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if "--data" in line]
    write_texts(tmp_path)
    run_command(f"{command} {SMALL}", tmp_path)
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("dwm", 6)


@contextmanager
def started(command: str, folder: Path) -> Iterator[Address]:
    """The service of a command, on free ports; it drains at the end."""
    given = shlex.split(command, comments=True)
    flags = ["--grpc-port", "0", "--rest-port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, *given[1:], *flags], cwd=folder, stderr=subprocess.PIPE, text=True, env=environment(folder)
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if ready := READY.search(line):
                yield Address(int(ready[1]), int(ready[2]))
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.skipif(server_binary() is None, reason="no redis-server here")
def test_for_a_team(tmp_path: Path) -> None:
    """Its commands in their order: what was taught with a token over TLS is there when the log has moved to Redis."""
    access, replicas = [block.splitlines() for block in blocks("bash") if "--tls-cert" in block or "migrate" in block]
    make_token, serve, train = access
    migrate, serve_shared, train_shared = replicas
    ca = trustme.CA()
    issued = ca.issue_cert("localhost")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    write_texts(tmp_path)

    token = run_command(make_token, tmp_path).stderr.split()[-1]
    with started(serve, tmp_path) as address:
        run = train.replace("wb_...", token).replace(":50051", f":{address.grpc_port}")
        own = f"--data pool.jsonl.gz --val target.jsonl.gz --mode weight --on-failure raise {SMALL}"
        run_command(f"{run} {own}", tmp_path)
    summary = json.loads((tmp_path / "runs" / "team" / "summary.json").read_text())
    taught = summary["weighter"]["client"]["updates_acknowledged"]
    assert taught > 0

    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as redis:
        log, shared = "redis://localhost:6379/0", "file:///shared/weighbridge"
        run_command(migrate.replace(log, redis.url), tmp_path)
        shutil.copytree(tmp_path / "weighbridge-state" / "snapshots", tmp_path / "shared" / "snapshots")
        command = serve_shared.replace(log, redis.url).replace(shared, (tmp_path / "shared").as_uri())
        with (
            started(f"{command.partition(' #')[0]} --state one --tokens tokens.toml", tmp_path) as one,
            started(f"{command.partition(' #')[0]} --state two --tokens tokens.toml", tmp_path) as two,
        ):
            (url,) = re.findall(r"--weighter (\S+)", train_shared)
            for name, port in (("one", one.grpc_port), ("two", two.grpc_port)):
                url = url.replace(f"{name}:50051", f"127.0.0.1:{port}")
            with connect(url, token=token) as client:
                assert client.get_weighter("default").position == taught
