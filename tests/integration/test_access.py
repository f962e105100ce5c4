"""Tenants and roles at a real server: what each caller may do and see, over gRPC and REST, and what it may not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from tests.conftest import ServiceThread
from tests.waiting import wait_for
from trainer_client import Limits, Timeouts, connect
from trainer_client.transports import Transport, open_transport, rest_json
from weighting_contract.errors import (
    BY_CODE,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WeighbridgeError,
)
from weighting_contract.reference import FILES
from weighting_contract.tensors import to_message
from weighting_service.settings import Settings
from weighting_service.tenancy import ROLE_OF
from weighting_service.tokens import ROLES, hash_of

SPEC = pb.WeighterSpec(features=pb.FeatureSpec(names=["loss", "length"]), head=pb.HeadSpec(width=8, attention_heads=2))
BATCH = pb.Inputs(features=to_message(np.array([[0.5, 1.0], [2.0, 3.0]], np.float32)))
COTANGENT = to_message(np.array([0.5, -0.5], np.float32))
TIMEOUT_S = 30

# Requests of every RPC, about a weighter or reference (for jobs: a job) that is called `name`.
REQUESTS: dict[str, Callable[[str], Any]] = {
    "CreateWeighter": lambda name: pb.CreateWeighterRequest(name=name, spec=SPEC),
    "GetWeighter": lambda name: pb.GetWeighterRequest(name=name),
    "ListWeighters": lambda name: pb.ListWeightersRequest(),
    "DeleteWeighter": lambda name: pb.DeleteWeighterRequest(name=name),
    "ShareWeighter": lambda name: pb.ShareWeighterRequest(name=name, tenants=["b"]),
    "RollbackWeighter": lambda name: pb.RollbackWeighterRequest(name=name),
    "ExportWeighter": lambda name: pb.ExportWeighterRequest(name=name),
    "WatchWeighter": lambda name: pb.WatchWeighterRequest(name=name),
    "PutReference": lambda name: pb.PutReferenceRequest(name=name, files={"reference.json": b"{}"}),
    "GetReference": lambda name: pb.GetReferenceRequest(name=name),
    "ListReferences": lambda name: pb.ListReferencesRequest(),
    "DeleteReference": lambda name: pb.DeleteReferenceRequest(name=name),
    "OpenJob": lambda name: pb.OpenJobRequest(weighter=name, role=pb.ROLE_FROZEN),
    "CloseJob": lambda name: pb.CloseJobRequest(job_id=name),
    "Heartbeat": lambda name: pb.HeartbeatRequest(job_id=name),
    "QuarantineJob": lambda name: pb.QuarantineJobRequest(job_id=name, reason="why not"),
    "Score": lambda name: pb.ScoreRequest(job_id=name, inputs=BATCH),
    "StreamScore": lambda name: pb.ScoreRequest(job_id=name, inputs=BATCH),
    "MetaUpdate": lambda name: pb.MetaUpdateRequest(job_id=name, inputs=BATCH, cotangent=COTANGENT),
    "StreamMetaUpdate": lambda name: pb.MetaUpdateRequest(job_id=name, inputs=BATCH, cotangent=COTANGENT),
}
RPCS = [method.name for method in pb.DESCRIPTOR.services_by_name["WeightingService"].methods]
OF_ALL = ("ListWeighters", "ListReferences")  # about nothing in particular
MADE = ("CreateWeighter", "PutReference")  # about what is not there yet
OF_JOBS = [name for name, request in REQUESTS.items() if hasattr(request(""), "job_id") and name != "OpenJob"]
WITHOUT = {role: f"all-but-{role}" for role in ROLES}  # tokens

TENANTS = {
    "alice": ("a", ROLES),
    "bob": ("b", ROLES),
    "carol": ("c", ROLES),
    "old": ("", ROLES),  # of the default tenant
    **{token: ("a", [other for other in ROLES if other != role]) for role, token in WITHOUT.items()},
}


def tokens_file(path: Path, tenants: dict[str, tuple[str, Any]], **more: str) -> Path:
    """Entries whose tokens are their ids; `more` is TOML that an entry has besides."""
    entries = [
        f'[[token]]\nid = "{token}"\nsha256 = "{hash_of(token)}"\ntenant = "{tenant}"\nroles = {list(roles)}\n'
        + more.get(token, "")
        for token, (tenant, roles) in tenants.items()
    ]
    path.write_text("\n".join(entries))
    return path


class Callers:
    """One transport for each token, and what it can't carry: streams."""

    def __init__(self, running: ServiceThread, kind: str) -> None:
        address = running.address
        self.url = address.grpc_url if kind == "grpc" else address.rest_url
        self.kind = kind
        self._target = f"127.0.0.1:{address.grpc_port}"
        self._open: dict[str, Transport] = {}

    def call(self, token: str, method: str, request: Any) -> Any:
        if method in rest_json.ROUTES:
            if token not in self._open:
                self._open[token] = open_transport(self.url, token=token)
            return self._open[token].call(method, request, TIMEOUT_S)
        with grpc.insecure_channel(self._target) as channel:  # streams are gRPC's alone
            arguments: Any = iter([request]) if method != "WatchWeighter" else request
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            stream = getattr(WeightingServiceStub(channel), method)(arguments, metadata=metadata, timeout=TIMEOUT_S)
            try:
                return next(stream)
            except grpc.RpcError as exc:
                raise _error(exc) from exc
            finally:
                stream.cancel()

    def ask(self, token: str, method: str, name: str) -> Any:
        return self.call(token, method, REQUESTS[method](name))

    def refusal(self, token: str, method: str, name: str) -> WeighbridgeError:
        with pytest.raises(WeighbridgeError) as error:
            self.ask(token, method, name)
        return error.value

    def close(self) -> None:
        for transport in self._open.values():
            transport.close()


