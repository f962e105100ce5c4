"""REST: JSON for where gRPC can't go. Maps messages to the routes of the service and its errors back, once."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx
from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client.credentials import Credentials
from trainer_client.tracing import TRACER
from trainer_client.transports import http_deadline, rest_json
from trainer_client.transports.base import MAX_MESSAGE_BYTES, Transport
from weighting_contract.errors import (
    BY_CODE,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WeighbridgeError,
)

WATCH_PERIOD_S = 1.0
WATCH_TIMEOUT_S = 10.0

BY_STATUS: dict[int, type[WeighbridgeError]] = {kind.http_status: kind for kind in BY_CODE.values()} | {
    422: InvalidArgument,
    502: Unavailable,
}


class RestTransport(Transport):
    """Calls the REST API below `base_url`."""

    def __init__(self, base_url: str, credentials: Credentials | None = None) -> None:
        self._base_url = base_url
        self._credentials = credentials or Credentials()
        self._client = http_deadline.client(base_url, _context(base_url, self._credentials))

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        route = rest_json.ROUTES[method](request)
        with TRACER.span(method, "CLIENT", address=self._base_url):
            return route.read(self._exchange(method, route, time.monotonic() + timeout_s))

    def watch(self, name: str) -> Iterator[pb.Weighter]:
        seen = -1
        while True:
            weighter = self.call("GetWeighter", pb.GetWeighterRequest(name=name), WATCH_TIMEOUT_S)
            if weighter.applied_position != seen:
                seen = weighter.applied_position
                yield weighter
            else:
                time.sleep(WATCH_PERIOD_S)

    def close(self) -> None:
        self._client.close()

    def _exchange(self, method: str, route: rest_json.Route, deadline: float) -> Any:
        where = f"the weighting service at {self._base_url}"
        try:
            status, body = self._send(route, deadline)
        except (httpx.TimeoutException, TimeoutError) as exc:
            raise DeadlineExceeded(f"{where} did not answer {method} in time") from exc
        except httpx.HTTPError as exc:
            raise Unavailable(f"{where} is not reachable ({method}): {exc or type(exc).__name__}") from exc
        except RuntimeError as exc:  # httpx: "Cannot send a request, as the client has been closed."
            raise Unavailable("the client is closed") from exc
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status >= 400:
            raise _error(status, answer, f"{where} answered {method} with status {status}")
        if not isinstance(answer, dict):
            raise Internal(f"{where} answered {method} with something other than a JSON object")
        return answer

    def _send(self, route: rest_json.Route, deadline: float) -> tuple[int, bytes]:
        try:
            return self._send_once(route, deadline)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # A kept-alive connection that the service closed in the meantime; every call is idempotent, so once more.
            return self._send_once(route, deadline)

    def _send_once(self, route: rest_json.Route, deadline: float) -> tuple[int, bytes]:
        content = None if route.body is None else _encode(route.body)
        headers = TRACER.headers() | ({} if content is None else {"content-type": "application/json"})
        if authorization := self._credentials.authorization():
            headers["authorization"] = authorization
        extensions = http_deadline.deadline_extensions(deadline)
        with self._client.stream(
            route.verb, route.path, content=content, headers=headers, extensions=extensions
        ) as response:
            chunks = []
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
            return response.status_code, b"".join(chunks)


def _context(base_url: str, credentials: Credentials) -> ssl.SSLContext:
    """Trusts the CA that was given and no other, else those that httpx trusts."""
    tls = credentials.tls
    if tls.ca is None and base_url.startswith("https:"):
        context = httpx.create_ssl_context()  # reads many CAs, which takes a while
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts none so far
    tls.load_into(context)
    return context


def _encode(body: dict[str, Any]) -> bytes:
    try:
        content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as exc:
        raise InvalidArgument("the inputs or the cotangent hold numbers that are not finite; JSON has none") from exc
    if len(content) > MAX_MESSAGE_BYTES:
        raise InvalidArgument(f"the request takes {len(content)} bytes, but a message has at most {MAX_MESSAGE_BYTES}")
    return content


def _error(status: int, answer: Any, otherwise: str) -> WeighbridgeError:
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        error = {}
    kind = BY_CODE.get(str(error.get("code"))) or BY_STATUS.get(status, Internal)
    message = str(error.get("message") or otherwise)
    if kind is ResourceExhausted:
        retry_after_s = error.get("retry_after_s")
        return ResourceExhausted(message, float(retry_after_s) if isinstance(retry_after_s, int | float) else 1.0)
    return kind(message)
