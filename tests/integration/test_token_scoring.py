"""Scoring over tokens by a hosted reference, on a real server: numbers, privacy, replay, trust, and every mistake."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from prometheus_client.parser import text_string_to_metric_families

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from tests.conftest import Address, ServiceThread
from tests.integration.token_jobs import (
    FILES,
    LESSONS,
    OTHER_FILES,
    by_hand,
    documents,
    documents_message,
    opened,
    scored,
    statistics,
    taught,
    tokens,
    weights,
)
from tests.unit import reference_models as models
from tests.waiting import wait_for
from weighting_contract.ngrams import NGRAM_NAMES
from weighting_contract.profile import documents_checksum, make_profile
from weighting_contract.reference import write_reference
from weighting_contract.tensors import from_message, to_message
from weighting_service.domain import Inputs
from weighting_service.reference import Reference, load_reference
from weighting_service.weighter import Weighter

BATCH = models.random_rows(5, 12)
WINDOWS = list(np.random.default_rng(6).integers(0, models.VOCABULARY, (12, models.SEQ_LEN)))  # all of one length


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_reference(tmp_path_factory.mktemp("references") / "ref", FILES))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    service = ServiceThread(tmp_path_factory.mktemp("state"), max_batch_samples=64)
    yield service.address
    service.stop()


@pytest.fixture(scope="module")
def shared(running: Address) -> Iterator[Any]:
    """A service with the job "job" of the weighter "w" over the reference "ref"."""
    with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        stub = WeightingServiceStub(channel)
        opened(stub)
        yield stub


def failing(call: Callable[[], Any], code: str, *words: str) -> str:
    with pytest.raises(grpc.RpcError) as error:
        call()
    details = str(error.value.details())
    assert error.value.code().name == code, details
    for word in words:
        assert word in details
    assert "\n" not in details
    return details


def column_names(job: pb.Job) -> list[str]:
    return list(job.spec.features.names)


# ---- Numbers --------------------------------------------------------------------------------------------------------


def test_a_score_is_the_weighters_on_statistics_made_directly(
    shared: Any, reference: Reference, tmp_path: Path
) -> None:
    job = opened(shared)
    assert (job.reference, job.reference_checksum) == ("ref", reference.checksum)
    assert job.documents_checksum == documents_checksum(documents(0))
    response = scored(shared, BATCH)
    expected = by_hand(reference, BATCH, column_names(job), documents(0))
    np.testing.assert_allclose(statistics(response), expected, atol=1e-5)
    for name, content in shared.ExportWeighter(pb.ExportWeighterRequest(name="w")).files.items():
        (tmp_path / name).write_bytes(content)
    direct = Weighter.from_pretrained(tmp_path).score([Inputs(features=expected)])[0]
    np.testing.assert_allclose(from_message(response.logits, "logits"), direct.logits, atol=1e-4)
    np.testing.assert_allclose(weights(response), direct.weights, atol=1e-4)
    assert weights(response).std() > 0.05
    assert response.trust == 1
    without = scored(shared, BATCH, return_statistics=False)
    assert not without.HasField("statistics")
    assert without.weights == response.weights


def test_a_finished_profile_texts_and_statistics_sent_back_give_the_same(shared: Any, reference: Reference) -> None:
    profile = make_profile(documents(0), reference.ngram_counts)
    message = pb.TargetProfile(log_ratios=to_message(profile.log_ratios), documents_checksum=profile.documents_checksum)
    job = opened(shared, "finished", profile=message)
    assert job.documents_checksum == opened(shared).documents_checksum
    texts = ["the weights of a batch", "1, 2, 3; 4, 5, 6", "def loss(w): return w"]
    by_id = scored(shared, [np.array(ids) for ids in reference.tokenize(texts)])
    request = pb.ScoreRequest(job_id="finished", inputs=pb.Inputs(texts=texts), return_statistics=True)
    by_text = shared.Score(request)
    assert by_text.weights == by_id.weights
    assert by_text.statistics == by_id.statistics
    again = shared.Score(pb.ScoreRequest(job_id="job", inputs=pb.Inputs(features=by_id.statistics)))
    np.testing.assert_allclose(weights(again), weights(by_id), atol=1e-5)


def test_many_jobs_at_once_get_what_each_gets_alone(shared: Any) -> None:
    batches = {f"many-{i}": models.random_rows(i, 5 + i) for i in range(6)}
    for i, job_id in enumerate(batches):
        opened(shared, job_id, weighter="w" if i % 2 else "w2", seed=i)
    alone = {job_id: scored(shared, rows, job_id) for job_id, rows in batches.items()}
    futures = {
        job_id: shared.Score.future(pb.ScoreRequest(job_id=job_id, inputs=tokens(rows), return_statistics=True))
        for job_id, rows in batches.items()
    }
    for job_id, future in futures.items():
        np.testing.assert_allclose(weights(future.result()), weights(alone[job_id]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(statistics(future.result()), statistics(alone[job_id]), rtol=1e-5, atol=1e-5)


def test_another_guard_for_one_score(shared: Any) -> None:
    opened(shared)
    sizes = [scored(shared, BATCH, min_effective_share=share).effective_sample_size for share in (0.0, 0.9, 1.0)]
    assert sizes[0] < sizes[1] < sizes[2] == pytest.approx(len(BATCH))
    assert sizes[1] >= 0.9 * len(BATCH) - 1e-3
    for share in (-0.1, 1.1, float("nan")):
        failing(lambda s=share: scored(shared, BATCH, min_effective_share=s), "INVALID_ARGUMENT", "min_effective_share")


# ---- Privacy --------------------------------------------------------------------------------------------------------


def test_jobs_see_their_own_target_only(shared: Any, running: Address, reference: Reference) -> None:
    names = column_names(opened(shared, "mine", seed=1))
    opened(shared, "theirs", seed=2)
    mine, theirs = (statistics(scored(shared, BATCH, job)) for job in ("mine", "theirs"))
    against_target = [names.index(name) for name in NGRAM_NAMES]
    portable = [i for i in range(len(names)) if i not in against_target]
    np.testing.assert_allclose(mine[:, portable], theirs[:, portable], atol=1e-6)
    assert np.abs(mine[:, against_target] - theirs[:, against_target]).max() > 0.1
    for got, seed in ((mine, 1), (theirs, 2)):
        np.testing.assert_allclose(got, by_hand(reference, BATCH, names, documents(seed)), atol=1e-5)


def test_what_is_known_of_samples_is_not_computed_again_whoever_asks(stub: Any) -> None:
    """The reference's statistics, that is: those against the target are each job's own."""
    names = column_names(opened(stub, "mine", seed=1))
    opened(stub, "theirs", seed=2)
    mine = scored(stub, BATCH, "mine")
    theirs = scored(stub, BATCH, "theirs")
    again = scored(stub, [*BATCH[::-1], np.arange(5)], "mine")
    assert (mine.computed_samples, theirs.computed_samples, again.computed_samples) == (len(BATCH), 0, 1)
    against_target = [names.index(name) for name in NGRAM_NAMES]
    portable = [i for i in range(len(names)) if i not in against_target]
    np.testing.assert_array_equal(statistics(mine)[:, portable], statistics(theirs)[:, portable])
    assert np.abs(statistics(mine) - statistics(theirs))[:, against_target].max() > 0.1
    features = stub.Score(pb.ScoreRequest(job_id="mine", inputs=pb.Inputs(features=mine.statistics)))
    assert features.HasField("computed_samples")
    assert features.computed_samples == 0


def test_a_service_that_keeps_no_samples_computes_all_of_them(tmp_path: Path) -> None:
    answers = []
    for cached in (0, 5, 1000):
        with Served(tmp_path / str(cached), cached_samples=cached) as stub:
            opened(stub)
            answers.append([scored(stub, windows) for windows in (WINDOWS[:9], WINDOWS[4:], WINDOWS)])
    assert [[answer.computed_samples for answer in of] for of in answers] == [[9, 8, 12], [9, 3, 7], [9, 3, 0]]
    for some in answers[1:]:
        for x, y in zip(some, answers[0], strict=True):
            assert (x.weights, x.logits, x.statistics) == (y.weights, y.logits, y.statistics)  # to the last bit


def test_no_answer_holds_a_profile(shared: Any, running: Address) -> None:
    service = pb.DESCRIPTOR.services_by_name["WeightingService"]
    for method in service.methods:
        assert "weighting.v1.TargetProfile" not in reachable(method.output_type), method.name
    opened(shared, "private", seed=3)
    with httpx.Client(base_url=running.rest_url, timeout=30) as rest:
        body = {"weighter": "w", "job_id": "private", "reference": {"name": "ref"}}
        answers = [
            rest.post("/v1/jobs", json=body),
            rest.post("/v1/jobs/private/heartbeat", json={}),
            rest.post("/v1/jobs/private/score", json={"inputs": {"tokens": [row.tolist() for row in BATCH]}}),
            rest.post("/v1/jobs/private/close"),
            *(rest.get(f"/v1/{path}") for path in ("weighters", "weighters/w", "references", "references/ref")),
            rest.get("/v1/weighters/w/export"),
        ]
        routes = rest.get("/openapi.json").json()["paths"]
    assert not [path for path in routes if "profile" in path]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert not keys(answer.json()) & {"profile", "log_ratios", "documents"}


def reachable(message: Descriptor, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Full names of a message type and all that its fields hold."""
    if message.full_name in seen:
        return seen
    seen |= {message.full_name}
    for field in message.fields:
        if field.message_type is not None:
            seen = reachable(field.message_type, seen)
    return seen


