"""Messages that the client makes and reads, and their JSON for REST."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import wire
from trainer_client.transports import rest_json
from weighting_contract.errors import Internal, InvalidArgument
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
    }
    opening = pb.OpenJobRequest(weighter="w", job_id="j", role=pb.ROLE_FROZEN, feature_names=["a"])
    assert rest_json.ROUTES["OpenJob"](opening).body == {
        "weighter": "w",
        "job_id": "j",
        "role": "frozen",
        "feature_names": ["a"],
    }


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
