"""One contract for gRPC, REST and embedded: the same client against a real service, whatever carries its calls."""

from __future__ import annotations

import hashlib
import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import wait_for
from trainer_client import Client, Limits, Timeouts, connect
from weighting_contract.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)

torch = pytest.importorskip("torch")
from weighting_contract.ngrams import count_ngrams, log_ratios  # noqa: E402
from weighting_contract.profile import Profile, documents_checksum  # noqa: E402
from weighting_contract.reference import FILES  # noqa: E402

SPEC = {"features": {"names": ["loss", "length", "easy"]}, "head": {"width": 8, "attention_heads": 2}}
TOKENS = {
    "tokens": {
        "encoder_config": '{"model_type": "bert", "vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 1,'
        ' "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 32}',
        "tokenizer": "bytes",
        "max_tokens": 16,
    },
    "head": {"width": 8, "attention_heads": 2},
}
FEATURES = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
COTANGENT = np.array([1, -1, 0.5, 0.25, -0.5, 0.1], np.float32)
PATIENT = Timeouts(score_s=30, meta_update_s=30, admin_s=60, close_s=30)
QUICK_TRIALS = Limits(breaker_period_s=0.05, breaker_max_period_s=0.1)


class ServiceProcess:
    """`python -m weighting_service` on its own ports; its log is read until it says where it listens."""

    def __init__(self, state: Path, grpc_port: int = 0, rest_port: int = 0) -> None:
        flags = [
            "--grpc-port",
            grpc_port,
            "--rest-port",
            rest_port,
            "--state",
            state,
            "--threads",
            1,
            "--device",
            "cpu",
        ]
        command = [sys.executable, "-m", "weighting_service", *map(str, flags)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        lines: list[str] = []
        for line in self.process.stderr:
            lines.append(line)
            if ready := re.search(r"ready: gRPC on \S+:(\d+), REST on \S+:(\d+)", line):
                self.grpc_port, self.rest_port = int(ready[1]), int(ready[2])
                break
        else:
            pytest.fail("the service did not start:\n" + "".join(lines))
        self._reader = threading.Thread(target=self.process.stderr.read)  # else its log would fill the pipe
        self._reader.start()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("state"))
    yield service
    service.stop()