def keys(values: Any) -> set[str]:
    if isinstance(values, dict):
        return set(values).union(*map(keys, values.values()))
    return set().union(*map(keys, values)) if isinstance(values, list) else set()


# ---- Durability -----------------------------------------------------------------------------------------------------


def test_a_log_is_replayed_without_the_reference_and_goes_on_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Served(tmp_path / "state") as stub:
        opened(stub)
        for step in range(12):
            rows = models.random_rows(20 + step, 8)  # none of BATCH, whose rows are to be computed in one pass
            response = scored(stub, rows, min_position=LESSONS + step)
            probes = to_message(np.array([1, 1, 0, 0, 0, 0, 1, 0], np.uint8))
            taught(stub, step, statistics(response), rng.normal(size=8), scored_position=LESSONS + step, probes=probes)
        end = LESSONS + 12
        at_the_end = scored(stub, BATCH, min_position=end)
        exported = stub.ExportWeighter(pb.ExportWeighterRequest(name="w")).files
    elsewhere = shutil.copytree(tmp_path / "state", tmp_path / "elsewhere")
    shutil.rmtree(elsewhere / "references")
    for snapshot in sorted(elsewhere.glob("snapshots/*/*"))[1:]:  # all but that of position 0: a real replay
        snapshot.unlink()
    with Served(elsewhere) as stub:
        weighter = stub.GetWeighter(pb.GetWeighterRequest(name="w"))
        assert (weighter.applied_position, weighter.learning.updates_applied) == (end, end)
        assert dict(stub.ExportWeighter(pb.ExportWeighterRequest(name="w")).files) == dict(exported)
        failing(lambda: scored(stub, BATCH), "FAILED_PRECONDITION", "'ref'", "is not on this service", "upload")
        features = pb.Inputs(features=at_the_end.statistics)
        assert stub.Score(pb.ScoreRequest(job_id="job", inputs=features)).position == end  # needs no reference
        stub.PutReference(pb.PutReferenceRequest(name="back", files=FILES))  # under another name
        assert opened(stub, reference=pb.JobReference(name="back")).resumed
        assert scored(stub, BATCH).weights == at_the_end.weights
    (model,) = (tmp_path / "state" / "references" / "ref").glob("*/model.safetensors")
    content = model.read_bytes()
    model.write_bytes(content[:1000])
    with Served(tmp_path / "state") as stub:
        failing(lambda: scored(stub, BATCH), "FAILED_PRECONDITION", "'ref'", "is damaged", "truncated")
        assert [r.name for r in stub.ListReferences(pb.ListReferencesRequest()).references] == ["pretaught"]
    model.write_bytes(content)
    with Served(tmp_path / "state") as stub:
        assert stub.GetReference(pb.GetReferenceRequest(name="ref")).loaded  # before the service was ready
        again = scored(stub, BATCH)
        assert (again.weights, again.statistics) == (at_the_end.weights, at_the_end.statistics)


