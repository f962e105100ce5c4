"""Imports point one way (docs/architecture.md): protos <- transports -> service -> engine -> weighter.

Reads the tree with `ast`, so imports inside functions and under TYPE_CHECKING count too. One subprocess imports every
module and sees that importing does no work.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "weighting_contract", "weighting_service", "trainer_client")

TRANSPORTS = ("weighting_service.grpc_server", "weighting_service.rest_server")
WIRING = tuple(f"weighting_service.{name}" for name in ("app", "embedded", "settings", "__main__"))
SERVE_FRAMEWORKS = ("grpc", "grpc_health", "grpc_reflection", "fastapi", "starlette", "uvicorn", "pydantic_settings")
SIDE_EFFECTS = ("sqlite3", "redis", "threading", "asyncio", "concurrent", "multiprocessing", "socket", "subprocess")
DURABLE = tuple(f"weighting_service.{name}" for name in ("update_log", "snapshots", "storage"))
COMPUTING = tuple(
    f"weighting_service.{name}" for name in ("engine", "call_queue", "weighter", "reference", "follower", "states")
)
ACCESS = tuple(f"weighting_service.{name}" for name in ("tenancy", "auth", "tokens"))
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE_CALLS = ("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load")


@dataclass(frozen=True)
class Rule:
    """What the modules under `importer` may import.

    `ours`: of our own packages nothing but these (None: anything); `forbidden`: never these, ours or not;
    `exempt`: modules that the rule leaves alone.
    """

    importer: str
    ours: tuple[str, ...] | None = None
    forbidden: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()

    def forbids(self, importer: str, target: str) -> bool:
        if not _under(importer, (self.importer,)) or _under(importer, self.exempt):
            return False
        foreign_to_rule = self.ours is not None and _under(target, PACKAGES) and not _under(target, self.ours)
        return foreign_to_rule or _under(target, self.forbidden)


RULES = (
    Rule("protos", ours=("protos",)),
    Rule("weighting_contract", ours=("protos", "weighting_contract")),
    Rule(
        "weighting_contract",
        forbidden=("torch",),
        exempt=tuple(f"weighting_contract.{name}" for name in ("statistics", "ngrams", "columns", "counted")),
    ),
    # The two sides know each other only through the contract; the embedded transport is the service in process.
    Rule("weighting_service", forbidden=("trainer_client",)),
    Rule("trainer_client", forbidden=("weighting_service",), exempt=("trainer_client.transports.embedded",)),
    # Inside the service, from the bottom up.
    Rule(
        "weighting_service.domain",
        ours=("weighting_contract",),
        forbidden=(*SERVE_FRAMEWORKS, *SIDE_EFFECTS, "torch"),
    ),
    Rule("weighting_service.views", ours=("weighting_service.domain", "weighting_contract"), forbidden=("torch",)),
    Rule(
        "weighting_service.weighter",
        ours=(
            "weighting_service.weighter",
            "weighting_service.domain",
            "weighting_service.models_dir",
            "weighting_contract",
        ),
        forbidden=(*SERVE_FRAMEWORKS, *SIDE_EFFECTS),
    ),
    Rule(
        "weighting_service.engine",
        ours=(
            "weighting_service.engine",
            "weighting_service.call_queue",
            "weighting_service.weighter",
            "weighting_service.reference",
            "weighting_service.tracing",
            "weighting_service.domain",
            "weighting_contract",
        ),
        forbidden=SERVE_FRAMEWORKS,
    ),
    Rule(
        "weighting_service.call_queue",
        ours=("weighting_contract",),
        forbidden=(*SERVE_FRAMEWORKS, "torch", "threading", "asyncio"),
    ),
    Rule(
        "weighting_service.follower",
        ours=(
            "weighting_service.states",
            "weighting_service.update_log",
            "weighting_service.failpoints",
            "weighting_service.domain",
            "weighting_contract",
        ),
        forbidden=(*SERVE_FRAMEWORKS, "asyncio"),
    ),
    Rule(
        "weighting_service.states",
        ours=(
            "weighting_service.snapshots",
            "weighting_service.update_log",
            "weighting_service.weighter",
            "weighting_service.pretaught",
            "weighting_service.texts",
            "weighting_service.domain",
            "weighting_contract",
        ),
        forbidden=(*SERVE_FRAMEWORKS, "asyncio"),
    ),
    Rule(
        "weighting_service.reference",
        ours=("weighting_service.reference", "weighting_service.weighter.encoder", "weighting_contract"),
        forbidden=(*SERVE_FRAMEWORKS, *SIDE_EFFECTS),
    ),
    *(
        Rule(
            durable,
            ours=(
                durable,
                "weighting_service.storage",
                "weighting_service.failpoints",
                "weighting_service.domain",
                "weighting_contract",
                "protos",
            ),
            forbidden=SERVE_FRAMEWORKS,
        )
        for durable in DURABLE
    ),
    Rule("weighting_service", forbidden=("sqlite3", "redis"), exempt=("weighting_service.update_log",)),
    Rule(
        "weighting_service.migrate",
        ours=("weighting_service.update_log", "weighting_service.domain", "weighting_contract"),
    ),
    # Who is asking: decided around the use cases, which know nothing of it.
    *(
        Rule(
            f"weighting_service.{part}",
            ours=("weighting_service.tokens", "weighting_contract"),
            forbidden=SERVE_FRAMEWORKS,
        )
        for part in ("auth", "tokens")
    ),
    Rule(
        "weighting_service.tenancy",
        ours=(
            *(f"weighting_service.{name}" for name in ("auth", "core", "domain", "service", "views")),
            "weighting_contract",
        ),
        forbidden=SERVE_FRAMEWORKS,
    ),
    *(
        Rule(f"weighting_service.{part}", forbidden=(*TRANSPORTS, *WIRING, *ACCESS, *SERVE_FRAMEWORKS))
        for part in (
            "service",
            "core",
            "guards",
            "hosting",
            "jobs",
            "leases",
            "loaded",
            "log_watch",
            "profiles",
            "references",
            "roster",
            "scoring",
            "teaching",
            "uploads",
            "views",
        )
    ),
    *(
        Rule(transport, forbidden=(*TRANSPORTS, *WIRING, *COMPUTING, *DURABLE))
        for transport in (
            *TRANSPORTS,
            *(f"weighting_service.{name}" for name in ("rest_door", "rest_json", "rpc", "wire")),
        )
    ),
    # Only the start of the program wires, served or embedded: nothing else knows transports, settings or the app.
    Rule("weighting_service", forbidden=(*TRANSPORTS, *WIRING), exempt=WIRING),
)


def _under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def _modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Dotted name -> file of every module below the packages."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, imported module): `from package import x` names package.x where that is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules else base
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_imports(root: Path) -> list[str]:
    """One `file:line imports X` for every edge that a rule forbids."""
    modules = _modules(root)
    return [
        f"{path.relative_to(root)}:{line} imports {target}"
        for module, path in modules.items()
        for line, target in sorted(set(_imports(module, path, modules)))
        if any(rule.forbids(module, target) for rule in RULES)
    ]


def unsafe_code(root: Path, folders: tuple[str, ...] = (*PACKAGES, "examples", "benchmarks")) -> list[str]:
    """One line for every place that could run code hidden in data: pickle and what is built on it, yaml.load."""
    found = []
    for module, path in _modules(root, folders).items():
        where = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += [
            f"{where}:{line} imports {target}"
            for line, target in _imports(module, path, {})
            if _under(target, UNSAFE_MODULES)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "yaml"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found += [f"{where}:{node.lineno} imports {name}" for name in names & set(UNSAFE_CALLS)]
            if isinstance(node, ast.Call):
                if _dotted(node.func) in UNSAFE_CALLS:
                    found.append(f"{where}:{node.lineno} calls {_dotted(node.func)}")
                if any(k.arg == "allow_pickle" and not _is_false(k.value) for k in node.keywords):
                    found.append(f"{where}:{node.lineno} allows pickle")
    return found


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_imports_point_one_way() -> None:
    assert forbidden_imports(ROOT) == []


def test_nothing_reads_or_writes_pickles() -> None:
    assert unsafe_code(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "edge"),
    [
        ("weighting_service/weighter/model.py", "import torch\nimport sqlite3\n", "2 imports sqlite3"),
        ("weighting_service/weighter/model.py", "from .. import engine\n", "1 imports weighting_service.engine"),
        (
            "weighting_service/weighter/__init__.py",
            "from . import x\nfrom ..jobs import J\n",
            "2 imports weighting_service.jobs",
        ),
        ("weighting_service/service.py", "def f():\n    import fastapi\n", "2 imports fastapi"),
        ("weighting_service/jobs.py", "from trainer_client import connect\n", "1 imports trainer_client"),
        (
            "weighting_service/rest_server.py",
            "from weighting_service import engine\n",
            "1 imports weighting_service.engine",
        ),
        (
            "weighting_service/metrics.py",
            "from weighting_service.settings import S\n",
            "1 imports weighting_service.settings",
        ),
        ("trainer_client/client.py", "import weighting_service.domain as d\n", "1 imports weighting_service.domain"),
        ("weighting_contract/spec.py", "import torch\n", "1 imports torch"),
        ("weighting_service/roster.py", "import redis\n", "1 imports redis"),
        ("weighting_service/tenancy.py", "from . import engine\n", "1 imports weighting_service.engine"),
        (
            "weighting_service/jobs.py",
            "from weighting_service.auth import Caller\n",
            "1 imports weighting_service.auth",
        ),
        ("weighting_service/follower.py", "import asyncio\n", "1 imports asyncio"),
    ],
)
def test_a_forbidden_edge_is_reported_with_file_and_line(tmp_path: Path, file: str, source: str, edge: str) -> None:
    for name in ("weighting_service/engine.py", "weighting_service/__init__.py", file):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name == file else "")
    assert forbidden_imports(tmp_path) == [f"{file}:{edge}"]


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import pickle\n", "1 imports pickle"),
        ("import torch\nx = torch.load('f')\n", "2 calls torch.load"),
        ("from torch import load\n", "1 imports torch.load"),
        ("import numpy\nnumpy.load('f', allow_pickle=True)\n", "2 allows pickle"),
        ("import yaml\nyaml.load('f')\n", "2 calls yaml.load"),
    ],
)
def test_unsafe_code_is_reported(tmp_path: Path, source: str, finding: str) -> None:
    path = tmp_path / "examples" / "own_loop.py"
    path.parent.mkdir()
    path.write_text(source)
    assert unsafe_code(tmp_path) == [f"examples/own_loop.py:{finding}"]


IMPORT_ALL = """
import importlib, logging, signal, sys, threading
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
ours = sys.argv[1:]
for name in ours:
    importlib.import_module(name)
assert threading.enumerate() == [threading.main_thread()], f"threads: {threading.enumerate()}"
assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers, "signal handlers were replaced"
assert not logging.getLogger().handlers, "the root logger was configured"
loud = [name for name in ours if logging.getLogger(name).level or logging.getLogger(name).handlers]
assert not loud, f"loggers were configured: {loud}"
print(len(ours), "modules")
"""


def test_importing_does_no_work(tmp_path: Path) -> None:
    modules = sorted(_modules(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{len(modules)} modules\n", "")
    assert list(tmp_path.iterdir()) == []
