"""What the README promises, done: its links lead somewhere, its Python parses, its shell commands run."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Address

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


def test_pretraining_on_own_text(tmp_path: Path) -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if "--data" in line]
    for name, words in (("pool", "one two three"), ("target", "a few other words")):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            for i in range(40):
                file.write(json.dumps({"text": f"{words} {i} " * 20}) + "\n")
    small = "--vocab-size 280 --seq-len 16 --batch-size 8 --meta-batch 4 --val-batch 4 --steps 6"
    script = command.replace("python", sys.executable, 1) + " " + small
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("dwm", 6)