def test_a_damaged_profile_is_stored_again_where_the_job_is_opened_with_it(tmp_path: Path) -> None:
    with Served(tmp_path / "state") as stub:
        opened(stub)
        with contextlib.closing(sqlite3.connect(tmp_path / "state" / "log.sqlite")) as db, db:
            db.execute("UPDATE profiles SET log_ratios = zeroblob(length(log_ratios))")
        failing(lambda: scored(stub, BATCH), "INTERNAL", "'job'", "is damaged", "open the job again with its profile")
        opened(stub, profile=None)
        failing(lambda: scored(stub, BATCH), "INTERNAL", "is damaged")
        opened(stub)
        mended = scored(stub, BATCH)
        opened(stub, "never-damaged")
        assert statistics(mended).tolist() == statistics(scored(stub, BATCH, "never-damaged")).tolist()


class Served:
    """A service over a state directory, as a stub."""

    def __init__(self, state: Path, **settings: Any) -> None:
        self._state, self._settings = state, settings

    def __enter__(self) -> Any:
        self._service = ServiceThread(self._state, **self._settings)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._service.address.grpc_port}")
        return WeightingServiceStub(self._channel)

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._service.stop()


# ---- Trust ----------------------------------------------------------------------------------------------------------


def test_a_frozen_job_earns_trust_by_probes_and_teaches_nothing(stub: Any, rest: httpx.Client) -> None:
    opened(stub, "frozen", role=pb.ROLE_FROZEN)
    before = stub.ExportWeighter(pb.ExportWeighterRequest(name="w")).files["model.safetensors"]
    probes = to_message(np.array([1] * 8, np.uint8))
    for step in range(10):
        response = scored(stub, models.random_rows(step, 8), "frozen")
        logits = from_message(response.logits, "logits")
        taught(stub, step, statistics(response), logits, "frozen", probes=probes)  # what it likes does harm
    response = scored(stub, BATCH, "frozen", min_position=LESSONS + 10)
    assert (response.trust, response.position) == (0, LESSONS + 10)
    np.testing.assert_allclose(weights(response), 1, atol=1e-6)
    assert from_message(response.logits, "logits").std() > 0.05  # as they were before trust
    weighter = stub.GetWeighter(pb.GetWeighterRequest(name="w"))
    job = weighter.learning.jobs["frozen"]
    assert (job.trust, job.probed_updates, job.updates_applied) == (0, 10, 0)
    assert weighter.learning.updates_applied == LESSONS
    assert job.trust_t < 0
    assert stub.ExportWeighter(pb.ExportWeighterRequest(name="w")).files["model.safetensors"] == before
    assert gauge(rest, "weighbridge_job_trust") == {("w", "frozen"): 0.0}
    shown = rest.get("/v1/weighters/w").json()["learning"]["jobs"]["frozen"]
    assert (shown["trust"], shown["probed_updates"]) == (0, 10)
    opened(stub, "other")
    assert gauge(rest, "weighbridge_job_trust") == {("w", "frozen"): 0.0, ("w", "other"): 1.0}
    stub.CloseJob(pb.CloseJobRequest(job_id="frozen"))
    assert gauge(rest, "weighbridge_job_trust") == {("w", "other"): 1.0}
    stub.DeleteWeighter(pb.DeleteWeighterRequest(name="w"))
    assert gauge(rest, "weighbridge_job_trust") == {}