@pytest.fixture(scope="module", params=["grpc", "http", "embedded"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "embedded":
        return f"embedded://{tmp_path_factory.mktemp('embedded')}"
    service: ServiceProcess = request.getfixturevalue("service")
    port = service.grpc_port if request.param == "grpc" else service.rest_port
    return f"{request.param}://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with connect(url, timeouts=PATIENT, on_failure="raise") as client:
        yield client


def another(url: str) -> str:
    """For a second client: a state directory serves one embedded service only."""
    return "embedded" if url.startswith("embedded") else url


@pytest.fixture
def name(client: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """A weighter of this test and transport alone."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)
    client.create_weighter(name, SPEC)
    yield name
    client.delete_weighter(name)


def test_weighters_are_made_listed_and_deleted(client: Client, name: str) -> None:
    made = client.get_weighter(name)
    assert list(made.spec.features.names) == SPEC["features"]["names"]
    assert (made.spec.head.width, made.position, made.parameters > 0) == (8, 0, True)
    assert name in [weighter.name for weighter in client.list_weighters()]
    assert client.create_weighter(name, SPEC).created_unix_ms == made.created_unix_ms
    with pytest.raises(AlreadyExists):
        client.create_weighter(name, SPEC, exist_ok=False)
    client.create_weighter(f"{name}-2", SPEC)
    client.delete_weighter(f"{name}-2")
    with pytest.raises(NotFound, match="no weighter"):
        client.get_weighter(f"{name}-2")


def test_weights_have_mean_one_and_follow_what_was_taught(client: Client, name: str) -> None:
    with client.open_job(weighter=name) as job:
        before = job.score(FEATURES, 0)
        assert before.weights.mean() == pytest.approx(1, abs=1e-5)
        assert before.effective_sample_size == pytest.approx(float(6**2 / (before.weights**2).sum()), rel=1e-5)
        for step in range(10):
            job.score(FEATURES, step)
            job.meta_update(COTANGENT, FEATURES, step)
        after = job.score(FEATURES, 10)
        assert after.position >= 10
        assert job.last_position == 10
        # dL/dw was positive for sample 0 and negative for sample 1: the loss falls where weight moves from 0 to 1.
        moved = after.weights - before.weights
        assert moved[1] > moved[0]
        counters = job.counters
    assert (counters.scored, counters.fallback_steps) == (12, 0)
    assert (counters.updates_acknowledged, counters.updates_duplicate) == (10, 0)
    learned = client.get_weighter(name)
    assert (learned.position, learned.learning.updates_applied) == (10, 10)
    assert learned.learning.jobs[job.job_id].updates_applied == 10


def test_columns_in_another_order_give_the_same_weights(client: Client, name: str) -> None:
    with (
        client.open_job(weighter=name) as job,
        client.open_job(weighter=name, feature_names=["easy", "loss", "length"], role="frozen") as other,
    ):
        expected = job.score(FEATURES, 0).weights
        np.testing.assert_allclose(other.score(FEATURES[:, [2, 0, 1]], 0).weights, expected, rtol=1e-5)


def test_a_resumed_job_repeats_its_updates_without_effect(client: Client, name: str) -> None:
    with client.open_job(weighter=name) as job:
        for step in range(3):
            job.meta_update(COTANGENT, FEATURES, step)
        expected = job.score(FEATURES, 3)
        state = job.state_dict()
    with client.open_job(weighter=name) as resumed:
        resumed.load_state_dict(state)
        for step in range(3):
            resumed.meta_update(COTANGENT, FEATURES, step)
        again = resumed.score(FEATURES, 3)
        assert resumed.state_dict() == state
        assert resumed.counters.updates_duplicate == 3
        resumed.meta_update(-COTANGENT, FEATURES, 1)
        with pytest.raises(AlreadyExists):
            resumed.flush()
    assert again.position == expected.position == 3
    np.testing.assert_array_equal(again.weights, expected.weights)


def test_tokens_and_texts_give_the_same_weights(client: Client) -> None:
    texts = ["one", "another", "a third text"]
    rows = [list(text.encode()) for text in texts]
    tokens = np.array([row + [0] * (12 - len(row)) for row in rows])
    with client.open_job(weighter="tokens", spec=TOKENS) as job:
        from_texts = job.score(texts=texts)
        from_tokens = job.score(tokens=torch.tensor(tokens), lengths=[len(row) for row in rows])
        assert isinstance(from_tokens.weights, torch.Tensor)
        np.testing.assert_allclose(from_tokens.weights.numpy(), from_texts.weights, rtol=1e-5)
        job.meta_update([0.1, -0.1, 0.0], step=0, tokens=tokens, lengths=[len(row) for row in rows])
        assert job.flush()
        assert job.counters.updates_acknowledged == 1


def test_references_are_listed_read_and_uploaded(client: Client) -> None:
    packaged = client.get_reference("pretaught", ["tokenizer.json"])
    assert (list(packaged.files), packaged.seq_len, packaged.vocab_size) == (["tokenizer.json"], 64, 1024)
    assert hashlib.sha256(packaged.files["tokenizer.json"]).hexdigest() == packaged.tokenizer_checksum
    files = dict(client.get_reference("pretaught", FILES).files)
    with pytest.raises(InvalidArgument, match=r"model\.safetensors is truncated"):
        client.put_reference("mine", files | {"model.safetensors": files["model.safetensors"][:-1]})
    assert client.put_reference("mine", files).checksum == packaged.checksum
    assert client.put_reference("mine", files).name == "mine"
    with pytest.raises(AlreadyExists):
        client.put_reference("mine", files, exist_ok=False)
    assert {"mine", "pretaught"} <= {reference.name for reference in client.list_references()}
    client.delete_reference("mine")
    with pytest.raises(NotFound, match="mine"):
        client.get_reference("mine")


def test_tokens_are_scored_by_a_reference_and_taught_by_their_statistics(client: Client, url: str) -> None:
    name = f"by-reference-{url.partition(':')[0]}"
    reference = client.get_reference("pretaught")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, 40) for _ in range(5)]
    tokens, lengths = rng.integers(0, 1000, (6, 20)), [20, 18, 20, 9, 20, 2]
    given = {
        "initial": "pretaught",
        "reference": "pretaught",
        "reference_checksum": reference.checksum,
        "tokenizer_checksum": reference.tokenizer_checksum,
    }
    with client.open_job(weighter=name, profile=documents, **given) as job:
        scores = job.score(tokens=tokens, lengths=lengths, return_statistics=True, min_effective_share=0.1)
        names = client.get_weighter(name).spec.features.names
        assert scores.statistics.shape == (6, len(names))
        assert job.score(tokens=tokens, lengths=lengths).statistics is None
        new = np.random.default_rng([*name.encode()]).integers(0, 1000, (6, 20))  # to the service
        assert [job.score(tokens=new).computed_samples for _ in range(2)] == [6, 0]
        probes = [True, True, False, False, False, False]
        for step in (3, 4):
            job.meta_update(COTANGENT, scores.statistics, step, estimator="score_function", probes=probes)
        assert job.flush()
        assert (job.counters.updates_acknowledged, job.last_step) == (2, 4)
        job_id = job.job_id
    learned = wait_for(lambda: (view := client.get_weighter(name)).applied_position == 2 and view)
    assert learned.initial == "pretaught"
    assert learned.learning.jobs[job_id].probed_updates >= 1, "a first update whose logits are all equal says nothing"
    ngrams = count_ngrams([np.asarray(documents[0])], reference.ngram_buckets)
    with pytest.raises(FailedPrecondition, match="profile of the documents"):
        client.open_job(job_id, weighter=name, profile=documents[:1], **given)
    with client.open_job(job_id, weighter=name, role="learn", profile=documents, **given) as resumed:
        assert resumed.last_step == 4
    wrong = Profile(log_ratios(ngrams, ngrams)[:1024], documents_checksum(documents[:1]))
    with pytest.raises(InvalidArgument, match="1024"):
        client.open_job(weighter=name, profile=wrong, **given)
    finished = Profile(log_ratios(ngrams, np.ones_like(ngrams)), documents_checksum(documents[:1]))
    with client.open_job(weighter=name, profile=finished, role="frozen", **given) as frozen:
        own = frozen.score(tokens=tokens, lengths=lengths, return_statistics=True)
        column = list(names).index("ngram_log_ratio")
        assert not np.allclose(own.statistics[:, column], scores.statistics[:, column]), "a profile is the job's own"
        frozen.meta_update(COTANGENT, own.statistics, 0, probes=probes)
        assert frozen.flush()
        assert frozen.counters.updates_acknowledged == 1
    for field in ("reference_checksum", "tokenizer_checksum"):
        with pytest.raises(FailedPrecondition, match="checksum"):
            client.open_job(weighter=name, profile=documents, **(given | {field: "0" * 64}))
    with pytest.raises(InvalidArgument, match="profile"):
        client.open_job(weighter=name, **given)
    with pytest.raises(NotFound, match="nobody"):
        client.open_job(weighter=name, profile=documents, **(given | {"reference": "nobody"}))


def test_mistakes_keep_their_kind_and_sentence(client: Client, name: str) -> None:
    with client.open_job(weighter=name) as job:
        with pytest.raises(InvalidArgument, match=r"features has shape \[6, 2\], expected \[B, 3\]"):
            job.score(FEATURES[:, :2], 0)
        with pytest.raises(InvalidArgument, match="finite"):
            job.score(np.full((2, 3), np.nan, np.float32), 0)
        job.meta_update(np.zeros(6, np.float32), FEATURES, 0)
        with pytest.raises(InvalidArgument, match="cotangent is the same"):
            job.flush()
        assert job.score(FEATURES, 0).weights.mean() == pytest.approx(1, abs=1e-5)
    with pytest.raises(NotFound, match="nobody"):
        client.open_job(weighter="nobody")
    with pytest.raises(InvalidArgument, match="feature_names"):
        client.open_job(weighter=name, feature_names=["loss"])


def test_a_job_that_was_closed_elsewhere_goes_on(client: Client, name: str) -> None:
    with client.open_job(weighter=name) as job:
        with client.open_job(job.job_id, weighter=name):
            pass
        assert not job.score(FEATURES, 0).fallback
        with client.open_job(job.job_id, weighter=name):
            pass
        job.meta_update(COTANGENT, FEATURES, 0)
        assert job.flush()
        assert (job.counters.updates_acknowledged, job.counters.updates_refused, job.last_position) == (1, 0, 1)
        assert client.get_weighter(name).jobs_open == 1


def test_exports_files(client: Client, name: str, tmp_path: Path) -> None:
    folder = client.export_weighter(name, tmp_path / "new" / "folder")
    assert {"config.json"} < {path.name for path in folder.iterdir()}
    assert any(path.suffix == ".safetensors" for path in folder.iterdir())


def test_watching_follows_the_applied_position(client: Client, name: str) -> None:
    watching = client.watch_weighter(name)
    assert next(watching).applied_position == 0
    with client.open_job(weighter=name) as job:
        job.meta_update(COTANGENT, FEATURES, 0)
        assert next(watching).applied_position == 1
    with pytest.raises(NotFound):
        list(client.watch_weighter("nobody"))


def test_a_call_ends_at_its_deadline(url: str) -> None:
    with connect(another(url), timeouts=Timeouts(admin_s=1e-5)) as hasty, pytest.raises(DeadlineExceeded):
        hasty.create_weighter("never-in-time", TOKENS)


def test_nothing_is_left_after_close(url: str) -> None:
    before = set(threading.enumerate())
    client = connect(another(url), timeouts=PATIENT)
    with client.open_job(weighter="left", spec=SPEC) as job:
        assert not job.score(FEATURES, 0).fallback
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        client.list_weighters()
    wait_for(lambda: not {t for t in threading.enumerate() if t.name.startswith("weighbridge")} - before)


def test_training_survives_a_killed_service(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path)
    ports = service.grpc_port, service.rest_port
    urls = [f"grpc://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"]
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(url, timeouts=PATIENT, limits=QUICK_TRIALS)) for url in urls]
        jobs = [stack.enter_context(client.open_job(spec=SPEC)) for client in clients]
        for step, job in itertools.product(range(4), jobs):
            assert not job.score(FEATURES, step).fallback
            job.meta_update(COTANGENT, FEATURES, step)
        assert all(job.flush() for job in jobs)
        service.stop(signal.SIGKILL)
        for job in jobs:
            assert job.score(FEATURES, 4).weights.tolist() == [1.0] * 6
            job.meta_update(COTANGENT, FEATURES, 4)
        again = ServiceProcess(tmp_path, *ports)
        stack.callback(again.stop)
        for job in jobs:
            wait_for(lambda job=job: not job.score(FEATURES, 5).fallback)  # type: ignore[misc]
            assert job.flush()
            assert (job.counters.updates_acknowledged, job.counters.fallback_steps > 0) == (5, True)
        assert clients[0].get_weighter("default").position == 10
