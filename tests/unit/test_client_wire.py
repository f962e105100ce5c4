"""Messages that the client makes and reads, and their JSON for REST."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import wire
from trainer_client.transports import rest_json
from weighting_contract.errors import Internal, InvalidArgument
from weighting_contract.profile import Profile
from weighting_contract.spec import WeighterSpec
from weighting_contract.tensors import from_message, to_message


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([[0, 65535]], "uint16"),
        ([[0, 65536]], "int32"),
        ([[-1, 5]], "int32"),
        ([[0, 2**40]], "int64"),
        (np.array([[1, 2]], np.uint8), "uint8"),
    ],
)
def test_token_ids_travel_as_the_smallest_type_that_holds_them(ids: Any, dtype: str) -> None:
    message = wire.Batch(tokens=ids).message().tokens
    assert message.dtype == dtype
    assert from_message(message, "tokens").tolist() == np.asarray(ids).tolist()


def test_floats_travel_as_the_service_computes() -> None:
    inputs = wire.Batch(features=np.ones((2, 3)), hidden=np.ones((2, 4), np.float16)).message()
    assert (inputs.features.dtype, inputs.hidden.dtype) == ("float32", "float16")
    assert wire.cotangent_message([0.5, -0.5]).dtype == "float32"


def test_a_spec_is_sent_with_all_its_values() -> None:
    spec = WeighterSpec.from_dict(
        {"features": {"names": ["a"]}, "head": {"layers": 0}, "learning": {"weight_decay": 0.0}, "seed": 7}
    )
    sent = rest_json.to_json(wire.spec_message(spec))
    assert WeighterSpec.from_dict(sent) == spec
    assert wire.spec_message(spec.to_dict()) == wire.spec_message(spec)


def test_single_values_of_a_spec_are_sent_alone() -> None:
    sent = wire.spec_changes({"learning": {"learning_rate": 0.5}, "seed": 7})
    assert rest_json.to_json(sent) == {"learning": {"learning_rate": 0.5}, "seed": 7}
    for values, message in (({"lerning": {}}, "lerning"), ({"head": {"width": "wide"}}, "width")):
        with pytest.raises(InvalidArgument, match=rf"spec can't be read: .*{message}"):
            wire.spec_changes(values)


def test_files_of_an_export_travel_as_base64() -> None:
    request = pb.CreateWeighterRequest(name="w", files={"config.json": b"{}", "model.safetensors": b"\x00"})
    assert rest_json.ROUTES["CreateWeighter"](request).body == {
        **{"name": "w", "exist_ok": False, "initial": ""},
        "files": {"config.json": "e30=", "model.safetensors": "AA=="},
    }


def test_rest_bodies_are_plain() -> None:
    inputs = pb.Inputs(
        tokens=to_message(np.array([[1, 2, 0], [3, 4, 5]])), lengths=to_message(np.array([2, 3])), texts=[]
    )
    update = pb.MetaUpdateRequest(
        job_id="a/b", update_id="4", step=4, inputs=inputs, cotangent=to_message(np.array([0.5, -0.5]))
    )
    route = rest_json.ROUTES["MetaUpdate"](update)
    assert (route.verb, route.path) == ("POST", "/v1/jobs/a%2Fb/meta-updates")
    assert route.body == {
        "update_id": "4",
        "step": 4,
        "inputs": {"tokens": [[1, 2], [3, 4, 5]]},
        "cotangent": [0.5, -0.5],
        "scored_position": 0,
        "estimator": "vjp",
        "trust_only": False,
    }
    opening = pb.OpenJobRequest(weighter="w", job_id="j", role=pb.ROLE_FROZEN, feature_names=["a"])
    assert rest_json.ROUTES["OpenJob"](opening).body == {
        "weighter": "w",
        "job_id": "j",
        "role": "frozen",
        "feature_names": ["a"],
    }


def test_rest_bodies_of_references_and_targets_are_plain() -> None:
    putting = pb.PutReferenceRequest(name="a/b", files={"config.json": b"{}"}, exist_ok=True)
    route = rest_json.ROUTES["PutReference"](putting)
    assert (route.verb, route.path, route.body) == (
        "PUT",
        "/v1/references/a%2Fb",
        {"files": {"config.json": "e30="}, "exist_ok": True},
    )
    getting = pb.GetReferenceRequest(name="r", files=["tokenizer.json", "config.json"])
    assert rest_json.ROUTES["GetReference"](getting).path == "/v1/references/r?files=tokenizer.json&files=config.json"
    opening = pb.OpenJobRequest(
        weighter="w",
        reference=wire.reference_message("r", "", "a" * 64),
        profile=wire.profile_message([[1, 2, 3], np.array([4], np.uint8)]),
    )
    body = rest_json.ROUTES["OpenJob"](opening).body
    assert body is not None
    assert body["reference"] == {"name": "r", "checksum": "", "tokenizer_checksum": "a" * 64}
    assert body["profile"] == {"documents": [[1, 2, 3], [4]], "documents_checksum": ""}
    scoring = pb.ScoreRequest(job_id="j", inputs=wire.Batch(tokens=[[1, 2]]).message(), min_effective_share=0.0)
    assert rest_json.ROUTES["Score"](scoring).body == {
        "step": 0,
        "inputs": {"tokens": [[1, 2]]},
        "min_position": 0,
        "min_effective_share": 0.0,
        "return_statistics": False,
    }


def test_a_finished_profile_travels_as_float16() -> None:
    profile = Profile(np.array([0.5, -1.25], np.float16), "c" * 64)
    message = wire.profile_message(profile)
    assert (message.log_ratios.dtype, message.documents_checksum) == ("float16", "c" * 64)
    assert rest_json.to_json(pb.OpenJobRequest(profile=message))["profile"] == {
        "log_ratios": [0.5, -1.25],
        "documents_checksum": "c" * 64,
    }
    with pytest.raises(InvalidArgument, match=r"profile.log_ratios is int64 of shape \[2, 2\]"):
        wire.profile_message(Profile(np.ones((2, 2), np.int64), ""))


@pytest.mark.parametrize("probes", [[1, 0], [True], [[True, False]]])
def test_probes_are_one_bool_a_sample(probes: Any) -> None:
    assert from_message(wire.probes_message([True, False], 2), "probes").tolist() == [1, 0]
    with pytest.raises(InvalidArgument, match=r"expected bool of \[2\]"):
        wire.probes_message(probes, 2)


@pytest.mark.parametrize("statistics", [np.ones(2), np.ones((3, 1)), np.array([[1.0], [np.nan]])])
def test_statistics_of_other_samples_are_internal_errors(statistics: np.ndarray) -> None:
    ones = to_message(np.ones(2, np.float32))
    answer = pb.ScoreResponse(weights=ones, logits=ones, statistics=to_message(statistics))
    with pytest.raises(Internal, match=r"statistics of shape .*expected \[2, F\]"):
        wire.read_scores(answer, 2)


def test_scores_in_json_are_read_back() -> None:
    answer = {"weights": [1.0], "logits": [0.5], "position": 3, "effective_sample_size": 1.0, "trust": 0.25}
    read = rest_json.ROUTES["Score"](pb.ScoreRequest()).read
    without = wire.read_scores(read(answer), 1)  # type: ignore[arg-type]
    given = read(answer | {"statistics": [[1.0, 2.0]]})
    assert without.statistics is None
    assert wire.read_scores(given, 1).statistics.tolist() == [[1.0, 2.0]]  # type: ignore[arg-type, union-attr]
    assert given.trust == 0.25  # type: ignore[attr-defined]
    assert without.computed_samples is None  # of an older service
    for computed in (0, 1):
        known = wire.read_scores(read(answer | {"computed_samples": computed}), 1)  # type: ignore[arg-type]
        assert known.computed_samples == computed


@pytest.mark.parametrize("computed", [-1, 3])
def test_more_samples_computed_than_sent_are_internal_errors(computed: int) -> None:
    ones = to_message(np.ones(2, np.float32))
    with pytest.raises(Internal, match=f"it computed {computed} of 2 samples"):
        wire.read_scores(pb.ScoreResponse(weights=ones, logits=ones, computed_samples=computed), 2)


@pytest.mark.parametrize("lengths", [[2], [0, 3], [2, 4]])
def test_lengths_that_fit_no_row_are_refused(lengths: list[int]) -> None:
    inputs = wire.Batch(tokens=[[1, 2, 0], [3, 4, 5]], lengths=lengths).message()
    with pytest.raises(InvalidArgument, match="lengths"):
        rest_json.ROUTES["Score"](pb.ScoreRequest(job_id="j", inputs=inputs))


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("Score", {"weights": [1.0]}),
        ("Score", {"weights": ["x"], "logits": [0.0], "position": 0, "effective_sample_size": 1.0}),
        ("OpenJob", {"position": "far"}),
        ("ExportWeighter", {"files": {"a": "not base64!"}}),
        ("ExportWeighter", {}),
    ],
)
def test_answers_that_can_not_be_read_are_internal_errors(method: str, answer: dict[str, Any]) -> None:
    request = {"Score": pb.ScoreRequest(), "OpenJob": pb.OpenJobRequest(), "ExportWeighter": pb.ExportWeighterRequest()}
    with pytest.raises(Internal, match="the service's answer is not"):
        rest_json.ROUTES[method](request[method]).read(answer)