def test_probes_for_trust_alone(shared: Any) -> None:
    opened(shared, "probing", weighter="probed")
    opened(shared, "still", weighter="probed", role=pb.ROLE_FROZEN)
    features, cotangent = statistics(scored(shared, BATCH, "probing")), np.arange(12.0)

    def send(step: int, job_id: str = "probing", **fields: Any) -> pb.MetaUpdateResponse:
        return taught(shared, step, features, cotangent, job_id, **fields)

    assert send(0, probes=to_message(np.eye(12, dtype=np.uint8)[:2].sum(0).astype(np.uint8)), trust_only=True).position
    assert send(1).position == LESSONS + 2
    scored(shared, BATCH, "probing", min_position=LESSONS + 2)
    assert shared.GetWeighter(pb.GetWeighterRequest(name="probed")).learning.updates_applied == LESSONS + 1
    one = to_message(np.eye(12, dtype=np.uint8)[0])
    failing(lambda: send(2, trust_only=True, probes=one), "INVALID_ARGUMENT", "trust_only needs 2 probes")
    for fields in ({}, {"probes": one}):
        failing(lambda f=fields: send(2, "still", **f), "FAILED_PRECONDITION", "'still' is frozen", "2 probes or more")
    for wrong, words in (
        (np.ones(11, np.uint8), ["uint8 of shape [11]", "[12]"]),
        (np.full(12, 2, np.uint8), ["probes[0] is 2"]),
        (np.ones(12, np.float32), ["float32"]),
    ):
        failing(lambda w=wrong: send(2, probes=to_message(w)), "INVALID_ARGUMENT", "probes", *words)


