"""The wheel built from this tree is complete: it installs into an empty environment and serves and trains from there.

The environments get exactly what the wheel's metadata asks for, linked from the environment that runs the tests, so
an undeclared dependency fails here and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import READY

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "weighting_contract", "weighting_service", "trainer_client")
NOT_IN_THE_BASE_INSTALL = (
    "torch",
    "transformers",
    "safetensors",
    "fastapi",
    "uvicorn",
    "pydantic",
    "rich",
    "matplotlib",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command of `make wheel`, from a copy: leftovers of other builds in the tree stay out of it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", f"{source}/dist", str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    (built,) = (source / "dist").glob("weighbridge-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("base"), wheel, extras=())


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(
        tmp_path_factory.mktemp("full"),
        wheel,
        extras=("torch", "server", "tokens", "report", "huggingface", "lightning"),
    )


class Environment:
    """A new virtual environment with the wheel and what its metadata requires for the extras."""

    def __init__(self, folder: Path, wheel: Path, extras: tuple[str, ...]) -> None:
        self.folder = folder / "venv"
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir()
        venv.create(self.folder, with_pip=False, symlinks=True)
        self.python = self.folder / "bin" / "python"
        (site,) = self.folder.glob("lib/python*/site-packages")
        install = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", "--no-index"]
        subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True, timeout=120)
        for required in _closure(_requirements(wheel), extras):
            _link(required, site)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` outside the tree, with nothing of the calling environment on its path."""
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.cwd, env=_clean(), capture_output=True, text=True, timeout=240)

    @contextmanager
    def serve(self, state: Path) -> Iterator[tuple[int, int]]:
        """`python -m weighting_service` on free ports: gives them once it is ready, stops it at the end."""
        flags = ["--state", str(state), "--grpc-port", "0", "--rest-port", "0", "--threads", "1"]
        command = [str(self.python), "-m", "weighting_service", *flags]
        with subprocess.Popen(command, cwd=self.cwd, env=_clean(), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            log: list[str] = []
            try:
                for line in process.stderr:
                    log.append(line)
                    if ready := READY.search(line):
                        yield int(ready[1]), int(ready[2])
                        break
                else:
                    raise AssertionError("the service did not come up:\n" + "".join(log))
            finally:
                process.terminate()
                log += process.stderr.readlines()
        assert process.returncode == 0, "".join(log)


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def _requirements(wheel: Path) -> list[Requirement]:
    return [Requirement(line) for line in _metadata(wheel).get_all("Requires-Dist", [])]


def _closure(requirements: list[Requirement], extras: tuple[str, ...]) -> list[Distribution]:
    """The distributions that the requirements ask for with these extras, and what those ask for in turn."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    todo = [(requirement, frozenset(extras)) for requirement in requirements]
    while todo:
        requirement, wanted_for = todo.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (wanted_for or {""})):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in found:
            found[key] = distribution(requirement.name)
            todo += [(Requirement(line), key[1]) for line in found[key].requires or []]
    return list(found.values())


def _link(installed: Distribution, site: Path) -> None:
    """Links the top-level files and folders of an installed distribution; scripts stay out."""
    tops = {file.parts[0] for file in installed.files or []} - {"..", "__pycache__", "/"}
    assert tops, f"{installed.name} lists no files"
    for top in tops:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(installed.locate_file(top))))


def test_the_wheel_holds_all_our_modules_the_contract_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"protos/weighting/v1/weighting{end}" for end in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py")} <= names
    assert f"{info}/licenses/LICENSE" in names


def test_the_metadata_says_what_a_package_index_shows(wheel: Path) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "weighbridge"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert str(metadata.get_payload()).strip(), "the README is the long description"
    base = {requirement.name for requirement in _requirements(wheel) if requirement.marker is None}
    assert base == {"grpcio", "protobuf", "numpy", "httpx"}


def test_every_module_imports_and_comes_from_the_wheel(full: Environment, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".py")]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    script = "import importlib, sys; print(*(importlib.import_module(m).__file__ for m in sys.argv[1:]), sep='\\n')"
    imported = full.run("-c", script, *modules)
    assert imported.returncode == 0, imported.stderr
    (site,) = full.folder.glob("lib/python*/site-packages")
    assert imported.stdout.split() == [str(site / name) for name in files]


@pytest.mark.parametrize("module", ["weighting_service", "trainer_client.run", "trainer_client.report"])
def test_the_commands_start(full: Environment, module: str) -> None:
    helped = full.run("-m", module, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "usage" in helped.stdout.lower()
    assert "Traceback" not in helped.stderr


CLIENT = """
import sys, numpy
from trainer_client import connect
spec = {"features": {"names": ["loss", "length"]}}
with connect(sys.argv[1]) as client, client.open_job(weighter="from-the-wheel", spec=spec) as job:
    scores = job.score(numpy.arange(8, dtype="float32").reshape(4, 2), step=0)
    print(scores.fallback, len(scores.weights), round(float(scores.weights.mean()), 4))
"""


def test_the_base_install_is_a_client_without_torch_or_a_server(base: Environment) -> None:
    for name in NOT_IN_THE_BASE_INSTALL:
        assert base.run("-c", f"import {name}").returncode != 0, f"the base install has {name}"
    nobody_listens = base.run("-W", "error", "-c", CLIENT, "grpc://127.0.0.1:1")
    assert (nobody_listens.returncode, nobody_listens.stdout) == (0, "True 4 1.0\n"), nobody_listens.stderr


def test_it_serves_and_trains_from_the_wheel(base: Environment, full: Environment, tmp_path: Path) -> None:
    with full.serve(tmp_path / "state") as (grpc_port, rest_port):
        for url in (f"grpc://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{rest_port}"):
            scored = base.run("-c", CLIENT, url)
            assert (scored.returncode, scored.stdout) == (0, "False 4 1.0\n"), scored.stderr
        for name in ("pool", "val"):
            texts = [" ".join(f"{name} {n} is {n * n}." for n in range(start, start + 50)) for start in range(60)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        data = ["--data", str(tmp_path / "pool.jsonl"), "--val", str(tmp_path / "val.jsonl"), "--vocab-size", "300"]
        size = ["--steps", "4", "--batch-size", "8", "--meta-batch", "4", "--threads", "1"]
        where = ["--weighter", f"grpc://127.0.0.1:{grpc_port}", "--out", str(tmp_path / "run")]
        trained = full.run("-m", "trainer_client.run", *data, *size, *where)
        assert trained.returncode == 0, trained.stdout + trained.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["steps"], summary["fallback_steps"]) == ("dwm", 4, 0)