def _error(exc: Any) -> WeighbridgeError:
    return BY_CODE[exc.code().name](exc.details())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceThread]:
    folder = tmp_path_factory.mktemp("tenants")
    running = ServiceThread(folder / "state", tokens=tokens_file(folder / "tokens.toml", TENANTS))
    callers = Callers(running, "grpc")
    for token in ("alice", "bob", "old"):  # each has a weighter of its own, and a job called "job" on it
        callers.ask(token, "CreateWeighter", "w")
        callers.call(token, "OpenJob", pb.OpenJobRequest(weighter="w", job_id="job"))
    callers.ask("alice", "CreateWeighter", "secret")
    callers.call("alice", "OpenJob", pb.OpenJobRequest(weighter="secret", job_id="hidden"))
    files = callers.call("alice", "GetReference", pb.GetReferenceRequest(name="pretaught", files=FILES)).files
    callers.call("alice", "PutReference", pb.PutReferenceRequest(name="secret", files=dict(files)))
    callers.close()
    yield running
    running.stop()


@pytest.fixture(scope="module", params=["grpc", "http"])
def callers(running: ServiceThread, request: pytest.FixtureRequest) -> Iterator[Callers]:
    callers = Callers(running, request.param)
    yield callers
    callers.close()


def secret_of(method: str) -> str:
    return "hidden" if method in OF_JOBS else "secret"


# ---- All RPCs -------------------------------------------------------------------------------------------------------


def test_every_rpc_has_a_role_and_is_tried_here() -> None:
    assert set(RPCS) == set(REQUESTS)
    assert set(RPCS) <= set(ROLE_OF)
    assert set(ROLE_OF.values()) <= set(ROLES)
    assert {m for m in RPCS if "Stream" not in m and m != "WatchWeighter"} == set(rest_json.ROUTES)


def test_who_may_only_score_does_not_change_a_learning_job(callers: Callers) -> None:
    token = WITHOUT["teach"]
    frozen = pb.OpenJobRequest(weighter="w", job_id="job", role=pb.ROLE_FROZEN, feature_names=["length", "loss"])
    with pytest.raises(PermissionDenied, match=r"OpenJob of 'job', which is a learning job, needs the role 'teach'"):
        callers.call(token, "OpenJob", frozen)
    own = pb.OpenJobRequest(weighter="w", job_id=f"scorer-{callers.kind}", role=pb.ROLE_FROZEN)
    for resumed in (False, True):
        assert callers.call(token, "OpenJob", own).resumed == resumed
    again = callers.call("alice", "OpenJob", pb.OpenJobRequest(weighter="w", job_id="job"))
    assert (again.resumed, again.role) == (True, pb.ROLE_LEARN)