def gauge(rest: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    families = {f.name: f for f in text_string_to_metric_families(rest.get("/metrics").text)}
    return {(s.labels["weighter"], s.labels["job"]): s.value for s in families[name].samples}


def test_metrics_of_a_reference(stub: Any, rest: httpx.Client) -> None:
    opened(stub)
    rows = [*BATCH, np.arange(40)]  # the last one is longer than the reference takes
    scored(stub, rows)

    def shown() -> tuple[dict[str, Any], dict[str, float]]:
        families = {f.name: f for f in text_string_to_metric_families(rest.get("/metrics").text)}
        return families, {
            name: sum(s.value for s in families[f"weighbridge_reference_{name}"].samples if s.name.endswith("_total"))
            for name in ("samples", "known_samples", "cut_samples", "tokens", "padded_tokens", "seconds")
        }

    wait_for(lambda: shown()[1]["samples"])  # a pass is counted once its callers have their answers
    families, values = shown()
    assert (values["samples"], values["known_samples"], values["cut_samples"]) == (13, 0, 1)
    assert values["tokens"] == sum(min(len(row) - 1, models.SEQ_LEN) for row in rows)
    assert values["padded_tokens"] >= values["tokens"]
    assert 0 < values["seconds"] <= families["weighbridge_device_seconds"].samples[0].value
    scored(stub, rows[5:])
    wait_for(lambda: shown()[1]["samples"] == 21)
    later = shown()[1]
    assert (later["known_samples"], later["cut_samples"]) == (8, 2)
    assert (later["tokens"], later["padded_tokens"]) == (values["tokens"], values["padded_tokens"])
    assert families["weighbridge_references"].samples[0].value == 2


def test_fallback_steps_are_those_that_open_jobs_report(stub: Any, rest: httpx.Client) -> None:
    def shown() -> float:
        families = {f.name: f for f in text_string_to_metric_families(rest.get("/metrics").text)}
        return families["weighbridge_client_fallback_steps"].samples[0].value

    for job_id, steps in (("a", 3), ("b", 4)):
        opened(stub, job_id)
        stub.Heartbeat(pb.HeartbeatRequest(job_id=job_id, fallback_steps=steps))
    assert shown() == 7
    stub.CloseJob(pb.CloseJobRequest(job_id="a"))
    assert shown() == 4


# ---- Mistakes -------------------------------------------------------------------------------------------------------

CHECKSUM = "0123456789abcdef" * 4
WRONG_SIZE = pb.TargetProfile(log_ratios=to_message(np.zeros(512, np.float16)))
NOT_FINITE = pb.TargetProfile(log_ratios=to_message(np.full(models.BUCKETS, np.inf, np.float16)))
RAW_NAMES = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss_z", "my_own", "length"]))
OF_TOKENIZER = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss_z"], tokenizer_checksum=CHECKSUM))
WITH_HIDDEN = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss_z"], hidden_size=4))
PRECONDITION, INVALID = "FAILED_PRECONDITION", "INVALID_ARGUMENT"

OPENING_MISTAKES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "unknown": (
        {"reference": pb.JobReference(name="nope")},
        "NOT_FOUND",
        ["'nope'", "other, pretaught, ref"],
    ),
    "checksum": (
        {"reference": pb.JobReference(name="ref", checksum=CHECKSUM)},
        PRECONDITION,
        ["'ref' has the checksum", "expected 0123456789ab..."],
    ),
    "no checksum": ({"reference": pb.JobReference(name="ref", checksum="x")}, INVALID, ["reference.checksum is 'x'"]),
    "checksum without a name": (
        {"reference": pb.JobReference(checksum=CHECKSUM), "profile": None},
        INVALID,
        ["no reference.name"],
    ),
    "tokenizer": (
        {"reference": pb.JobReference(name="ref", tokenizer_checksum=CHECKSUM)},
        PRECONDITION,
        ["the job's tokenizer has the checksum 0123456789ab...", "'ref'"],
    ),
    "no profile": ({"profile": None}, INVALID, ["profile is missing", "'w'"]),
    "profile without reference": ({"reference": None}, INVALID, ["profile is given, but no reference"]),
    "size of the profile": ({"profile": WRONG_SIZE}, INVALID, ["shape [512]", "1024 buckets"]),
    "values of the profile": ({"profile": NOT_FINITE}, INVALID, ["profile.log_ratios[0] is inf"]),
    "empty profile": ({"profile": pb.TargetProfile()}, INVALID, ["either log_ratios or documents"]),
    "vocabulary": (
        {"profile": documents_message([np.array([1, 2]), np.array([3, 999])])},
        INVALID,
        ["profile.documents[1] has the token id 999", "'ref' knows ids from 0 to 299"],
    ),
    "lengths": (
        {"profile": pb.TargetProfile(documents=to_message(np.arange(5)), lengths=to_message(np.array([2])))},
        INVALID,
        ["profile.lengths add up to 2", "5 ids"],
    ),
    "no lengths": ({"profile": pb.TargetProfile(documents=to_message(np.arange(5)))}, INVALID, ["profile.lengths"]),
    "feature names": ({"feature_names": ["loss_z"]}, INVALID, ["feature_names", "reference", "leave them out"]),
    "columns": ({"weighter": "raw"}, PRECONDITION, ["'raw'", "'my_own', 'length'"]),
    "hidden state": ({"weighter": "hidden"}, PRECONDITION, ["'hidden' reads a hidden state"]),
    "tokenizer of the spec": (
        {"weighter": "of-tokenizer"},
        PRECONDITION,
        ["'of-tokenizer' takes samples of the tokenizer 0123456789ab...", "'ref'"],
    ),
    "tokenizer of the spec, features of one's own": (
        {
            "weighter": "of-tokenizer",
            "reference": pb.JobReference(tokenizer_checksum=CHECKSUM[::-1]),
            "profile": None,
        },
        PRECONDITION,
        ["0123456789ab...", "the job has fedcba987654..."],
    ),
    "no tokenizer for the spec's": (
        {"weighter": "of-tokenizer", "reference": None, "profile": None},
        PRECONDITION,
        ["0123456789ab...", "the job does not name its own"],
    ),
    "another reference": (
        {"job_id": "job", "reference": pb.JobReference(name="other")},
        PRECONDITION,
        ["'job' was opened with the reference 'ref'", "not with 'other'"],
    ),
    "no reference any more": (
        {"job_id": "job", "reference": None, "profile": None},
        PRECONDITION,
        ["'job' was opened with the reference 'ref'", "not with none"],
    ),
    "another target": (
        {"job_id": "job", "profile": documents_message(documents(77))},
        PRECONDITION,
        ["'job' was opened with a profile of the documents", "not of"],
    ),
}


