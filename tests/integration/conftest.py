"""A scripted service, and a small job of `python -m trainer_client.run` with its data and a finished run of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripted_service import ScriptedServer, ScriptedService
from small_job import write_data

from trainer_client.run.__main__ import main


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A service that does what a test says."""
    server = ScriptedServer(ScriptedService())
    yield server
    server.stop()


@pytest.fixture
def same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of tokenizers, references and data sets, also of the processes that are started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> list[str]:
    """Flags of a small job: two sources to train on, the target is one of them."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted job: selection and weighting at once, compared with the plainer ways."""
    out = tmp_path_factory.mktemp("finished") / "out"
    compare = ["--compare", "uniform", "dsir", "weight", "weight-scratch"]
    assert main([*data, "--mode", "both", *compare, "--out", str(out)]) == 0
    return out
