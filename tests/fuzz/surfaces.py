"""The ways in: gRPC with messages, gRPC with bytes, REST by its OpenAPI document, REST with JSON of any kind.

Each surface is a strategy of inputs and a way to send one, which gives the answer and what is wrong with it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import grpc
import httpx
import numpy as np
import schemathesis
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz import messages
from tests.fuzz.target import ACME, ANSWER_S, EXPIRED, GUEST, Credential, Target
from trainer_client.transports import rest_json
from weighting_contract.tensors import from_message
from weighting_service.rest_door import OPEN_PATHS

GRPC_CODES = frozenset(
    {
        *("OK", "INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "ALREADY_EXISTS"),
        *("FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"),
    }
)
HTTP_CODES = frozenset({200, 307, 400, 401, 403, 404, 405, 409, 411, 412, 413, 429})
DESTRUCTIVE = ("Delete", "Close", "Quarantine", "/close", "/quarantine", "DELETE ")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    operation: str
    code: str
    wrong: str = ""  # what should not be, empty: nothing
    details: str = ""

    @property
    def destructive(self) -> bool:
        """Whether the furniture may be damaged now."""
        return self.code in ("OK", "200") and any(part in self.operation for part in DESTRUCTIVE)


@dataclass(frozen=True)
class Surface:
    """`show` writes an input in full, to be sent again."""

    name: str
    inputs: SearchStrategy[Any]
    send: Callable[[Any], Answer]
    show: Callable[[Any], str] = repr


def surfaces(target: Target) -> dict[str, Surface]:
    """All of them by name, in a fixed order."""
    web = _Web(target)
    wire = _Wire(target)
    ways = [
        Surface("messages", wire.of_messages(), wire.send),
        Surface("bytes", wire.of_bytes(), wire.send),
        Surface("openapi", web.of_schema(), web.send_case, lambda given: given[0].as_curl_command()),
        Surface("json", web.of_json(), web.send),
    ]
    return {surface.name: surface for surface in ways}


@st.composite
def credentials(draw: Callable[..., Any]) -> Credential:
    """Mostly one that may do everything; sometimes too little, and now and then nothing that is worth anything."""
    chance = draw(st.integers(0, 19))
    if chance < 16:
        return ACME
    if chance < 18:
        return (GUEST, EXPIRED)[chance - 16]
    printable = draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)).strip()
    return Credential(draw(st.sampled_from((None, printable, f"Bearer {printable}".strip()))), None)


# ---- gRPC -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One RPC; a stream has more requests than one."""

    method: str
    requests: tuple[bytes, ...]
    credential: Credential


class _Wire:
    def __init__(self, target: Target) -> None:
        self._channel: Any = target.channel  # without serialisers: requests and answers are bytes

    def of_messages(self) -> SearchStrategy[Call]:
        def of(method: str) -> SearchStrategy[bytes]:
            return messages.requests(method).map(lambda message: message.SerializeToString(deterministic=True))

        return calls(of)

    def of_bytes(self) -> SearchStrategy[Call]:
        return calls(messages.serialised)

    def send(self, call: Call) -> Answer:
        try:
            responses = self._responses(call)
        except grpc.RpcError as exc:
            code, details = exc.code().name, exc.details() or ""
            wrong = "" if code in GRPC_CODES else "unexpected code"
            if call.credential.tenant is None and code != "UNAUTHENTICATED":
                wrong = "taken up without a token"
            return Answer(call.method, code, wrong, details)
        wrong = "answered without a token" if call.credential.tenant is None else ""
        return Answer(call.method, "OK", wrong or _wrong_with(call.method, responses))

    def _responses(self, call: Call) -> list[bytes]:
        method = messages.SERVICE.methods_by_name[call.method]
        path = f"/{messages.SERVICE.full_name}/{call.method}"
        options: dict[str, Any] = {"timeout": ANSWER_S, "metadata": call.credential.metadata}
        if method.client_streaming:
            return list(self._channel.stream_stream(path)(iter(call.requests), **options))
        if method.server_streaming:
            watch = self._channel.unary_stream(path)(call.requests[0], **options)
            first = next(watch)
            watch.cancel()  # it would go on as long as the weighter is there
            return [first]
        return [self._channel.unary_unary(path)(call.requests[0], **options)]