@pytest.mark.parametrize("mistake", OPENING_MISTAKES)
def test_a_job_that_does_not_fit_is_refused_with_the_difference(shared: Any, mistake: str) -> None:
    for name, spec in (("raw", RAW_NAMES), ("hidden", WITH_HIDDEN), ("of-tokenizer", OF_TOKENIZER)):
        shared.CreateWeighter(pb.CreateWeighterRequest(name=name, spec=spec, exist_ok=True))
    shared.PutReference(pb.PutReferenceRequest(name="other", files=OTHER_FILES, exist_ok=True))
    fields, code, words = OPENING_MISTAKES[mistake]
    failing(lambda: opened(shared, **{"job_id": "mistaken", **fields}), code, *words)
    failing(lambda: shared.Heartbeat(pb.HeartbeatRequest(job_id="mistaken")), "NOT_FOUND")
    assert scored(shared, BATCH).position == LESSONS  # the job of before goes on


def test_a_job_goes_on_with_what_it_had(shared: Any) -> None:
    before = scored(shared, BATCH)
    resumed = opened(shared, profile=None)
    assert (resumed.resumed, resumed.documents_checksum) == (True, documents_checksum(documents(0)))
    assert scored(shared, BATCH).weights == before.weights


def inputs(array: np.ndarray, **fields: Any) -> Callable[[Any], Any]:
    message = pb.Inputs(tokens=to_message(array))
    return lambda stub: stub.Score(pb.ScoreRequest(**{"job_id": "job", "inputs": message, **fields}))