@pytest.mark.parametrize("method", RPCS)
def test_a_call_without_its_role_is_refused_by_name(callers: Callers, method: str) -> None:
    role = ROLE_OF[method]
    refused = callers.refusal(WITHOUT[role], method, secret_of(method))
    assert isinstance(refused, PermissionDenied)
    assert f"the role {role!r}" in refused.message
    assert repr(WITHOUT[role]) in refused.message


@pytest.mark.parametrize("method", [m for m in RPCS if m not in (*OF_ALL, *MADE)])
def test_what_is_another_tenants_looks_like_what_is_not_there(callers: Callers, method: str) -> None:
    for form in ("{}", "a/{}", "/{}"):
        there, absent = form.format(secret_of(method)), form.format("absent")
        refused, missing = callers.refusal("bob", method, there), callers.refusal("bob", method, absent)
        assert type(refused) is NotFound
        assert refused.message.replace(repr(there), "X") == missing.message.replace(repr(absent), "X")
        assert "a/" not in refused.message.replace(there, "")


@pytest.mark.parametrize("method", RPCS)
def test_nothing_works_without_a_token(callers: Callers, method: str) -> None:
    for token, words in (("", "a token is missing"), ("forged", "the token is not valid here")):
        refused = callers.refusal(token, method, "w")
        assert isinstance(refused, Unauthenticated)
        assert words in refused.message


@pytest.mark.parametrize("method", ["Score", "StreamScore", "PutReference"])
def test_no_message_is_taken_from_a_caller_without_a_token(running: ServiceThread, method: str) -> None:
    larger_than_any = pb.PutReferenceRequest(name="r", files={"model.safetensors": bytes(65 << 20)})
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}", options=options) as channel:
        path = f"/weighting.v1.WeightingService/{method}"
        call = channel.unary_unary(path, request_serializer=pb.PutReferenceRequest.SerializeToString)
        with pytest.raises(grpc.RpcError) as error:
            call(larger_than_any, timeout=TIMEOUT_S)
    refused: Any = error.value
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED, "it would be RESOURCE_EXHAUSTED, had it been read"
    assert "x-request-id" in dict(refused.trailing_metadata())


def test_lists_hold_ones_own(callers: Callers) -> None:
    assert [w.name for w in callers.ask("alice", "ListWeighters", "").weighters] == ["secret", "w"]
    assert [w.name for w in callers.ask("bob", "ListWeighters", "").weighters] == ["w"]
    assert [w.name for w in callers.ask("carol", "ListWeighters", "").weighters] == []
    assert [r.name for r in callers.ask("alice", "ListReferences", "").references] == ["pretaught", "secret"]
    assert [r.name for r in callers.ask("bob", "ListReferences", "").references] == ["pretaught"]
    assert (
        callers.refusal("carol", "GetWeighter", "w").message == "there is no weighter 'w'; this service has: none yet"
    )


def test_equal_names_are_different_things(callers: Callers) -> None:
    made = {token: callers.ask(token, "GetWeighter", "w") for token in ("alice", "bob", "old")}
    assert len({(w.created_unix_ms, w.position) for w in made.values()}) == 3
    assert {w.name for w in made.values()} == {"w"}
    resumed = callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter="w", job_id="job", role=pb.ROLE_FROZEN))
    assert (resumed.job_id, resumed.weighter, resumed.resumed) == ("job", "w", True)
    fresh = callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter="w", job_id=f"hidden-{callers.kind}"))
    assert (fresh.job_id, fresh.resumed) == (f"hidden-{callers.kind}", False)
    chosen = callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter="w"))
    assert "/" not in chosen.job_id
    assert callers.ask("bob", "CloseJob", chosen.job_id).job_id == chosen.job_id


def test_a_known_job_of_another_tenant_is_not_resumed(callers: Callers) -> None:
    alice = callers.call("alice", "OpenJob", pb.OpenJobRequest(weighter="secret", job_id="hidden"))
    assert alice.resumed
    with pytest.raises(InvalidArgument, match="job_id is 'a/hidden'"):
        callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter="w", job_id="a/hidden"))