def calls(of: Callable[[str], SearchStrategy[bytes]]) -> SearchStrategy[Call]:
    """Calls of every RPC, most often of those that work with tensors."""

    def of_method(name: str) -> SearchStrategy[Call]:
        most = 4 if messages.SERVICE.methods_by_name[name].client_streaming else 1
        several = st.lists(of(name), min_size=1, max_size=most).map(tuple)
        return st.builds(Call, st.just(name), several, credentials())

    names = [method.name for method in messages.SERVICE.methods]
    ready = {name: of_method(name) for name in names}
    weighted = (*names, *[name for name in names if "Score" in name or "Meta" in name])
    return st.sampled_from(weighted).flatmap(ready.__getitem__)


def _wrong_with(method: str, responses: list[bytes]) -> str:
    """What an answer must not be, though the call was in order."""
    kind = GetMessageClass(messages.SERVICE.methods_by_name[method].output_type)
    for response in responses:
        answer: Any = kind.FromString(response)
        if method in ("Score", "StreamScore"):
            return _wrong_weights(from_message(answer.weights, "weights"))
    return ""


def _wrong_weights(weights: np.ndarray) -> str:
    if np.isfinite(weights).all() and (weights >= 0).all() and abs(weights.mean() - 1) < 1e-3:
        return ""
    return f"weights are {weights.tolist()}"


# ---- REST -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HttpCall:
    verb: str
    path: str  # as it is sent, with the query
    body: bytes | None
    credential: Credential


NAMES = st.sampled_from(
    ("w", "t", "p", "learning", "frozen", "tokens", "referred", "pretaught", "made", "acme/w", "steady/steady")
)
ODD_NAMES = st.one_of(
    st.sampled_from(("..", ".", "%00", "%2F", "%2e%2e%2fw", "a%2Fb%2Fc", "%ff", "%", "x" * 3000)),
    st.text(max_size=20).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="")),
)