def texts(*values: str) -> Callable[[Any], Any]:
    return lambda stub: stub.Score(pb.ScoreRequest(job_id="job", inputs=pb.Inputs(texts=values)))


IDS = np.arange(12).reshape(2, 6)
SCORING_MISTAKES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "nothing": (
        lambda stub: stub.Score(pb.ScoreRequest(job_id="job")),
        ["this job has a reference", "tokens, texts or the features", "got nothing"],
    ),
    "vocabulary": (inputs(np.full((2, 3), 300)), ["tokens[0] has the token id 300", "from 0 to 299", "tokenizer"]),
    "negative": (inputs(IDS - 1), ["tokens[0] has the token id -1"]),
    "one token": (inputs(IDS[:, :1]), ["tokens[0] has 1 tokens", "2 or more"]),
    "dtype": (inputs(IDS.astype(np.float32)), ["dtype float32"]),
    "no rows": (inputs(IDS[:0]), ["no rows"]),
    "samples": (inputs(np.ones((65, 2), np.int64)), ["65 samples", "at most 64"]),
    "text": (texts("the weights of a batch", "1"), ["texts[1] has 1 tokens"]),
    "empty text": (texts("the weights", ""), ["texts[1] has no tokens"]),
    "both": (
        lambda stub: stub.Score(
            pb.ScoreRequest(job_id="job", inputs=pb.Inputs(tokens=to_message(IDS), texts=["a", "b"]))
        ),
        ["got tokens and texts"],
    ),
    "statistics of one's own features": (
        lambda stub: stub.Score(
            pb.ScoreRequest(
                job_id="job",
                inputs=pb.Inputs(features=to_message(np.zeros((2, 16), np.float32))),
                return_statistics=True,
            )
        ),
        ["return_statistics", "'job' sent features itself"],
    ),
    "statistics without a reference": (
        lambda stub: stub.Score(
            pb.ScoreRequest(
                job_id="plain",
                inputs=pb.Inputs(features=to_message(np.zeros((2, 16), np.float32))),
                return_statistics=True,
            )
        ),
        ["return_statistics", "'plain' has no reference"],
    ),
    "teaching with tokens": (
        lambda stub: stub.MetaUpdate(
            pb.MetaUpdateRequest(
                job_id="job", inputs=tokens(BATCH), cotangent=to_message(np.arange(12, dtype=np.float32))
            )
        ),
        ["carries the statistics", "return_statistics"],
    ),
}


@pytest.mark.parametrize("mistake", SCORING_MISTAKES)
def test_a_batch_that_does_not_fit_gets_one_clear_sentence(shared: Any, mistake: str) -> None:
    opened(shared, "plain", reference=None, profile=None)
    call, words = SCORING_MISTAKES[mistake]
    failing(lambda: call(shared), INVALID, *words)
    assert shared.GetWeighter(pb.GetWeighterRequest(name="w")).position == LESSONS