@pytest.mark.parametrize("name", ["a/w", "b/w", "/w", "a/b/c", "../w", ""])
def test_things_are_made_under_ones_own_tenant(callers: Callers, name: str) -> None:
    for method in ("CreateWeighter", "PutReference"):
        if callers.kind == "http" and method == "PutReference" and name in ("", "../w"):
            continue  # no such path
        assert isinstance(callers.refusal("bob", method, name), InvalidArgument)


def test_what_comes_with_the_service_is_everybodys(callers: Callers) -> None:
    pretaught = callers.call(
        "carol", "GetReference", pb.GetReferenceRequest(name="pretaught", files=["tokenizer.json"])
    )
    assert (pretaught.name, list(pretaught.files)) == ("pretaught", ["tokenizer.json"])
    callers.call("alice", "CreateWeighter", pb.CreateWeighterRequest(name="taught", initial="pretaught", exist_ok=True))
    opening = pb.OpenJobRequest(weighter="taught", job_id="user", role=pb.ROLE_FROZEN)
    opening.reference.name = "pretaught"
    opening.profile.documents.CopyFrom(to_message(np.arange(40)))
    opening.profile.lengths.CopyFrom(to_message(np.array([20, 20])))
    wait_for(lambda: loaded(lambda: callers.call("alice", "OpenJob", opening)), timeout_s=60)
    refused = callers.refusal("carol", "DeleteReference", "pretaught")
    assert isinstance(refused, FailedPrecondition)
    assert refused.message.startswith("reference 'pretaught' is not an upload"), "and nothing of alice's job"
    callers.ask("alice", "DeleteWeighter", "taught")
    own = callers.call("alice", "GetReference", pb.GetReferenceRequest(name="secret"))
    assert (own.name, own.checksum) == ("secret", pretaught.checksum)
    files = dict(callers.call("carol", "GetReference", pb.GetReferenceRequest(name="pretaught", files=FILES)).files)
    with pytest.raises(AlreadyExists, match="reference 'pretaught' exists"):
        callers.call("carol", "PutReference", pb.PutReferenceRequest(name="pretaught", files=files))


def test_a_job_is_opened_with_ones_own_reference(callers: Callers) -> None:
    weighter = f"by-reference-{callers.kind}"
    for token in ("alice", "bob"):
        callers.call(token, "CreateWeighter", pb.CreateWeighterRequest(name=weighter, initial="pretaught"))
    opening = pb.OpenJobRequest(weighter=weighter, job_id=weighter, role=pb.ROLE_FROZEN)
    opening.reference.name = "secret"
    opening.profile.documents.CopyFrom(to_message(np.arange(40)))
    opening.profile.lengths.CopyFrom(to_message(np.array([20, 20])))
    job = wait_for(lambda: loaded(lambda: callers.call("alice", "OpenJob", opening)), timeout_s=60)
    assert (job.job_id, job.reference) == (weighter, "secret")
    with pytest.raises(FailedPrecondition, match=f"reference 'secret' is in use by job '{weighter}'"):
        callers.ask("alice", "DeleteReference", "secret")
    callers.ask("alice", "CloseJob", weighter)
    with pytest.raises(NotFound, match="there is no reference 'secret'; this service has: pretaught"):
        callers.call("bob", "OpenJob", opening)
    for token in ("alice", "bob"):
        callers.ask(token, "DeleteWeighter", weighter)


def test_what_a_tenant_has_sent_is_not_known_to_another(callers: Callers) -> None:
    """Of a reference that all use: the count of what was computed would tell."""
    name = f"known-{callers.kind}"
    opening = pb.OpenJobRequest(weighter=name, job_id=name, role=pb.ROLE_FROZEN)
    opening.reference.name = "pretaught"
    opening.profile.documents.CopyFrom(to_message(np.arange(40)))
    opening.profile.lengths.CopyFrom(to_message(np.array([20, 20])))
    for token in ("alice", "bob"):
        callers.call(token, "CreateWeighter", pb.CreateWeighterRequest(name=name, initial="pretaught"))
        wait_for(lambda token=token: loaded(lambda: callers.call(token, "OpenJob", opening)), timeout_s=60)
    tokens = np.random.default_rng([*name.encode()]).integers(0, 1000, (3, 12))
    request = pb.ScoreRequest(job_id=name, inputs=pb.Inputs(tokens=to_message(tokens)))
    answers = [callers.call(token, "Score", request) for token in ("alice", "bob", "alice", "bob")]
    assert [answer.computed_samples for answer in answers] == [3, 3, 0, 0]
    for token in ("alice", "bob"):
        callers.ask(token, "DeleteWeighter", name)


