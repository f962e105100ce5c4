"""The REST API of a real server: batch scoring, jobs, health, metrics, documentation, and its errors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ServiceThread
from tests.integration.test_grpc_server import NAMES, TINY_ENCODER, rows

SPEC = {"features": {"names": NAMES}}
SMALL_VOCABULARY = TINY_ENCODER.replace("256", "64")
TEXT_SPEC: dict[str, Any] = {"tokens": {"encoder_config": TINY_ENCODER, "tokenizer": "bytes", "max_tokens": 64}}


def created(rest: httpx.Client, name: str = "w", spec: dict[str, Any] = SPEC) -> dict[str, Any]:
    response = rest.post("/v1/weighters", json={"name": name, "spec": spec})
    assert response.status_code == 200, response.text
    return response.json()


def test_batches_of_rows_texts_and_token_ids_are_scored_without_a_job(rest: httpx.Client) -> None:
    created(rest)
    created(rest, "text", TEXT_SPEC)
    batch = rows(5).tolist()
    scores = rest.post("/v1/weighters/w/score", json={"inputs": {"features": batch}}).json()
    assert scores == {
        "weights": [1.0] * 5,
        "logits": [0.0] * 5,
        "position": 0,
        "effective_sample_size": 5.0,
        "trust": 1.0,
        "computed_samples": 0,
    }
    for inputs in ({"texts": ["one", "two words"]}, {"tokens": [[1, 2, 3], [4]]}):
        response = rest.post("/v1/weighters/text/score", json={"inputs": inputs})
        assert response.json()["weights"] == [1.0, 1.0], response.text


def test_a_job_over_rest(rest: httpx.Client) -> None:
    created(rest)
    job = rest.post("/v1/jobs", json={"weighter": "w", "job_id": "job"}).json()
    assert (job["open"], job["role"], job["last_step"]) == (True, "learn", -1)
    for step in range(15):
        batch = rows(16, step)
        body = {"step": step, "inputs": {"features": batch.tolist()}, "cotangent": (-batch[:, 0]).tolist()}
        taught = rest.post("/v1/jobs/job/meta-updates", json=body).json()
        assert (taught["position"], taught["duplicate"]) == (step + 1, False)
    assert rest.post("/v1/jobs/job/meta-updates", json=body).json()["duplicate"]
    scored = rest.post("/v1/jobs/job/score", json={"inputs": {"features": rows().tolist()}, "min_position": 15}).json()
    assert scored["position"] == 15
    assert len(set(scored["weights"])) > 1
    beat = rest.post("/v1/jobs/job/heartbeat", json={"fallback_steps": 3}).json()
    assert beat == {"position": 15, "applied_position": 15}
    weighter = rest.get("/v1/weighters/w").json()
    assert weighter["learning"]["jobs"]["job"]["updates_applied"] == 15
    assert weighter["learning"]["duplicates"] == 1
    files = rest.get("/v1/weighters/w/export").json()["files"]
    assert json.loads(base64.b64decode(files["config.json"]))
    assert not rest.post("/v1/jobs/job/close").json()["open"]
    assert rest.delete("/v1/weighters/w").status_code == 200
    assert rest.get("/v1/weighters").json() == {"weighters": []}


def test_health_and_metrics(rest: httpx.Client) -> None:
    created(rest)
    assert rest.get("/healthz").json() == {"status": "alive"}
    assert rest.get("/readyz").json() == {"status": "ready"}
    batch = {"inputs": {"features": rows().tolist()}}
    rest.post("/v1/weighters/w/score", json=batch)
    for job_id, role in (("job", "learn"), ("scorer", "frozen")):
        rest.post("/v1/jobs", json={"weighter": "w", "job_id": job_id, "role": role})
        rest.post(f"/v1/jobs/{job_id}/score", json=batch)
    rest.post("/v1/jobs/scorer/meta-updates", json={"step": 0, "cotangent": [1.0] * 8, **batch})
    rest.post("/v1/jobs/nobody/score", json=batch)
    families = {f.name: f for f in text_string_to_metric_families(rest.get("/metrics").text)}
    requests = {
        (s.labels["method"], s.labels["code"], s.labels["job_class"]): s.value
        for s in families["weighbridge_requests"].samples
        if s.name.endswith("_total")
    }
    assert requests == {
        ("CreateWeighter", "OK", "none"): 1,
        ("ScoreOnce", "OK", "none"): 1,
        ("OpenJob", "OK", "learn"): 1,
        ("OpenJob", "OK", "frozen"): 1,
        ("Score", "OK", "learn"): 1,
        ("Score", "OK", "frozen"): 1,
        ("Score", "NOT_FOUND", "none"): 1,
        ("MetaUpdate", "FAILED_PRECONDITION", "frozen"): 1,
    }
    assert families["weighbridge_weighters"].samples[0].value == 1
    samples = {s.name: s.value for s in families["weighbridge_pass_samples"].samples}
    assert samples["weighbridge_pass_samples_sum"] == 24


def test_documentation(rest: httpx.Client) -> None:
    assert "Weighbridge" in rest.get("/docs").text
    paths = rest.get("/openapi.json").json()["paths"]
    assert {"/v1/weighters/{name}/score", "/v1/jobs/{job_id}/meta-updates", "/readyz", "/metrics"} <= set(paths)
    assert {"/v1/score", "/v1/references", "/v1/references/{name}"} <= set(paths)


SCORE = "/v1/weighters/w/score"
MISTAKES = [
    (SCORE, {"inputs": {"features": [[1, 2]]}}, 400, ["features", "[1, 2]", "[B, 3]"]),
    (SCORE, {"inputs": {"features": [[1, 2, 3], [4]]}}, 400, ["features[1] has 1 columns"]),
    (SCORE, {"inputs": {"features": []}}, 400, ["features"]),
    (SCORE, {"inputs": {"features": [[1, 2, "x"]]}}, 400, ["inputs.features.0.2", "number"]),
    (SCORE, {"inputs": {"rows": [[1]]}}, 400, ["inputs.rows"]),
    (SCORE, {}, 400, ["inputs"]),
    (SCORE, {"inputs": {"texts": ["a"]}}, 400, ["features are missing"]),
    (SCORE, {"inputs": {"features": [[1, 2, 3]]}, "feature_names": ["a", "b", "c"]}, 400, ["not in the spec"]),
    ("/v1/weighters/nobody/score", {"inputs": {"features": [[1]]}}, 404, ["'nobody'"]),
    ("/v1/weighters", {"name": "w", "spec": SPEC}, 409, ["'w' exists"]),
    ("/v1/weighters", {"name": "x", "spec": {"featurs": {}}}, 400, ["'featurs'", "features"]),
    ("/v1/weighters", {"name": "x", "spec": {"features": {"names": "loss"}}}, 400, ["spec.features.names"]),
    ("/v1/weighters", {"name": "x", "spec": SPEC | {"seed": -1}}, 400, ["spec.seed is -1"]),
    ("/v1/jobs", {"weighter": "w", "role": "boss"}, 400, ["role", "learn"]),
    ("/v1/jobs/none/score", {"inputs": {"features": [[1]]}}, 404, ["'none'", "open it"]),
    ("/v1/nothing", {}, 404, ["/v1/nothing", "/docs"]),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MISTAKES)
def test_a_mistake_gets_one_clear_sentence(
    rest: httpx.Client, path: str, body: dict[str, Any], status: int, words: list[str]
) -> None:
    created(rest)
    response = rest.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"]
    for word in words:
        assert word in error["message"]


def test_bodies_that_are_no_json(rest: httpx.Client) -> None:
    created(rest)
    broken = rest.post(SCORE, content=b"{not json", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "INVALID_ARGUMENT")
    unlimited = rest.post(SCORE, content=iter([b"{}"]))
    assert unlimited.status_code == 411
    infinite = rest.post(
        SCORE, content=b'{"inputs": {"features": [[1, 2, 1e999]]}}', headers={"content-type": "application/json"}
    )
    assert infinite.status_code == 400, infinite.text


def test_a_body_over_the_limit(tmp_path: Path) -> None:
    running = ServiceThread(tmp_path / "state", max_message_mb=1)
    try:
        refused = httpx.post(running.address.rest_url + SCORE, content=bytes((1 << 20) + 1))
    finally:
        running.stop()
    assert refused.status_code == 413
    assert "1048577 bytes" in refused.json()["error"]["message"]
    assert "at most 1048576" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/weighters", {"name": "x", "spec": {"features": {"names": ["a\ud800"]}}}, "not valid Unicode"),
        ("/v1/weighters/text/score", {"inputs": {"texts": ["\ud800"]}}, "texts[0] is"),
        ("/v1/weighters/text/score", {"inputs": {"texts": []}}, "texts has no rows"),
        ("/v1/weighters/text/score", {"inputs": {"tokens": []}}, "tokens has no rows"),
        ("/v1/weighters/text/score", {"inputs": {"tokens": [[1], []]}}, "tokens[1] has no tokens"),
        (SCORE, {"inputs": {"features": []}}, "features has no rows"),
        (SCORE, {"inputs": {"features": [[1, 2, 1e39]]}}, "features[0, 2] is 1e+39"),
        (SCORE, {"inputs": {"features": [[1, 2, 3], [4]]}}, "features[1] has 1 columns, but features[0] has 3"),
        ("/v1/jobs/j/meta-updates", {"step": 10**20, "inputs": {}, "cotangent": []}, "step: "),
        ("/v1/jobs/j/heartbeat", {"fallback_steps": 10**20}, "fallback_steps: "),
        (
            "/v1/weighters",
            {
                "name": "x",
                "spec": {"tokens": TEXT_SPEC["tokens"] | {"encoder_config": SMALL_VOCABULARY}},
            },
            "at least 256",
        ),
        (
            "/v1/weighters",
            {"name": "x", "spec": {"tokens": {"encoder_config": '{"model_type": "no-such-model"}'}}},
            "no-such-model",
        ),
    ],
)
def test_extreme_values_are_mistakes_like_others(
    rest: httpx.Client, path: str, body: dict[str, Any], words: str
) -> None:
    created(rest)
    created(rest, "text", TEXT_SPEC)
    content = json.dumps(body).encode()  # ASCII, with lone surrogates as escapes
    response = rest.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert words in message
    assert len(message) < 600
    assert {w["name"] for w in rest.get("/v1/weighters").json()["weighters"]} == {"w", "text"}
