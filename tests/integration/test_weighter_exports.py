"""Weighters that start from an export, over every transport, after restarts, and on replicas of one log."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Address, ServiceThread
from tests.waiting import wait_for
from trainer_client import Client, Timeouts, connect
from weighting_contract.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from weighting_contract.export import check_export, export_files
from weighting_service.domain import Inputs
from weighting_service.embedded import EmbeddedService
from weighting_service.weighter import Weighter

SPEC = {"features": {"names": ["loss", "length", "easy"]}, "head": {"width": 8, "attention_heads": 2}}
PATIENT = Timeouts(score_s=60, meta_update_s=60, admin_s=60, close_s=60)


def rows(seed: int, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(8, columns)).astype(np.float32)


def teach(client: Client, weighter: str, steps: range, **opening: Any) -> None:
    """Updates that do not depend on where they are sent."""
    with client.open_job(f"job-of-{weighter}", weighter=weighter, **opening) as job:
        for step in steps:
            job.meta_update(rows(1000 + step)[:, 0], rows(step), step)
        assert job.flush()
        position = job.last_position
    wait_for(lambda: client.get_weighter(weighter).applied_position >= position)


def taught_export(client: Client, folder: Path, updates: int = 4) -> Path:
    client.create_weighter("teacher", SPEC)
    teach(client, "teacher", range(updates))
    return client.export_weighter("teacher", folder)


@pytest.fixture(params=["grpc", "rest", "embedded"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    url = f"embedded://{tmp_path / 'embedded'}"
    if request.param != "embedded":
        service: Address = request.getfixturevalue("service")
        url = {"grpc": service.grpc_url, "rest": service.rest_url}[request.param]
    with connect(url, timeouts=PATIENT, on_failure="raise") as client:
        yield client


# ---- Starting from an export ----------------------------------------------------------------------------------------


def test_a_weighter_starts_where_the_export_ended(client: Client, tmp_path: Path) -> None:
    folder = taught_export(client, tmp_path / "export")
    info = check_export(export_files(folder), "it")
    made = client.create_weighter("mine", initial=folder)
    assert (made.position, made.initial) == (0, f"export:{info.checksum}")
    assert made.spec == client.get_weighter("teacher").spec
    with client.open_job(weighter="mine") as mine, client.open_job(weighter="teacher") as teacher:
        weights = mine.score(rows(99)).weights
        assert np.array_equal(weights, teacher.score(rows(99)).weights)
        direct = Weighter.from_pretrained(folder).score([Inputs(features=rows(99))])[0]
        np.testing.assert_allclose(weights, direct.weights, rtol=1e-5)
        assert weights.std() > 0, "a fresh weighter weighs all alike"
    again = client.export_weighter("mine", tmp_path / "again")
    assert check_export(export_files(again), "it").checksum == info.checksum
    assert f"It started from {made.initial}." in (again / "README.md").read_text()


def test_the_same_again_is_the_same_weighter_and_another_is_refused(client: Client, tmp_path: Path) -> None:
    folder = taught_export(client, tmp_path / "export")
    made = client.create_weighter("mine", initial=str(folder))
    assert client.create_weighter("mine", initial=folder).created_unix_ms == made.created_unix_ms
    with client.open_job(weighter="mine", initial=folder) as job:
        assert job.score(rows(1)).position == 0
    with client.open_job(weighter="made-by-the-job", initial=folder):
        assert client.get_weighter("made-by-the-job").initial == made.initial
    teach(client, "teacher", range(4, 5))
    later = client.export_weighter("teacher", tmp_path / "later")
    for initial in (later, ""):
        with pytest.raises(AlreadyExists, match=r"'mine' exists and started from export:\w{64}, asked for (exp|fresh)"):
            client.create_weighter("mine", SPEC, initial=initial)
    spec = {"learning": {"learning_rate": 0.5}}
    faster = client.create_weighter("faster", spec, initial=folder)
    assert (faster.spec.learning.learning_rate, faster.initial) == (0.5, made.initial)


def test_exports_that_do_not_fit_name_the_difference(client: Client, tmp_path: Path) -> None:
    folder = taught_export(client, tmp_path / "export", 1)
    client.create_weighter("sized", {"features": {"names": ["loss"], "hidden_size": 4, "tokenizer_checksum": "a" * 64}})
    sized = client.export_weighter("sized", tmp_path / "sized")
    for given, initial, words in (
        ({"features": {"names": ["loss", "length"]}}, folder, r"only in the export \['easy'\], only here \[\]"),
        (
            {"features": {"names": ["loss"], "hidden_size": 8}},
            sized,
            r"hidden_size is 4 in the export and 8 here, and a",
        ),
        (
            {"features": {"names": ["loss"], "hidden_size": 4}},
            sized,
            r"tokenizer_checksum is aaaaaaaaaaaa\.\.\. in the",
        ),
        ({"head": {"width": 16}}, folder, r"spec\.head\.width is 8 in the export and 16 here"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            client.create_weighter("mine", given, initial=initial)
    client.create_weighter("mine", initial=sized)
    with pytest.raises(FailedPrecondition, match=r"takes samples of the tokenizer aaaaaaaaaaaa\.\.\."):
        client.open_job(weighter="mine", tokenizer_checksum="b" * 64)
    with pytest.raises(InvalidArgument, match=r"feature_names don't fit .* missing \['loss'\]"):
        client.open_job(weighter="mine", tokenizer_checksum="a" * 64, feature_names=["length"])
    with client.open_job(weighter="mine", tokenizer_checksum="a" * 64) as job:
        words = (
            r"hidden has shape \[8, 6\], expected \[B, 4\] .*a pooled hidden state does not travel between model sizes"
        )
        with pytest.raises(InvalidArgument, match=words):
            job.score(rows(0, 1), hidden=rows(0, 6))


def test_damaged_folders_are_refused_before_anything_is_sent(client: Client, tmp_path: Path) -> None:
    folder = taught_export(client, tmp_path / "export", 1)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(InvalidArgument, match=r"export: model\.safetensors .* truncated or changed"):
        client.create_weighter("mine", initial=folder)
    with pytest.raises(InvalidArgument, match=r"export: model\.safetensors .* truncated or changed"):
        client.open_job(weighter="mine", initial=folder)
    with pytest.raises(
        InvalidArgument, match="there is no exported weighter at nowhere: expected a folder with config"
    ):
        client.create_weighter("mine", initial="nowhere")
    assert [weighter.name for weighter in client.list_weighters()] == ["teacher"]


def test_files_over_rest(rest: httpx.Client, tmp_path: Path) -> None:
    rest.post("/v1/weighters", json={"name": "teacher", "spec": SPEC}).raise_for_status()
    files = rest.get("/v1/weighters/teacher/export").json()["files"]
    made = rest.post("/v1/weighters", json={"name": "mine", "files": files})
    assert made.status_code == 200, made.text
    assert made.json()["initial"].startswith("export:")
    damaged = base64.b64encode(base64.b64decode(files["model.safetensors"])[:-4]).decode()
    config = json.loads(base64.b64decode(files["config.json"]))
    unchecked = {name: value for name, value in config.items() if not name.endswith("sha256")}
    plain = base64.b64encode(json.dumps(unchecked).encode()).decode()
    for body, words in (
        ({"files": files, "initial": "pretaught"}, "files of an export are given too"),
        ({"files": {**files, "config.json": "!"}}, "files.config.json is not base64"),
        ({"files": {**files, "evil.py": ""}}, "'evil.py' is no file of an exported weighter"),
        ({"files": {"config.json": files["config.json"]}}, "the export: model.safetensors is missing"),
        ({"files": {**files, "model.safetensors": damaged}}, "it was truncated or changed"),
        ({"files": {"config.json": plain, "model.safetensors": damaged}}, "model.safetensors is damaged"),
    ):
        refused = rest.post("/v1/weighters", json={"name": "other", **body})
        assert (refused.status_code, words in refused.json()["error"]["message"]) == (400, True), refused.text
    assert [weighter["name"] for weighter in rest.get("/v1/weighters").json()["weighters"]] == ["mine", "teacher"]


def test_a_request_is_as_large_as_the_service_takes(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    large = {"features": {"names": ["loss"]}, "head": {"width": 256, "layers": 1}}
    with connect("embedded", timeouts=PATIENT) as here:
        here.create_weighter("large", large)
        here.export_weighter("large", folder)
        assert (folder / "model.safetensors").stat().st_size > 2**20
    service = ServiceThread(tmp_path / "state", max_message_mb=1)
    try:
        for url in (service.address.grpc_url, service.address.rest_url):
            with connect(url, timeouts=PATIENT) as client, pytest.raises(InvalidArgument, match="max-message-mb"):
                client.create_weighter("large", initial=folder)
    finally:
        service.stop()


# ---- Restarts -------------------------------------------------------------------------------------------------------


def state(service: EmbeddedService, name: str) -> tuple[dict[str, bytes], str]:
    """Every bit of a weighter."""
    weighter = service._service._weighters._entries[name].weighter
    tensors = {key: tensor.numpy().tobytes() for key, tensor in weighter.state_tensors().items()}
    return tensors, json.dumps(weighter.state_metadata(), sort_keys=True)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_restart_gives_the_same_state_without_the_export(tmp_path: Path, replayed: bool) -> None:
    """From the last snapshot, or, where that is lost, from the one of the beginning and the log."""
    url, folder = f"embedded://{tmp_path / 'state'}", tmp_path / "export"
    with connect(url, timeouts=PATIENT, on_failure="raise") as client:
        taught_export(client, folder)
        client.create_weighter("mine", initial=folder)
        teach(client, "mine", range(10, 16))
        exported = export_files(client.export_weighter("mine", tmp_path / "before"))
    shutil.rmtree(folder)
    service = EmbeddedService(tmp_path / "state")
    before = state(service, "mine")
    service.close()
    if replayed:
        for path in (tmp_path / "state").rglob("*6.safetensors"):
            path.unlink()
    again = EmbeddedService(tmp_path / "state")
    try:
        wait_for(lambda: again._service._weighters._entries["mine"].applied == 6)
        assert state(again, "mine") == before
    finally:
        again.close()
    with connect(url, timeouts=PATIENT) as client:
        assert export_files(client.export_weighter("mine", tmp_path / "after")) == exported
        assert client.get_weighter("mine").initial.startswith("export:")


def test_without_its_first_snapshot_it_is_refused_and_not_begun_anew(tmp_path: Path) -> None:
    url, folder = f"embedded://{tmp_path / 'state'}", tmp_path / "export"
    with connect(url, timeouts=PATIENT, on_failure="raise") as client:
        taught_export(client, folder)
        client.create_weighter("mine", initial=folder)
        uid = [path.parent for path in (tmp_path / "state").rglob("0*.safetensors")]
    for path in {*uid}:
        shutil.rmtree(path)
    with connect(url, timeouts=PATIENT) as client, pytest.raises(Exception, match="it began with given parameters"):
        client.get_weighter("mine")