def loaded(ask: Callable[[], Any]) -> Any:
    """The answer of `ask`; None while a reference is still loading."""
    try:
        return ask()
    except Unavailable:
        return None


# ---- Sharing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(callers: Callers, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a weighter of alice's, for this test alone, that bob may use."""
    name = re.sub(r"[^a-z]+", "-", request.node.name).strip("-")
    callers.ask("alice", "CreateWeighter", name)
    assert list(callers.ask("alice", "ShareWeighter", name).shared_with) == ["b"]
    yield name
    with contextlib.suppress(NotFound):
        callers.ask("alice", "DeleteWeighter", name)


def teach(callers: Callers, token: str, job_id: str, step: int) -> Any:
    request = pb.MetaUpdateRequest(job_id=job_id, step=step, inputs=BATCH, cotangent=COTANGENT)
    return callers.call(token, "MetaUpdate", request)


def test_a_shared_weighter_is_used_by_its_owners_name(callers: Callers, shared: str) -> None:
    name, job = f"a/{shared}", f"at-{shared}"
    assert name in [w.name for w in callers.ask("bob", "ListWeighters", "").weighters]
    assert name not in [w.name for w in callers.ask("carol", "ListWeighters", "").weighters]
    assert type(callers.refusal("bob", "GetWeighter", shared)) is NotFound
    assert callers.ask("alice", "GetWeighter", name).name == shared
    opened = callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter=name, job_id=job))
    assert (opened.weighter, opened.job_id) == (name, job)
    callers.call("alice", "OpenJob", pb.OpenJobRequest(weighter=shared, job_id=job))
    assert teach(callers, "bob", job, 0).position == 1
    assert teach(callers, "alice", job, 0).position == 2
    waited = pb.ScoreRequest(job_id=job, inputs=BATCH, min_position=2)
    assert callers.call("bob", "Score", waited).position == 2
    seen = {token: callers.ask(token, "GetWeighter", name) for token in ("alice", "bob")}
    assert seen["alice"].learning.jobs.keys() == {job, f"b/{job}"}
    assert seen["bob"].learning.jobs.keys() == {job}
    assert list(seen["bob"].shared_with) == ["b"]
    assert callers.ask("bob", "ExportWeighter", name).files
    assert callers.ask("bob", "WatchWeighter", name).name == name


def test_only_the_owner_changes_a_shared_weighter(callers: Callers, shared: str) -> None:
    for method in ("DeleteWeighter", "ShareWeighter", "RollbackWeighter"):
        refused = callers.refusal("bob", method, f"a/{shared}")
        assert isinstance(refused, PermissionDenied)
        assert f"weighter 'a/{shared}' is shared with you, but only its owner" in refused.message
    callers.ask("alice", "DeleteWeighter", shared)
    assert type(callers.refusal("bob", "GetWeighter", f"a/{shared}")) is NotFound


def test_the_owner_quarantines_who_teaches_badly(callers: Callers, shared: str) -> None:
    job = f"at-{shared}"
    callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter=f"a/{shared}", job_id=job))
    assert isinstance(callers.refusal("bob", "QuarantineJob", job), PermissionDenied)
    assert type(callers.refusal("carol", "QuarantineJob", f"b/{job}")) is NotFound
    assert callers.ask("alice", "QuarantineJob", f"b/{job}").quarantined == "why not"
    with pytest.raises(FailedPrecondition, match="why not") as refused:
        teach(callers, "bob", job, 0)
    assert "b/" not in refused.value.message
    assert callers.ask("bob", "Score", job).position == 0
    callers.call("alice", "QuarantineJob", pb.QuarantineJobRequest(job_id=f"b/{job}"))
    assert teach(callers, "bob", job, 0).position == 1
    for method in OF_JOBS:
        if method != "QuarantineJob":
            assert type(callers.refusal("alice", method, f"b/{job}")) is NotFound, "the job stays its tenant's"


