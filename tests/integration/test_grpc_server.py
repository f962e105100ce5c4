"""The gRPC API of a real server: what works, and one clear sentence for every mistake."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.tensors import from_message, to_message

NAMES = ["loss", "length", "gain"]
SPEC = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES))
TINY_ENCODER = (
    '{"model_type": "bert", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, '
    '"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}'
)


def rows(samples: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, len(NAMES))).astype(np.float32)


def features(array: np.ndarray) -> pb.Inputs:
    return pb.Inputs(features=to_message(array))


def opened(stub: Any, name: str = "w", job_id: str = "job", **fields: Any) -> pb.Job:
    stub.CreateWeighter(pb.CreateWeighterRequest(name=name, spec=SPEC, exist_ok=True))
    return stub.OpenJob(pb.OpenJobRequest(weighter=name, job_id=job_id, **fields))


def update(step: int, array: np.ndarray, **fields: Any) -> pb.MetaUpdateRequest:
    cotangent = to_message(fields.pop("cotangent", -array[:, 0]))
    return pb.MetaUpdateRequest(job_id="job", step=step, inputs=features(array), cotangent=cotangent, **fields)


def test_a_job_scores_teaches_and_reads_its_own_updates(stub: Any) -> None:
    job = opened(stub)
    assert (job.open, job.resumed, job.last_step, job.position) == (True, False, -1, 0)
    fresh = stub.Score(pb.ScoreRequest(job_id="job", inputs=features(rows())))
    np.testing.assert_array_equal(from_message(fresh.weights, "weights"), np.ones(8, np.float32))
    assert fresh.effective_sample_size == pytest.approx(8)
    for step in range(40):
        taught = stub.MetaUpdate(update(step, rows(16, step)))
        assert (taught.position, taught.duplicate) == (step + 1, False)
    batch = rows(64, 999)
    scores = stub.Score(pb.ScoreRequest(job_id="job", inputs=features(batch), min_position=40))
    weights = from_message(scores.weights, "weights")
    assert scores.position == 40
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(weights, batch[:, 0])[0, 1] > 0.5  # the first column was said to help
    weighter = stub.GetWeighter(pb.GetWeighterRequest(name="w"))
    assert (weighter.position, weighter.applied_position, weighter.jobs_open) == (40, 40, 1)
    assert weighter.learning.jobs["job"].updates_applied == 40
    assert stub.CloseJob(pb.CloseJobRequest(job_id="job")).last_step == 39


def test_a_retry_is_a_duplicate_and_another_payload_is_refused(stub: Any) -> None:
    opened(stub)
    first = stub.MetaUpdate(update(7, rows()))
    again = stub.MetaUpdate(update(7, rows()))
    assert (again.position, again.duplicate) == (first.position, True)
    with pytest.raises(grpc.RpcError) as error:
        stub.MetaUpdate(update(7, rows(seed=1)))
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert stub.GetWeighter(pb.GetWeighterRequest(name="w")).position == 1


def test_columns_in_the_jobs_own_order(stub: Any) -> None:
    opened(stub)
    opened(stub, job_id="reversed", feature_names=NAMES[::-1])
    for step in range(20):
        stub.MetaUpdate(update(step, rows(16, step)))
    batch = rows()
    one = stub.Score(pb.ScoreRequest(job_id="job", inputs=features(batch), min_position=20))
    other = stub.Score(pb.ScoreRequest(job_id="reversed", inputs=features(batch[:, ::-1]), min_position=20))
    assert one.weights == other.weights


def test_tokens_and_texts(stub: Any) -> None:
    spec = pb.WeighterSpec(tokens=pb.TokenSpec(encoder_config=TINY_ENCODER, tokenizer="bytes", max_tokens=64))
    stub.CreateWeighter(pb.CreateWeighterRequest(name="w", spec=spec))
    stub.OpenJob(pb.OpenJobRequest(weighter="w", job_id="job"))
    texts = ["short", "a longer text"]
    ids = np.zeros((2, 13), np.uint16)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = list(text.encode())
    by_text = pb.Inputs(texts=texts)
    by_id = pb.Inputs(tokens=to_message(ids), lengths=to_message(np.array([5, 13], np.int32)))
    stub.MetaUpdate(
        pb.MetaUpdateRequest(
            job_id="job", step=0, inputs=by_text, cotangent=to_message(np.array([1.0, -1.0], np.float32))
        )
    )
    a = stub.Score(pb.ScoreRequest(job_id="job", inputs=by_text, min_position=1))
    b = stub.Score(pb.ScoreRequest(job_id="job", inputs=by_id, min_position=1))
    assert a.weights == b.weights
    assert a.position == 1


def test_streams_answer_in_order(stub: Any) -> None:
    opened(stub)
    updates = list(stub.StreamMetaUpdate(iter([update(step, rows(seed=step)) for step in range(5)])))
    assert [u.position for u in updates] == [1, 2, 3, 4, 5]
    requests = [pb.ScoreRequest(job_id="job", inputs=features(rows(n)), min_position=5) for n in (3, 9, 4)]
    sizes = [list(r.weights.shape) for r in stub.StreamScore(iter(requests))]
    assert sizes == [[3], [9], [4]]


def test_watch_sees_positions_move(stub: Any) -> None:
    opened(stub)
    watch = stub.WatchWeighter(pb.WatchWeighterRequest(name="w"))
    assert next(watch).applied_position == 0
    stub.MetaUpdate(update(0, rows()))
    assert next(watch).applied_position == 1
    stub.DeleteWeighter(pb.DeleteWeighterRequest(name="w"))
    with pytest.raises(grpc.RpcError) as error:
        next(watch)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


def test_many_jobs_at_once_add_up(stub: Any) -> None:
    stub.CreateWeighter(pb.CreateWeighterRequest(name="w", spec=SPEC))

    def train(job_id: str) -> None:
        stub.OpenJob(pb.OpenJobRequest(weighter="w", job_id=job_id))
        for step in range(10):
            batch = rows(4 + step, step)
            got = stub.Score(pb.ScoreRequest(job_id=job_id, inputs=features(batch)))
            assert list(got.weights.shape) == [4 + step]
            request = update(step, batch)
            request.job_id = job_id
            stub.MetaUpdate(request)

    threads = [threading.Thread(target=train, args=(f"job-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stub.Score(pb.ScoreRequest(job_id="job-0", inputs=features(rows()), min_position=40))
    weighter = stub.GetWeighter(pb.GetWeighterRequest(name="w"))
    assert weighter.position == 40
    assert {job: s.updates_applied for job, s in weighter.learning.jobs.items()} == {f"job-{i}": 10 for i in range(4)}


def not_finite() -> np.ndarray:
    array = rows()
    array[2, 1] = np.nan
    return array


def score(inputs: pb.Inputs, **fields: Any) -> Callable[[Any], Any]:
    return lambda stub: stub.Score(pb.ScoreRequest(**{"job_id": "job", "inputs": inputs, **fields}))


def teach(**fields: Any) -> Callable[[Any], Any]:
    return lambda stub: stub.MetaUpdate(update(fields.pop("step", 0), fields.pop("array", rows()), **fields))


def create(name: str = "other", **spec: Any) -> Callable[[Any], Any]:
    return lambda stub: stub.CreateWeighter(pb.CreateWeighterRequest(name=name, spec=pb.WeighterSpec(**spec)))


BROKEN_TENSOR = pb.Tensor(dtype="float32", shape=[4, 3], data=b"123")
FLOAT_TOKENS = pb.Inputs(tokens=to_message(rows()))
MISTAKES = {
    "columns": (score(features(rows()[:, :2])), "INVALID_ARGUMENT", ["features", "[8, 2]", "[B, 3]"]),
    "dimensions": (score(features(rows()[0])), "INVALID_ARGUMENT", ["features", "[3]"]),
    "empty batch": (score(features(rows()[:0])), "INVALID_ARGUMENT", ["features", "no rows"]),
    "nothing": (score(pb.Inputs()), "INVALID_ARGUMENT", ["features are missing"]),
    "not finite": (score(features(not_finite())), "INVALID_ARGUMENT", ["features[2, 1]", "nan", "finite"]),
    "integer features": (score(pb.Inputs(features=BROKEN_TENSOR)), "INVALID_ARGUMENT", ["3 bytes", "48"]),
    "dtype": (
        score(pb.Inputs(features=pb.Tensor(dtype="object", shape=[1], data=b""))),
        "INVALID_ARGUMENT",
        ["features.dtype", "'object'", "float32"],
    ),
    "shape of no array": (
        score(pb.Inputs(features=pb.Tensor(dtype="float32", shape=[0, 2**53, 2**31], data=b""))),
        "INVALID_ARGUMENT",
        ["features.shape", "9007199254740992"],
    ),
    "tokens not in the spec": (score(FLOAT_TOKENS), "INVALID_ARGUMENT", ["features are missing"]),
    "unknown job": (score(features(rows()), job_id="nobody"), "NOT_FOUND", ["'nobody'", "open it"]),
    "position ahead": (score(features(rows()), min_position=5), "FAILED_PRECONDITION", ["min_position is 5", "at 0"]),
    "cotangent shape": (teach(cotangent=rows()[:3, 0]), "INVALID_ARGUMENT", ["cotangent", "[3]", "[8]"]),
    "cotangent constant": (teach(cotangent=np.ones(8, np.float32)), "INVALID_ARGUMENT", ["same for all 8"]),
    "cotangent not finite": (teach(cotangent=not_finite()[:, 1]), "INVALID_ARGUMENT", ["cotangent[2]", "nan"]),
    "step": (teach(step=-3), "INVALID_ARGUMENT", ["step is -3"]),
    "update id": (teach(update_id="x" * 200), "INVALID_ARGUMENT", ["update_id", "200", "128"]),
    "scored position": (teach(scored_position=9), "FAILED_PRECONDITION", ["scored_position is 9", "ends at 0"]),
    "name": (create("a b", features=SPEC.features), "INVALID_ARGUMENT", ["'a b'", "letters"]),
    "taken": (create("w", features=SPEC.features), "ALREADY_EXISTS", ["'w' exists"]),
    "empty spec": (create(), "INVALID_ARGUMENT", ["neither features nor tokens"]),
    "duplicate columns": (create(features=pb.FeatureSpec(names=["a", "a"])), "INVALID_ARGUMENT", ["distinct"]),
    "width": (
        create(features=SPEC.features, head=pb.HeadSpec(width=33)),
        "INVALID_ARGUMENT",
        ["width (33)", "attention_heads (4)"],
    ),
    "encoder": (
        create(tokens=pb.TokenSpec(encoder_config='{"model_type": "no-such-model"}')),
        "INVALID_ARGUMENT",
        ["no-such-model"],
    ),
    "pretrained": (create(tokens=pb.TokenSpec(pretrained="../x")), "INVALID_ARGUMENT", ["pretrained", "models"]),
    "unknown weighter": (
        lambda stub: stub.OpenJob(pb.OpenJobRequest(weighter="nope")),
        "NOT_FOUND",
        ["'nope'", "this service has: w"],
    ),
    "feature names": (
        lambda stub: stub.OpenJob(pb.OpenJobRequest(weighter="w", feature_names=["loss", "size"])),
        "INVALID_ARGUMENT",
        ["not in the spec ['size']", "missing ['length', 'gain']"],
    ),
    "delete unknown": (lambda stub: stub.DeleteWeighter(pb.DeleteWeighterRequest(name="x")), "NOT_FOUND", ["'x'"]),
}


@pytest.fixture(scope="module")
def shared_stub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import ServiceThread

    running = ServiceThread(tmp_path_factory.mktemp("state"), max_batch_samples=100)
    with grpc.insecure_channel(f"127.0.0.1:{running.address.grpc_port}") as channel:
        from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub

        stub = WeightingServiceStub(channel)
        opened(stub)
        yield stub
    running.stop()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_sentence(shared_stub: Any, mistake: str) -> None:
    call, code, words = MISTAKES[mistake]
    with pytest.raises(grpc.RpcError) as error:
        call(shared_stub)
    assert error.value.code().name == code, error.value.details()
    for word in words:
        assert word in error.value.details()
    assert "\n" not in error.value.details()
    weighter = shared_stub.GetWeighter(pb.GetWeighterRequest(name="w"))
    assert weighter.position == 0  # no mistake reaches the log


@pytest.mark.parametrize("method", ["Score", "StreamScore", "WatchWeighter"])
def test_bytes_that_are_no_message(service: Any, method: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        path = f"/weighting.v1.WeightingService/{method}"
        calls = {
            "Score": lambda: channel.unary_unary(path)(b"\xff"),
            "StreamScore": lambda: list(channel.stream_stream(path)(iter([b"\xff"]))),
            "WatchWeighter": lambda: list(channel.unary_stream(path)(b"\xff")),
        }
        with pytest.raises(grpc.RpcError) as error:
            calls[method]()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the request is no" in error.value.details()


def test_batch_over_the_limit(shared_stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        score(features(rows(101)))(shared_stub)
    assert "101 samples" in error.value.details()
    assert "at most 100" in error.value.details()


def test_token_ids_outside_the_vocabulary(shared_stub: Any) -> None:
    spec = pb.WeighterSpec(tokens=pb.TokenSpec(encoder_config=TINY_ENCODER, max_tokens=16))
    shared_stub.CreateWeighter(pb.CreateWeighterRequest(name="tokens", spec=spec))
    shared_stub.OpenJob(pb.OpenJobRequest(weighter="tokens", job_id="tokens-job"))
    for inputs, words in (
        (pb.Inputs(tokens=to_message(np.array([[1, 256]]))), "tokens[0, 1] is 256, expected an id from 0 to 255"),
        (pb.Inputs(tokens=to_message(np.array([[1, -1]]))), "tokens[0, 1] is -1"),
        (pb.Inputs(tokens=to_message(np.zeros((1, 17), np.int64))), "rows of 17"),
        (pb.Inputs(tokens=to_message(np.ones((2, 3), np.float32))), "dtype float32"),
        (pb.Inputs(texts=["a"]), "names no tokenizer"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            score(inputs, job_id="tokens-job")(shared_stub)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in error.value.details()


def test_closed_and_frozen_jobs(stub: Any) -> None:
    opened(stub)
    opened(stub, job_id="frozen", role=pb.ROLE_FROZEN)
    request = update(0, rows())
    request.job_id = "frozen"
    with pytest.raises(grpc.RpcError, match="frozen"):
        stub.MetaUpdate(request)
    stub.CloseJob(pb.CloseJobRequest(job_id="job"))
    assert not stub.CloseJob(pb.CloseJobRequest(job_id="job")).open
    with pytest.raises(grpc.RpcError, match="closed"):
        stub.Score(pb.ScoreRequest(job_id="job", inputs=features(rows())))
    assert opened(stub).resumed


def test_health_and_reflection(service: Any) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "weighting.v1.WeightingService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(reflection.ServerReflectionInfo(iter([request]))))
        assert "weighting.v1.WeightingService" in {s.name for s in answer.list_services_response.service}


def test_a_zero_in_a_spec_is_a_zero(stub: Any) -> None:
    head, learning = pb.HeadSpec(layers=0, min_effective_share=0), pb.LearningSpec(weight_decay=0, max_staleness=0)
    spec = pb.WeighterSpec(features=SPEC.features, head=head, learning=learning)
    made = stub.CreateWeighter(pb.CreateWeighterRequest(name="zeros", spec=spec)).spec
    assert (made.head.layers, made.head.min_effective_share) == (0, 0)
    assert (made.learning.weight_decay, made.learning.max_staleness) == (0, 0)
    assert (made.head.width, made.learning.learning_rate) == (32, 1e-3)  # left out: the defaults


def test_jobs_that_start_together_ask_for_the_same_weighter(stub: Any) -> None:
    request = pb.CreateWeighterRequest(name="shared", spec=SPEC, exist_ok=True)
    futures = [stub.CreateWeighter.future(request) for _ in range(6)]
    assert len({future.result().created_unix_ms for future in futures}) == 1
