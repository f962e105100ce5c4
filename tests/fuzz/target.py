"""The service that is fuzzed: a process with tokens and things to hit, and what must be true of it afterwards.

Three tenants: "acme" owns the furniture, which inputs may use, teach, damage and delete; "guest" may only score;
"steady" has a weighter that no input can reach, so it must score the same batch alike whatever came in.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import requests

from protos.weighting.v1 import weighting_pb2 as pb
from protos.weighting.v1.weighting_pb2_grpc import WeightingServiceStub
from weighting_contract.columns import COLUMNS
from weighting_contract.tensors import to_message
from weighting_service.tokens import ROLES, hash_of

ANSWER_S = 10.0  # a call that takes longer hangs
SAID_S = 60.0  # for the process to start or to say something
READY = re.compile(r"ready: gRPC on [^ ]*:(\d+), REST on [^ ]*:(\d+)")
RESIDENT = re.compile(r"resident: (\d+) bytes")
RECORD = re.compile(r"^\d{4}-\d\d-\d\d \S+ ([A-Z]+) ")  # the first line of one in the log, with its level
HARMLESS = ("DEBUG", "INFO", "WARNING")

FLAGS = (
    *("--threads", "1", "--grpc-port", "0", "--rest-port", "0", "--job-idle-s", "100000", "--snapshot-every", "20"),
    *("--max-weighters-per-tenant", "12", "--max-jobs-per-tenant", "30", "--max-weighter-parameters", "2000000"),
    *("--max-batch-tokens", "262144", "--snapshots-kept", "2", "--updates-kept", "100"),
)

NAMES = ("loss", "length", "gain")
SPEC = pb.WeighterSpec(features=pb.FeatureSpec(names=NAMES), head=pb.HeadSpec(width=8, attention_heads=2))
ENCODER = (
    '{"model_type": "bert", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, '
    '"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}'
)
WEIGHTERS = (
    pb.CreateWeighterRequest(name="w", spec=SPEC, exist_ok=True),
    pb.CreateWeighterRequest(
        name="t",
        spec=pb.WeighterSpec(
            tokens=pb.TokenSpec(encoder_config=ENCODER, tokenizer="bytes", max_tokens=64),
            head=pb.HeadSpec(width=8, attention_heads=2),
        ),
        exist_ok=True,
    ),
    pb.CreateWeighterRequest(name="p", initial="pretaught", exist_ok=True),
)
DOCUMENTS = pb.TargetProfile(
    documents=to_message((np.arange(60) % 200).astype(np.uint16)), lengths=to_message(np.array([20, 40], np.int64))
)
JOBS = (
    pb.OpenJobRequest(weighter="w", job_id="learning"),
    pb.OpenJobRequest(weighter="w", job_id="frozen", role=pb.ROLE_FROZEN, feature_names=NAMES[::-1]),
    pb.OpenJobRequest(weighter="t", job_id="tokens"),
    pb.OpenJobRequest(weighter="p", job_id="referred", reference=pb.JobReference(name="pretaught"), profile=DOCUMENTS),
)


@dataclass(frozen=True)
class Credential:
    """What a caller shows, and whose it is."""

    authorization: str | None
    tenant: str | None  # None: nobody's, so every call with it must be refused

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.authorization is None else (("authorization", self.authorization),)


def _entry(name: str, tenant: str, roles: tuple[str, ...], *more: str) -> str:
    lines = (f'id = "{name}"', f'sha256 = "{hash_of(name)}"', f'tenant = "{tenant}"', f"roles = {list(roles)}", *more)
    return "\n".join(("[[token]]", *lines, ""))


ACME, GUEST, STEADY = (Credential(f"Bearer {name}-token", name) for name in ("acme", "guest", "steady"))
EXPIRED = Credential("Bearer expired-token", None)
TOKENS = "".join(
    (
        _entry("acme-token", "acme", ROLES),
        _entry("guest-token", "guest", ("score",)),
        _entry("steady-token", "steady", ("score", "teach")),
        _entry("expired-token", "acme", ROLES, "expires = 2020-01-01T00:00:00Z"),
    )
)


def batch(samples: int = 8, seed: int = 0) -> pb.Inputs:
    rows = np.random.default_rng(seed).normal(size=(samples, len(NAMES))).astype(np.float32)
    return pb.Inputs(features=to_message(rows))


def statistics(samples: int = 4) -> pb.Inputs:
    """What the job with a reference is taught with."""
    rows = np.random.default_rng(1).normal(size=(samples, len(COLUMNS))).astype(np.float32)
    return pb.Inputs(features=to_message(rows))


class Target:
    """Starts the process; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        tokens = folder / "tokens.toml"
        tokens.write_text(TOKENS)
        self.said: list[str] = []
        self._read_up_to = 0  # of it, by `complaints`
        self._heard = threading.Condition()
        command = [sys.executable, "-m", "tests.fuzz.served", "--state", str(folder / "state"), "--tokens", str(tokens)]
        # Two arenas, as otherwise every worker thread keeps some free memory of its own.
        self._process = subprocess.Popen(
            [*command, *FLAGS], stderr=subprocess.PIPE, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "2"}
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        with ExitStack() as undo:
            undo.callback(self._process.kill)
            ready = self._wait_for(READY, 0)
            self.rest_url = f"http://127.0.0.1:{ready[2]}"
            self.http = undo.enter_context(httpx.Client(timeout=ANSWER_S))
            self.session = undo.enter_context(requests.Session())
            self.channel = undo.enter_context(grpc.insecure_channel(f"127.0.0.1:{ready[1]}"))
            self._stub: Any = WeightingServiceStub(self.channel)  # type: ignore[no-untyped-call]
            self._furnish()
            self._teach_steady()
            self._expected = self._steady_scores()
            undo.pop_all()

    def close(self) -> int:
        """Ends it by SIGTERM, or by force where that takes too long; its exit status."""
        for connection in (self.channel, self.http, self.session):
            connection.close()
        self._process.terminate()
        try:
            status = self._process.wait(SAID_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reading.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        return status

    # ---- What must be true ------------------------------------------------------------------------------------------

    def changes(self) -> str:
        """How the weighter that nobody could reach scores otherwise than before; empty: it doesn't."""
        scores = self._steady_scores()
        return "" if scores == self._expected else f"the steady batch scored {self._expected!r}, now {scores!r}"

    def complaints(self) -> list[str]:
        """The errors in the service's log since this was asked last, with tracebacks: no input should cause one."""
        records: list[str] = []
        for line in self.said[self._read_up_to :]:
            if records and not RECORD.search(line):
                records[-1] += line
            else:
                records.append(line)
        self._read_up_to = len(self.said)
        levels = [RECORD.search(record) for record in records]
        return [r for r, level in zip(records, levels, strict=True) if level is None or level[1] not in HARMLESS]

    def resident_mb(self) -> float:
        """Memory of the process, once it has its furniture and nothing else."""
        self.tidy()
        seen = len(self.said)
        os.kill(self._process.pid, signal.SIGUSR1)
        return int(self._wait_for(RESIDENT, seen)[1]) / 2**20

    def tidy(self) -> None:
        """Removes all that inputs have made, and puts the furniture back as it was."""
        for weighter in self._call("ListWeighters", pb.ListWeightersRequest()).weighters:
            self._call("DeleteWeighter", pb.DeleteWeighterRequest(name=weighter.name))
        for reference in self._call("ListReferences", pb.ListReferencesRequest()).references:
            if reference.name != "pretaught":
                self._call("DeleteReference", pb.DeleteReferenceRequest(name=reference.name))
        self._furnish()

    def repair(self) -> None:
        """Lets inputs go on to reach something, whatever those before have done."""
        try:
            for job in JOBS:
                self._call("Heartbeat", pb.HeartbeatRequest(job_id=job.job_id))
                self._call("QuarantineJob", pb.QuarantineJobRequest(job_id=job.job_id))
        except grpc.RpcError:
            self.tidy()

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _furnish(self) -> None:
        for weighter in WEIGHTERS:
            self._call("CreateWeighter", weighter)
        for job in JOBS:
            self._call("OpenJob", job)

    def _teach_steady(self) -> None:
        self._call("CreateWeighter", pb.CreateWeighterRequest(name="steady", spec=SPEC), STEADY)
        self._call("OpenJob", pb.OpenJobRequest(weighter="steady", job_id="steady"), STEADY)
        cotangent = to_message(np.linspace(-1, 1, 8, dtype=np.float32))
        for step in range(10):
            update = pb.MetaUpdateRequest(job_id="steady", step=step, inputs=batch(seed=step), cotangent=cotangent)
            self._call("MetaUpdate", update, STEADY)

    def _steady_scores(self) -> tuple[bytes, int]:
        request = pb.ScoreRequest(job_id="steady", inputs=batch(16, 99), min_position=10)
        scores = self._call("Score", request, STEADY)
        return scores.weights.data, scores.position

    def _call(self, method: str, request: Any, credential: Credential = ACME) -> Any:
        return getattr(self._stub, method)(request, timeout=SAID_S, metadata=credential.metadata)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._heard:
                self.said.append(line)
                self._heard.notify_all()
        with self._heard:
            self.said.append("(the process has ended)\n")
            self._heard.notify_all()

    def _wait_for(self, pattern: re.Pattern[str], start: int) -> re.Match[str]:
        deadline = time.monotonic() + SAID_S
        with self._heard:
            while True:
                found = next(filter(None, map(pattern.search, self.said[start:])), None)
                if found:
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or self._process.poll() is not None or not self._heard.wait(left):
                    said = "".join(self.said[-40:])
                    raise AssertionError(f"no {pattern.pattern!r} in what the service said:\n{said}")