def test_what_is_no_longer_shared_is_gone(callers: Callers, shared: str) -> None:
    job = f"at-{shared}"
    callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter=f"a/{shared}", job_id=job))
    callers.call("alice", "ShareWeighter", pb.ShareWeighterRequest(name=shared, tenants=["c", "c", "*"]))
    assert callers.ask("bob", "Score", job).position == 0
    callers.call("alice", "ShareWeighter", pb.ShareWeighterRequest(name=shared))
    for method in OF_JOBS:
        assert type(callers.refusal("bob", method, job)) is NotFound
    for method in ("GetWeighter", "OpenJob", "ExportWeighter", "WatchWeighter"):
        assert type(callers.refusal("bob", method, f"a/{shared}")) is NotFound
    with pytest.raises(InvalidArgument, match="tenants is 'x y'"):
        callers.call("alice", "ShareWeighter", pb.ShareWeighterRequest(name=shared, tenants=["x y"]))


def test_what_was_made_without_tokens_is_shared_like_the_rest(callers: Callers) -> None:
    shared = f"from-the-start-{callers.kind}"
    callers.ask("old", "CreateWeighter", shared)
    assert type(callers.refusal("bob", "GetWeighter", f"/{shared}")) is NotFound
    callers.call("old", "ShareWeighter", pb.ShareWeighterRequest(name=shared, tenants=["*"]))
    assert callers.ask("bob", "GetWeighter", f"/{shared}").name == f"/{shared}"
    callers.call("bob", "OpenJob", pb.OpenJobRequest(weighter=f"/{shared}", job_id=shared))
    assert teach(callers, "bob", shared, 0).position == 1
    assert callers.ask("old", "QuarantineJob", f"b/{shared}").job_id == f"b/{shared}"
    callers.ask("old", "DeleteWeighter", shared)


# ---- REST and gRPC themselves ---------------------------------------------------------------------------------------


def test_health_and_documentation_are_open_and_metrics_are_not(running: ServiceThread) -> None:
    with httpx.Client(base_url=running.address.rest_url, timeout=TIMEOUT_S) as rest:
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert rest.get(path).status_code == 200
        for path in ("/metrics", "/v1/weighters", "/v1/nothing"):
            unknown = rest.get(path)
            assert unknown.status_code == 401
            assert unknown.json()["error"]["code"] == "UNAUTHENTICATED"
            assert unknown.headers["www-authenticate"] == 'Bearer realm="weighbridge"'
        rest.headers["authorization"] = "Bearer forged"
        assert 'error="invalid_token"' in rest.get("/metrics").headers["www-authenticate"]
        rest.headers["authorization"] = f"Bearer {WITHOUT['operate']}"
        assert rest.get("/metrics").status_code == 403
        rest.headers["authorization"] = "Bearer alice"
        assert "weighbridge_requests_total" in rest.get("/metrics").text
        assert "HTTPBearer" in rest.get("/openapi.json").json()["components"]["securitySchemes"]
    with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        assert next(iter(stub.ServerReflectionInfo(iter([request])))).list_services_response.service


def test_batches_without_a_job_are_scored_by_what_one_may_see(running: ServiceThread) -> None:
    body = {"inputs": {"features": [[0.5, 1.0], [2.0, 3.0]]}}
    texts = {"texts": ["one text", "another one"], "target": ["a third text"]}
    address = running.address.rest_url
    with httpx.Client(base_url=address, timeout=TIMEOUT_S, headers={"authorization": "Bearer bob"}) as rest:
        assert rest.post("/v1/weighters/w/score", json=body).json()["weights"] == [1.0, 1.0]
        for name in ("secret", "a%2Fsecret", "a%2fsecret"):
            refused = rest.post(f"/v1/weighters/{name}/score", json=body)
            assert refused.json()["error"]["code"] == "NOT_FOUND"
        assert rest.post("/v1/weighters/a/secret/score", json=body).json()["error"]["code"] == "NOT_FOUND"
        assert len(rest.post("/v1/score", json=texts).json()["weights"]) == 2
        for more in ({"weighter": "a/secret"}, {"weighter": "secret"}, {"reference": "secret"}):
            refused = rest.post("/v1/score", json=texts | more)
            assert refused.json()["error"]["code"] == "NOT_FOUND"
        rest.headers["authorization"] = f"Bearer {WITHOUT['score']}"
        assert rest.post("/v1/score", json=texts).status_code == 403
        assert rest.post("/v1/weighters/w/score", json=body).status_code == 403


