"""The main job against a real remote service: two trainers at once, and a service that dies in the middle of a run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from trainer_client.run.metrics import read_metrics

WORDS = "the weights of a batch say how much each sample counts when the loss of the model is taken over it".split()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name, documents in (("train", 60), ("val", 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(documents):
                words = [WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(60)]
                text = " ".join(words) if i % 2 or name == "val" else " ".join(str(i * j) for j in range(60))
                file.write(json.dumps({"text": f"{i} {text}", "source": "words" if i % 2 else "numbers"}) + "\n")
    small = "--vocab-size 300 --seq-len 16 --batch-size 8 --candidates 3 --probes 2 --meta-batch 4 --val-batch 4"
    rest = "--warmup-steps 2 --threads 1"
    return ["--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), *small.split(), *rest.split()]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def trainer(flags: list[str], url: str, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer_client.run", *flags, "--weighter", url, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return json.loads((out / "summary.json").read_text())


def test_two_trainers_at_once_share_a_weighter_or_have_one_each(
    flags: list[str], start_process: Callable[..., Any], tmp_path: Path
) -> None:
    address = start_process().address
    plan = {"a": "shared", "b": "shared", "c": "own"}
    jobs = {}
    for seed, (name, weighter) in enumerate(plan.items()):
        chosen = ("--weighter-name", weighter, "--seed", str(seed), "--steps", "48")
        jobs[name] = trainer(flags, address.grpc_url, tmp_path / name, *chosen)
    summaries = {name: finished(process, tmp_path / name) for name, process in jobs.items()}
    taught = {name: s["weighter"]["client"]["updates_acknowledged"] for name, s in summaries.items()}
    asked = sum(s["weighter"]["client"]["selected"] for s in summaries.values())
    assert all(s["weighter"]["client"]["selected"] == s["steps"] - s["fallback_steps"] for s in summaries.values())
    assert len({s["reference"]["checksum"] for s in summaries.values()}) == 1  # one pool, one reference for all
    weighters = {w["name"]: w for w in httpx.get(address.rest_url + "/v1/weighters").json()["weighters"]}
    positions = {name: w["position"] for name, w in weighters.items()}
    assert positions == {"shared": taught["a"] + taught["b"], "own": taught["c"]}
    assert {n: w["learning"]["updates_applied"] for n, w in weighters.items()} == positions
    by_job = sorted(j["updates_applied"] for j in weighters["shared"]["learning"]["jobs"].values())
    assert by_job == sorted(n for n in (taught["a"], taught["b"]) if n)
    assert all(w["jobs_open"] == 0 for w in weighters.values())
    families = text_string_to_metric_families(httpx.get(address.rest_url + "/metrics").text)
    requests = next(f for f in families if f.name == "weighbridge_requests").samples
    scored = sum(s.value for s in requests if s.labels == {"method": "Score", "code": "OK", "job_class": "learn"})
    assert 0 < asked <= scored  # an answer that came too late was a fallback for its trainer


def test_a_service_that_is_late_and_dies_costs_selections_and_nothing_else(
    flags: list[str], start_process: Callable[..., Any], tmp_path: Path
) -> None:
    service = start_process()
    service.kill()  # its address is known, and nobody is there
    out = tmp_path / "out"
    often = ("--meta-first", "0", "--meta-every", "4")  # lest its first lessons be over before the service is there
    process = trainer(flags, service.address.grpc_url, out, "--steps", "100000", "--eval-every", "100000", *often)
    metrics = out / "select" / "metrics.jsonl"

    def steps(selected: int) -> int:
        return sum(line["selected"] == selected for line in read_metrics(metrics)) if metrics.exists() else 0

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            with suppress(subprocess.TimeoutExpired):  # leaves the processor to those that are waited for
                process.wait(0.1)
            assert process.poll() is None, process.communicate()[0]

    wait_for(lambda: steps(selected=0) >= 3)
    service.start()
    wait_for(lambda: steps(selected=1) >= 8)  # the trainer gave it the reference and opened its job
    service.kill()
    unselected = steps(selected=0)
    wait_for(lambda: steps(selected=0) >= unselected + 5)
    selected = steps(selected=1)
    service.start()
    wait_for(lambda: steps(selected=1) >= selected + 8)  # again, in the same run
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    learned = httpx.get(service.address.rest_url + "/v1/weighters/default").json()
    assert learned["position"] == learned["learning"]["updates_applied"] > 0
    assert learned["position"] >= max(line["position"] for line in read_metrics(metrics)) > 0
