"""URLs, settings, and what importing the client needs."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from trainer_client import Limits, Timeouts, connect
from weighting_contract.errors import InvalidArgument


@pytest.mark.parametrize(
    "url",
    ["grpc://localhost:1", "grpc://a:1,b:2", "grpc://[::1]:50051", "http://localhost:8080", "https://host/prefix/"],
)
def test_connecting_contacts_nothing(url: str) -> None:
    connect(url).close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:50051",
        "grpc://",
        "grpc://localhost",
        "grpc://localhost:port",
        "grpc://localhost:0",
        "grpc://localhost:70000",
        "grpc://a:1,,b:2",
        "grpc://a:1/path",
        "grpc://user@a:1",
        "ftp://localhost:21",
        "http://",
        "http://host:99999",
        "http://host?x=1",
        "embedded://relative/path",
        "embedded:/path",
        None,
    ],
)
def test_a_malformed_url_is_a_clear_error(url: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"url is .*expected"):
        connect(url)


def test_an_unknown_failure_mode_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'uniform' or 'raise'"):
        connect(on_failure="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "1", None, True])
def test_timeouts_and_limits_are_finite_and_positive(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"Timeouts.score_s is .*finite"):
        Timeouts(score_s=value)
    with pytest.raises(InvalidArgument, match=r"Limits.heartbeat_s is .*finite"):
        Limits(heartbeat_s=value)


def test_limits_fit_each_other() -> None:
    with pytest.raises(InvalidArgument, match="at least breaker_period_s"):
        Limits(breaker_period_s=100)
    with pytest.raises(InvalidArgument, match="whole number"):
        Limits(pending_updates=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "teach"}, "role is 'teach'"),
        ({"spec": {"featurez": {}}}, "featurez"),
        ({"spec": {}}, "neither features nor tokens"),
        ({"feature_names": "loss"}, "expected a list"),
        ({"tokenizer_checksum": "a" * 63}, "tokenizer_checksum is 'a+', expected a SHA-256"),
        ({"reference_checksum": "b" * 64}, "reference_checksum is given without a reference"),
        ({"reference": "r", "reference_checksum": "short"}, "reference_checksum is 'short', expected a SHA-256"),
        ({"profile": [[1, 2]]}, "profile is given without a reference"),
        ({"reference": "r", "profile": "validation.txt"}, "profile is a string"),
        ({"reference": "r", "profile": []}, "profile has no documents"),
        ({"reference": "r", "profile": [[1, 2], []]}, r"profile\[1\] is float64 of shape \[0\]"),
        ({"reference": "r", "profile": [[1.5]]}, r"profile\[0\] is float64"),
    ],
)
def test_arguments_that_can_not_be_right_are_refused_before_any_contact(
    arguments: dict[str, Any], message: str
) -> None:
    with connect("grpc://localhost:1") as client, pytest.raises(InvalidArgument, match=message):
        client.open_job(**arguments)


def test_a_weighter_needs_a_spec_or_a_beginning() -> None:
    with connect("grpc://localhost:1") as client, pytest.raises(InvalidArgument, match="neither spec nor initial"):
        client.create_weighter("w")


def test_files_of_a_reference_are_a_list() -> None:
    with connect("grpc://localhost:1") as client, pytest.raises(InvalidArgument, match="expected a list of names"):
        client.get_reference("r", "tokenizer.json")


WITHOUT_EXTRAS = """
import sys
for name in ("torch", "fastapi", "uvicorn", "pydantic_settings", "transformers", "safetensors"):
    sys.modules[name] = None
import numpy, trainer_client
from trainer_client.select import Selector
from weighting_contract.errors import InvalidArgument
assert not [name for name in sys.modules if name.startswith("weighting_service")]
with trainer_client.connect("grpc://127.0.0.1:9", timeouts=trainer_client.Timeouts(admin_s=0.2)) as client:
    with client.open_job() as job:
        print(job.score(numpy.ones((2, 3)), 0).weights.tolist())
        selector = Selector(job, keep=2, probes=1)
        selector.submit(0, numpy.ones((4, 3), int))
        print(selector.result(0).kept.tolist())
    with client.open_job(reference="r", profile=[[1, 2], numpy.array([3])]) as job:
        assert not job.attached
try:
    trainer_client.connect("embedded")
except InvalidArgument as exc:
    print(exc.message)
"""


def test_the_client_needs_neither_torch_nor_a_server() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    weights, kept, message = run.stdout.splitlines()
    assert (weights, kept) == ("[1.0, 1.0]", "[0, 1]")
    assert "pip install 'weighbridge[server,torch]'" in message