def test_a_large_body_of_a_stranger_is_not_read(running: ServiceThread) -> None:
    refused = httpx.post(f"{running.address.rest_url}/v1/score", content=b"[" * (1 << 20), timeout=TIMEOUT_S)
    assert refused.status_code == 401


def test_a_call_keeps_its_id(running: ServiceThread) -> None:
    url = running.address.rest_url
    for given, kept in (("run-7/3", True), ("two words", False), (None, False)):
        identified = {"x-request-id": given} if given else {}
        headers = {"authorization": "Bearer bob"} | identified
        answers = [httpx.get(f"{url}/v1/weighters/{name}", headers=headers) for name in ("w", "absent")]
        answers += [httpx.get(f"{url}/healthz", headers=headers), httpx.get(f"{url}/metrics", headers=identified)]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert [answer.status_code for answer in answers] == [200, 404, 200, 401]
        assert (ids == [given] * 4) == kept
        assert len(set(ids)) == (1 if kept else 4)
    with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
        metadata = (("authorization", "Bearer bob"), ("x-request-id", "run-7/4"))
        stub = WeightingServiceStub(channel)
        _, call = stub.GetWeighter.with_call(pb.GetWeighterRequest(name="w"), metadata=metadata)
        assert ("x-request-id", "run-7/4") in call.trailing_metadata()
        with pytest.raises(grpc.RpcError) as error:
            stub.GetWeighter(pb.GetWeighterRequest(name="absent"), metadata=metadata)
        assert ("x-request-id", "run-7/4") in error.value.trailing_metadata()
        stream = stub.StreamScore(iter([REQUESTS["Score"]("job")]), metadata=metadata)
        assert len(list(stream)) == 1
        assert ("x-request-id", "run-7/4") in stream.trailing_metadata()


# ---- Tokens that come and go ----------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[ServiceThread, Callable[..., None]]]:
    """A service, and what rewrites its tokens file."""
    path = tmp_path / "tokens.toml"

    def write(*tokens: str, **more: str) -> None:
        tokens_file(path, {token: ("a", ["score", "teach"]) for token in ("keeper", *tokens)}, **more)

    write("alice", "late", late="expires = 2020-01-01T00:00:00Z")
    running = ServiceThread(tmp_path / "state", tokens=path)
    yield running, write
    running.stop()


