"""References and the pretaught weighter on a real server: uploads, mistakes, what is packaged, texts by `curl`."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from safetensors.numpy import load as load_tensors

from protos.weighting.v1 import weighting_pb2 as pb
from tests.conftest import ServiceThread
from tests.integration.test_token_scoring import failing
from tests.integration.token_jobs import (
    FILES,
    OTHER_FILES,
    by_hand,
    documents,
    documents_message,
    opened,
    opinionated,
    scored,
)
from tests.unit import reference_models as models
from weighting_contract.columns import COLUMNS
from weighting_contract.reference import write_reference
from weighting_contract.tensors import from_message
from weighting_service.pretaught import weighter_folder
from weighting_service.reference import load_reference

# ---- References -----------------------------------------------------------------------------------------------------


def put(stub: Any, name: str = "ref", files: dict[str, bytes] = FILES, **fields: Any) -> pb.Reference:
    return stub.PutReference(pb.PutReferenceRequest(name=name, files=files, **fields))


def test_a_reference_from_upload_to_deletion(stub: Any) -> None:
    made = put(stub)
    assert (made.vocab_size, made.seq_len, made.ngram_buckets) == (models.VOCABULARY, models.SEQ_LEN, models.BUCKETS)
    assert (made.trained_on, made.loaded, dict(made.files)) == ("nothing", False, {})
    assert put(stub, exist_ok=True) == made
    failing(lambda: put(stub), "ALREADY_EXISTS", "'ref' exists", "exist_ok")
    failing(lambda: put(stub, files=OTHER_FILES, exist_ok=True), "ALREADY_EXISTS", "immutable")
    failing(lambda: put(stub, "pretaught", exist_ok=True), "ALREADY_EXISTS", "'pretaught'")
    got = stub.GetReference(pb.GetReferenceRequest(name="ref", files=["tokenizer.json", "reference.json"]))
    assert dict(got.files) == {name: FILES[name] for name in ("tokenizer.json", "reference.json")}
    opened(stub)
    delete = pb.DeleteReferenceRequest(name="ref")
    failing(lambda: stub.DeleteReference(delete), "FAILED_PRECONDITION", "'ref'", "'job'")
    assert stub.GetReference(pb.GetReferenceRequest(name="ref")).loaded
    stub.CloseJob(pb.CloseJobRequest(job_id="job"))
    stub.DeleteReference(delete)
    failing(lambda: stub.DeleteReference(delete), "NOT_FOUND", "'ref'", "pretaught")
    assert [r.name for r in stub.ListReferences(pb.ListReferencesRequest()).references] == ["pretaught"]
    put(stub, files=OTHER_FILES)  # a name can be used again
    reopening = pb.OpenJobRequest(weighter="w", job_id="job", reference=pb.JobReference(name="ref"))
    failing(lambda: stub.OpenJob(reopening), "FAILED_PRECONDITION", "'job' was opened with the reference 'ref'")


def test_a_reference_without_a_model(stub: Any) -> None:
    counted, rows = models.counted_reference(), models.random_rows(3, 12)
    put(stub, files=counted)
    got = stub.GetReference(pb.GetReferenceRequest(name="ref", files=["config.json", "counts.safetensors"]))
    assert dict(got.files) == {"counts.safetensors": counted["counts.safetensors"]}
    opinionated(stub, "w")
    request = {"reference": pb.JobReference(name="ref"), "profile": documents_message(documents(0))}
    stub.OpenJob(pb.OpenJobRequest(weighter="w", job_id="job", **request))
    response = scored(stub, rows, return_statistics=True)
    with tempfile.TemporaryDirectory() as folder:
        reference = load_reference(write_reference(Path(folder) / "r", counted))
    expected = by_hand(reference, rows, COLUMNS, documents(0))
    np.testing.assert_allclose(from_message(response.statistics, "statistics"), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(from_message(response.weights, "weights")) > 0.01


def without(name: str) -> dict[str, bytes]:
    return {file: content for file, content in FILES.items() if file != name}


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("a/b", FILES, ["name is 'a/b'"]),
        (".hidden", FILES, ["name is '.hidden'"]),
        ("x", without("tokenizer.json"), ["tokenizer.json is missing"]),
        ("x", {**FILES, "evil.py": b""}, ["'evil.py' is no file of a reference"]),
        ("x", {**FILES, "model.safetensors": FILES["model.safetensors"][:-8]}, ["model.safetensors is truncated"]),
        ("x", {**FILES, "tokenizer.json": b"{}"}, ["another tokenizer"]),
        ("x", {**FILES, "config.json": b"{}"}, ["the files have the checksum"]),
    ],
)
def test_uploads_that_are_no_reference(stub: Any, name: str, files: dict[str, bytes], words: list[str]) -> None:
    failing(lambda: put(stub, name, files), "INVALID_ARGUMENT", *words)
    assert len(stub.ListReferences(pb.ListReferencesRequest()).references) == 1


def test_files_that_are_none_of_a_reference(stub: Any) -> None:
    request = pb.GetReferenceRequest(name="pretaught", files=["../log.sqlite"])
    failing(lambda: stub.GetReference(request), "INVALID_ARGUMENT", "'../log.sqlite'", "tokenizer.json")


def test_references_over_rest(rest: httpx.Client) -> None:
    body = {"files": {name: base64.b64encode(content).decode() for name, content in FILES.items()}}
    made = rest.put("/v1/references/ref", json=body)
    assert made.status_code == 200, made.text
    assert made.json()["vocab_size"] == models.VOCABULARY
    assert rest.put("/v1/references/ref", json=body).status_code == 409
    assert rest.put("/v1/references/ref", json={**body, "exist_ok": True}).json() == made.json()
    files = rest.get("/v1/references/ref?files=tokenizer.json&files=config.json").json()["files"]
    assert {name: base64.b64decode(content) for name, content in files.items()} == {
        name: FILES[name] for name in ("tokenizer.json", "config.json")
    }
    assert [r["name"] for r in rest.get("/v1/references").json()["references"]] == ["pretaught", "ref"]
    broken = rest.put("/v1/references/x", json={"files": {**body["files"], "config.json": "!"}})
    assert (broken.status_code, "files.config.json is not base64" in broken.text) == (400, True)
    assert rest.delete("/v1/references/ref").json() == {}
    assert rest.get("/v1/references/ref").status_code == 404


def test_a_job_with_a_reference_over_rest(rest: httpx.Client) -> None:
    body = {"files": {name: base64.b64encode(content).decode() for name, content in FILES.items()}}
    rest.put("/v1/references/ref", json=body)
    rest.post("/v1/weighters", json={"name": "w", "initial": "pretaught"})
    profile = {"documents": [row.tolist() for row in documents(0)]}
    job = rest.post(
        "/v1/jobs", json={"weighter": "w", "job_id": "job", "reference": {"name": "ref"}, "profile": profile}
    ).json()
    assert (job["reference"], len(job["documents_checksum"])) == ("ref", 64)
    rows = [row.tolist() for row in models.random_rows(0, 8)]
    asked = {"inputs": {"tokens": rows}, "return_statistics": True, "min_effective_share": 0.9}
    scores = rest.post("/v1/jobs/job/score", json=asked).json()
    assert np.shape(scores["statistics"]) == (8, len(job["spec"]["features"]["names"]))
    assert (scores["effective_sample_size"] >= 7.2 - 1e-3, scores["trust"]) == (True, 1)
    assert scores["computed_samples"] == 8
    asked["inputs"]["tokens"] = [*rows, [5, 6, 7]]
    assert rest.post("/v1/jobs/job/score", json=asked).json()["computed_samples"] == 1
    lesson = {
        "step": 0,
        "inputs": {"features": scores["statistics"]},
        "cotangent": list(range(8)),
        "probes": [1, 1, 0, 0, 0, 0, 0, 1],
        "estimator": "score_function",
    }
    assert rest.post("/v1/jobs/job/meta-updates", json=lesson).json()["position"] == 1
    trust = {**lesson, "step": 1, "trust_only": True}
    assert rest.post("/v1/jobs/job/meta-updates", json=trust).json()["position"] == 2
    wrong = rest.post("/v1/jobs/job/meta-updates", json={**lesson, "step": 2, "probes": [1, 2]})
    assert (wrong.status_code, "probes" in wrong.text) == (400, True)
    ratios = {"log_ratios": [0.5] * models.BUCKETS}
    opening = {"weighter": "w", "job_id": "other", "reference": {"name": "ref"}, "profile": ratios}
    first, again = (rest.post("/v1/jobs", json=opening).json() for _ in range(2))
    assert (again["resumed"], again["documents_checksum"]) == (True, first["documents_checksum"])
    opening["profile"] = {"log_ratios": [0.25] * models.BUCKETS}
    assert rest.post("/v1/jobs", json=opening).status_code == 412


# ---- Pretaught ------------------------------------------------------------------------------------------------------


def create(stub: Any, name: str = "w", **fields: Any) -> pb.Weighter:
    return stub.CreateWeighter(pb.CreateWeighterRequest(name=name, **fields))


def test_a_weighter_that_starts_from_the_pretaught_one(stub: Any) -> None:
    made = create(stub, initial="pretaught")
    assert (made.initial, made.position) == ("pretaught", 0)
    exported = load_tensors(stub.ExportWeighter(pb.ExportWeighterRequest(name="w")).files["model.safetensors"])
    packaged = load_tensors((weighter_folder() / "model.safetensors").read_bytes())
    assert exported.keys() == packaged.keys()
    for name, tensor in packaged.items():
        np.testing.assert_array_equal(exported[name], tensor)
    assert create(stub, initial="pretaught", exist_ok=True).created_unix_ms == made.created_unix_ms
    assert create(stub, spec=made.spec, initial="pretaught", exist_ok=True).created_unix_ms == made.created_unix_ms
    learning = pb.WeighterSpec(learning=pb.LearningSpec(learning_rate=0.5))
    assert create(stub, "faster", spec=learning, initial="pretaught").spec.learning.learning_rate == 0.5
    # As one made by a release whose packaged weighter has other settings: what is not asked for may be as it is.
    assert create(stub, "faster", initial="pretaught", exist_ok=True).spec.learning.learning_rate == 0.5
    slower = pb.WeighterSpec(learning=pb.LearningSpec(learning_rate=0.25))
    failing(
        lambda: create(stub, "faster", spec=slower, initial="pretaught", exist_ok=True),
        "ALREADY_EXISTS",
        "another spec",
    )
    wide = pb.WeighterSpec(head=pb.HeadSpec(width=64))
    failing(lambda: create(stub, "x", spec=wide, initial="pretaught"), "INVALID_ARGUMENT", "spec.head.width", "64")
    other = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss"]))
    failing(lambda: create(stub, "x", spec=other, initial="pretaught"), "INVALID_ARGUMENT", "spec.features")
    failing(lambda: create(stub, "x", initial="taught"), "INVALID_ARGUMENT", "initial is 'taught'", "'pretaught'")
    failing(
        lambda: create(stub, spec=made.spec, exist_ok=True),
        "ALREADY_EXISTS",
        "started from pretaught",
        "fresh parameters",
    )
    failing(lambda: create(stub, "x"), "INVALID_ARGUMENT", "neither features nor tokens")
    assert len(stub.ListWeighters(pb.ListWeightersRequest()).weighters) == 2


CODE = ["def add(a, b):\n    return a + b", "for i in range(10):\n    total += i", "class Point:\n    x: int = 0"]
PROSE = ["It was a bright cold day in April.", "She walked slowly home.", "The ship sailed at dawn, and nobody spoke."]


def test_texts_are_weighted_by_examples_without_making_anything(rest: httpx.Client) -> None:
    def ask(target: list[str], **fields: Any) -> dict[str, Any]:
        answer = rest.post("/v1/score", json={"texts": [*CODE, *PROSE], "target": target, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    towards_code = ask(["import os\n\ndef main():\n    print(os.getcwd())", "def mul(a, b):\n    return a * b"])
    towards_prose = ask(["He waited for the rain to stop.", "The old man looked at the sea and smiled."])
    for answer in (towards_code, towards_prose):
        assert np.mean(answer["weights"]) == pytest.approx(1, abs=1e-5)
        assert 1 <= answer["effective_sample_size"] <= 6
        assert np.shape(answer["statistics"]) == (6, len(answer["names"]))
        assert answer["position"] == 0
    column = towards_code["names"].index("ngram_log_ratio_z")
    for answer, favoured in ((towards_code, slice(0, 3)), (towards_prose, slice(3, 6))):
        closeness = np.array(answer["statistics"])[:, column]
        assert closeness[favoured].mean() > 0 > np.delete(closeness, np.r_[favoured]).mean()
    rest.post("/v1/weighters", json={"name": "w", "initial": "pretaught"})
    assert ask(PROSE, weighter="w", reference="pretaught")["weights"] == ask(PROSE)["weights"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"texts": ["two words"]}, 400, ["target"]),
        ({"texts": [], "target": ["two words"]}, 400, ["texts has no rows"]),
        ({"texts": ["two words"], "target": []}, 400, ["target has no texts"]),
        ({"texts": ["two words", "a"], "target": ["two words"]}, 400, ["texts[1] has 1 tokens"]),
        ({"texts": ["two words"], "target": ["two words", ""]}, 400, ["target[1] has no tokens"]),
        ({"texts": ["two words"], "target": ["a"]}, 400, ["target[0] has 1 tokens"]),
        ({"texts": ["two words"], "target": ["two words"], "weighter": "no"}, 404, ["'no'"]),
        ({"texts": ["two words"], "target": ["two words"], "reference": "no"}, 404, ["'no'", "pretaught"]),
        ({"texts": ["two words"], "target": ["two words"], "weighter": "raw"}, 412, ["'raw' reads 'own'"]),
    ],
)
def test_mistakes_in_scoring_texts(rest: httpx.Client, body: dict[str, Any], status: int, words: list[str]) -> None:
    rest.post("/v1/weighters", json={"name": "raw", "spec": {"features": {"names": ["own"]}}})
    answer = rest.post("/v1/score", json=body)
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.json()["error"]["message"]


def test_references_of_the_models_directory(tmp_path: Path) -> None:
    write_reference(tmp_path / "models" / "house", FILES)
    running = ServiceThread(tmp_path / "state", models=tmp_path / "models")
    try:
        with httpx.Client(base_url=running.address.rest_url, timeout=30) as rest:
            assert [r["name"] for r in rest.get("/v1/references").json()["references"]] == ["house", "pretaught"]
            answer = rest.post(
                "/v1/score", json={"texts": ["the weights of", "1, 2, 3"], "target": ["1, 2"], "reference": "house"}
            )
            assert answer.status_code == 200, answer.text
            assert rest.delete("/v1/references/house").status_code == 412
    finally:
        running.stop()


def test_an_upload_over_the_limit(tmp_path: Path) -> None:
    running = ServiceThread(tmp_path / "state", max_message_mb=1)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
            from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub

            big = {**FILES, "model.safetensors": bytes(2 << 20)}
            failing(lambda: put(WeightingServiceStub(channel), files=big), "RESOURCE_EXHAUSTED", "larger than max")
    finally:
        running.stop()