class _Web:
    """Sends by plain HTTP, so that bodies and paths can be as wrong as they like."""

    def __init__(self, target: Target) -> None:
        self._url = target.rest_url
        self._client, self._session = target.http, target.session

    def of_schema(self) -> SearchStrategy[tuple[Any, str, Credential]]:
        """Requests as the service's own document has them, right and wrong, with names that mean something."""
        document = self._client.get(f"{self._url}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        modes = schemathesis.GenerationMode
        cases = st.one_of(schema.as_strategy(modes.POSITIVE), schema.as_strategy(modes.NEGATIVE))
        return st.tuples(cases, NAMES, credentials())

    def of_json(self) -> SearchStrategy[HttpCall]:
        """The requests of the client with JSON that was changed, and what is no JSON at all."""
        ready = [
            _http_calls(rest_json.ROUTES[method](message))
            for method, known in messages.examples().items()
            if method in rest_json.ROUTES
            for message in known
        ]
        return st.integers(0, len(ready) - 1).flatmap(ready.__getitem__)

    def send_case(self, given: tuple[Any, str, Credential]) -> Answer:
        case, name, credential = given
        for parameter in case.path_parameters or {}:
            case.path_parameters[parameter] = name
        headers = {} if credential.authorization is None else {"authorization": credential.authorization}
        try:
            response = case.call(base_url=self._url, session=self._session, headers=headers, timeout=ANSWER_S)
        except Exception as exc:
            return Answer(f"{case.method} {case.path}", type(exc).__name__, "no answer", repr(exc))
        answer = httpx.Response(response.status_code, content=response.content)
        return _http_answer(f"{case.method} {case.path}", case.path, credential, answer)

    def send(self, call: HttpCall) -> Answer:
        headers = {"content-type": "application/json"}
        if call.credential.authorization is not None:
            headers["authorization"] = call.credential.authorization
        request = self._client.build_request(call.verb, self._url, content=call.body, headers=headers)
        request.url = request.url.copy_with(raw_path=call.path.encode("ascii"))
        operation = f"{call.verb} {urlsplit(call.path).path[:40]}"
        try:
            answer = self._client.send(request)
        except httpx.HTTPError as exc:
            return Answer(operation, type(exc).__name__, "no answer", repr(exc))
        return _http_answer(operation, call.path, call.credential, answer)


def _http_answer(operation: str, path: str, credential: Credential, answer: httpx.Response) -> Answer:
    code, details = str(answer.status_code), answer.text[:300]
    wrong = "" if answer.status_code in HTTP_CODES else "unexpected status"
    if credential.tenant is None and path not in OPEN_PATHS and answer.status_code not in (401, 400):
        wrong = "taken up without a token"
    if answer.status_code >= 400 and not wrong:
        wrong = _wrong_error(answer)
    return Answer(operation, code, wrong, details)


def _wrong_error(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        known = error["code"] not in ("", "UNKNOWN", "INTERNAL") and error["message"]
        return "" if known else "an error without code or message"
    except (ValueError, KeyError, TypeError):
        return "an error that does not look like one"


def _http_calls(route: rest_json.Route) -> SearchStrategy[HttpCall]:
    body = st.none() if route.body is None else bodies(route.body)
    verbs = st.sampled_from((*[route.verb] * 20, "GET", "PUT", "PATCH", "OPTIONS", "TRACE"))
    return st.builds(HttpCall, verbs, _paths(route.path), body, credentials())


def _paths(path: str) -> SearchStrategy[str]:
    """The path as it is, or with another name in the place of its own."""
    parts = path.split("/")
    if len(parts) < 4:
        return st.just(path)
    known = NAMES.map(lambda name: quote(name, safe=""))
    names = st.integers(0, 5).flatmap(lambda n: (known, ODD_NAMES)[n] if n < 2 else st.just(parts[3]))
    return names.map(lambda name: "/".join([*parts[:3], name, *parts[4:]]))


def _nested(depth: int) -> Any:
    """Lists in lists."""
    nested: Any = 0
    for _ in range(depth):
        nested = [nested]
    return nested


ODD_JSON = st.one_of(
    st.sampled_from((None, True, 0, -1, 1.5, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), "", "w")),
    st.sampled_from(("\ud800", "\x00", "a" * 5000, [], {}, [[]], [{}], {"": None}, [1, [2]], [[1.0], [1.0, 2.0]])),
    st.integers(2, 400).map(_nested),
    st.text(max_size=10),
    st.integers(),
    st.floats(),
)


@st.composite
def bodies(draw: Callable[..., Any], values: dict[str, Any]) -> bytes:
    """JSON with up to three values replaced, removed or added; or bytes that are none."""
    if not draw(st.integers(0, 9)):
        whole = json.dumps(values).encode()
        broken = st.sampled_from((b"", b"[" * 100_000, b'{"a":' * 20_000, b"9" * 10_000, b"\xef\xbb\xbf{}", b"null"))
        drawn: bytes = draw(messages.corrupted(whole) | st.binary(max_size=60) | broken)
        return drawn
    changed = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(0, 3))):
        changed = _replaced(draw, changed)
    return json.dumps(changed).encode()


def _replaced(draw: Callable[..., Any], value: Any) -> Any:
    """The value with one thing in it, at any depth, that is something else."""
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 5)):
        return copy.deepcopy(draw(ODD_JSON))  # what was drawn may be changed in its turn
    keys: Any = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    if not draw(st.integers(0, 8)):
        del value[key]
    elif isinstance(value, dict) and not draw(st.integers(0, 8)):
        value[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD_JSON))
    else:
        value[key] = _replaced(draw, value[key])
    return value