def test_a_token_is_taken_back_and_given_again(changing: Any, caplog: pytest.LogCaptureFixture) -> None:
    running, write = changing
    callers = {kind: Callers(running, kind) for kind in ("grpc", "http")}
    callers["grpc"].ask("alice", "CreateWeighter", "w")
    callers["grpc"].call("alice", "OpenJob", pb.OpenJobRequest(weighter="w", job_id="job"))
    for each in callers.values():
        assert "the token 'late' expired at 2020-01-01" in each.refusal("late", "ListWeighters", "").message
    with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
        stub, metadata = WeightingServiceStub(channel), (("authorization", "Bearer alice"),)
        go_on = threading.Event()

        def requests() -> Iterator[Any]:
            yield REQUESTS["Score"]("job")
            go_on.wait(TIMEOUT_S)
            yield REQUESTS["Score"]("job")

        scores = stub.StreamScore(requests(), metadata=metadata, timeout=TIMEOUT_S)
        watch = stub.WatchWeighter(pb.WatchWeighterRequest(name="w"), metadata=metadata, timeout=TIMEOUT_S)
        assert next(scores).position == next(watch).applied_position == 0
        write()
        for each in callers.values():
            assert isinstance(each.refusal("alice", "ListWeighters", ""), Unauthenticated)
            assert each.ask("keeper", "ListWeighters", "").weighters
        go_on.set()
        assert teach(callers["grpc"], "keeper", "job", 0).position == 1
        for stream in (scores, watch):
            with pytest.raises(grpc.RpcError) as error:
                next(stream)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    write("alice")
    for each in callers.values():
        assert each.ask("alice", "ListWeighters", "").weighters
        each.close()
    assert "alice" not in "".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_training_goes_on_without_its_token_and_weights_come_back_with_it(
    changing: Any, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running, write = changing
    url = running.address.grpc_url if kind == "grpc" else running.address.rest_url
    secret = tmp_path / "token"
    secret.write_text("alice\n")
    limits = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1, heartbeat_s=1000)
    timeouts = Timeouts(score_s=20, admin_s=20, close_s=1)
    spec = {"features": {"names": ["loss", "length"]}, "head": {"width": 8, "attention_heads": 2}}
    batch = [[0.5, 1.0], [2.0, 3.0]]
    with connect(url, token=secret, limits=limits, timeouts=timeouts) as client:
        job = client.open_job(weighter="w", spec=spec)
        assert not job.score(batch, 0).fallback
        with caplog.at_level(logging.WARNING, "trainer_client"):
            write("bob")
            assert [job.score(batch, step).weights.tolist() for step in range(1, 30)] == [[1, 1]] * 29
            assert isinstance(job.failure, Unauthenticated)
            job.meta_update([0.5, -0.5], batch, 1)
            assert not job.flush(0.05), "it waits for the token"
        said = [r.getMessage() for r in caplog.records if "uniform weights at step" in r.getMessage()]
        assert len(said) == 1
        assert "UNAUTHENTICATED" in said[0]
        assert job.counters.fallbacks == {"UNAUTHENTICATED": 29}
        secret.write_text("bob")
        wait_for(lambda: not job.score(batch, 30).fallback)
        assert job.flush(20)
        assert job.counters.updates_acknowledged == 1


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_token_that_may_not_teach_scores_on(running: ServiceThread, kind: str) -> None:
    url = running.address.grpc_url if kind == "grpc" else running.address.rest_url
    patient = Timeouts(score_s=20, meta_update_s=20, admin_s=20)
    batch = [[0.5, 1.0], [2.0, 3.0]]
    with connect(url, token=WITHOUT["teach"], timeouts=patient) as client:
        learning = client.open_job(weighter="w")
        assert isinstance(learning.failure, PermissionDenied)
        assert learning.score(batch, 0).fallback
        with client.open_job(weighter="w", role="frozen") as job:
            assert not job.score(batch, 0).fallback
            job.meta_update([0.5, -0.5], batch, 0, probes=[True, True])
            assert job.flush(20)
            assert (job.counters.updates_refused, job.attached) == (1, True)
            assert not job.score(batch, 1).fallback


# ---- The start ------------------------------------------------------------------------------------------------------


def test_a_service_that_others_can_reach_does_not_start_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weighting_service.app import serve

    def start(**settings: Any) -> int:
        """Runs a service for as long as it takes to get ready; returns its gRPC port."""
        stop, ports = asyncio.Event(), []

        def ready(grpc_port: int, rest_port: int) -> None:
            ports.append(grpc_port)
            stop.set()

        host = "0.0.0.0"
        asyncio.run(serve(Settings(host=host, grpc_port=0, rest_port=0, state=tmp_path / "s", **settings), stop, ready))
        return ports[0]

    with pytest.raises(InvalidArgument, match=r"host is '0\.0\.0\.0', which others can reach"):
        start()
    with pytest.raises(InvalidArgument, match=r"the tokens file .*none\.toml can't be read"):
        start(tokens=tmp_path / "none.toml")
    with pytest.raises(InvalidArgument, match="--tls-key is missing"):
        start(insecure=True, tls_cert=tmp_path / "cert.pem")
    assert not (tmp_path / "s").exists(), "refused before anything is made"
    monkeypatch.setenv("WEIGHBRIDGE_TOKENS_TOML", tokens_file(tmp_path / "t", {"alice": ("a", ["score"])}).read_text())
    assert start()
    monkeypatch.delenv("WEIGHBRIDGE_TOKENS_TOML")
    assert start(insecure=True)
