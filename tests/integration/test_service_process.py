"""`python -m weighting_service` as an operator meets it: start, SIGTERM, SIGKILL, restart, mistakes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from tests.integration.test_grpc_server import features, opened, rows, update
from weighting_contract.tensors import from_message

Start = Callable[..., Any]


def stub_of(process: Any) -> Any:
    return WeightingServiceStub(grpc.insecure_channel(f"127.0.0.1:{process.address.grpc_port}"))


def score(stub: Any, position: int) -> np.ndarray:
    response = stub.Score(
        pb.ScoreRequest(job_id="job", inputs=features(rows(32, 5)), min_position=position), wait_for_ready=True
    )
    assert response.position == position
    return from_message(response.weights, "weights")


@pytest.mark.parametrize("ending", ["kill", "terminate"])
def test_a_restarted_service_goes_on_where_it_was(start_process: Start, ending: str) -> None:
    process = start_process("--snapshot-every", "7")
    stub = stub_of(process)
    opened(stub)
    for step in range(25):
        assert stub.MetaUpdate(update(step, rows(16, step))).position == step + 1
    before = score(stub, 25)
    status = getattr(process, ending)()
    if ending == "terminate":
        assert status == 0
    process.start()
    stub = stub_of(process)
    np.testing.assert_array_equal(score(stub, 25), before)
    again = stub.MetaUpdate(update(3, rows(16, 3)))
    assert (again.position, again.duplicate) == (4, True)
    assert stub.MetaUpdate(update(25, rows(16, 25))).position == 26
    assert process.terminate() == 0


def test_help_documents_every_setting() -> None:
    done = subprocess.run([sys.executable, "-m", "weighting_service", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    from weighting_service.settings import Settings

    words = " ".join(done.stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in words
        assert field.description
        assert field.description.split(";")[0].split()[0] in words


def failing(*flags: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "weighting_service", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert "unrecognized arguments: --nonsense" in failing("--nonsense", "1")
    assert "--grpc-port: " in failing("--grpc-port", "99999")
    assert "'gpu' is not a device" in failing("--device", "gpu")
    assert "--max-message-mb: " in failing(WEIGHBRIDGE_MAX_MESSAGE_MB="0")
    assert "expected a TOML file" in failing("--config", str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("rest_port =")
    assert "is not TOML" in failing("--config", str(broken))
    unknown = tmp_path / "unknown.toml"
    unknown.write_text("rest_prot = 1")
    assert "rest-prot" in failing("--config", str(unknown))
    file = tmp_path / "file"
    file.write_text("")
    assert "--state is" in failing("--state", str(file / "x"), "--rest-port", "0", "--grpc-port", "0")


def test_rest_answers_are_not_held_back() -> None:
    """asyncio switches Nagle's delay off for sockets that say they are TCP, and for no others."""
    from weighting_service.app import _listen

    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        common = ("--state", str(tmp_path / "state"))
        assert f"127.0.0.1:{port}" in failing(*common, "--rest-port", port, "--grpc-port", "0")
        assert f"127.0.0.1:{port}" in failing(*common, "--grpc-port", port, "--rest-port", "0")


def test_flag_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weighting_service.settings import load_settings

    file = tmp_path / "settings.toml"
    file.write_text("grpc_port = 1\nrest_port = 2\ndrain_s = 3.5\n")
    monkeypatch.setenv("WEIGHBRIDGE_CONFIG", str(file))
    monkeypatch.setenv("WEIGHBRIDGE_REST_PORT", "20")
    settings = load_settings(["--grpc-port", "10"])
    assert (settings.grpc_port, settings.rest_port, settings.drain_s) == (10, 20, 3.5)
