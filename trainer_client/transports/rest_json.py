"""The REST API's routes and JSON: field names of the contract, tensors as nested lists, enums as lower-case words."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import Internal, InvalidArgument
from weighting_contract.tensors import from_message, to_message

ENUMS = {"role": pb.Role, "estimator": pb.Estimator}


@dataclass(frozen=True)
class Route:
    """One request, and how to read its answer."""

    verb: str
    path: str
    body: dict[str, Any] | None
    read: Callable[[dict[str, Any]], Message]


def to_json(message: Message) -> dict[str, Any]:
    """Every field by name that is set or has no notion of being set; tensors as nested lists, files in base64."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            continue
        if isinstance(value, pb.Inputs):
            values[field.name] = _inputs(value)
        elif isinstance(value, pb.TargetProfile):
            values[field.name] = _profile(value)
        elif isinstance(value, pb.Tensor):
            values[field.name] = from_message(value, field.name).tolist()
        elif isinstance(value, Message):
            values[field.name] = to_json(value)
        elif field.name in ENUMS:
            values[field.name] = _word(field.name, value)
        elif isinstance(value, str | int | float):
            values[field.name] = value
        elif isinstance(value, Mapping):  # files by name
            values[field.name] = {name: base64.b64encode(content).decode() for name, content in value.items()}
        else:  # repeated strings
            values[field.name] = list(value)
    return values


def _inputs(inputs: pb.Inputs) -> dict[str, Any]:
    """As the messages have them, but for tokens: here they are lists of different lengths, not padded rows."""
    names = [name for name in ("features", "hidden", "tokens") if inputs.HasField(name)]
    values = {name: from_message(getattr(inputs, name), name).tolist() for name in names}
    if inputs.HasField("lengths"):
        lengths, rows = from_message(inputs.lengths, "lengths").tolist(), values.get("tokens")
        if not isinstance(lengths, list) or not isinstance(rows, list) or len(lengths) != len(rows):
            raise InvalidArgument("lengths must have one integer for every row of tokens")
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if not isinstance(length, int) or not 1 <= length <= len(row):
                raise InvalidArgument(f"lengths[{i}] is {length}, expected a whole number from 1 to {len(row)}")
        values["tokens"] = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    if inputs.texts:
        values["texts"] = list(inputs.texts)
    return values


def _profile(profile: pb.TargetProfile) -> dict[str, Any]:
    """Documents are lists of ids here, not ids end to end."""
    values: dict[str, Any] = {"documents_checksum": profile.documents_checksum}
    if profile.HasField("log_ratios"):
        values["log_ratios"] = from_message(profile.log_ratios, "profile.log_ratios").tolist()
    if profile.HasField("documents"):
        lengths = from_message(profile.lengths, "profile.lengths")
        documents = np.split(from_message(profile.documents, "profile.documents"), np.cumsum(lengths)[:-1])
        values["documents"] = [document.tolist() for document in documents]
    return values


def _word(field: str, number: int) -> str:
    """ROLE_LEARN -> "learn"; what is unspecified is the first that is specified, as in the contract."""
    return ENUMS[field].Name(number or 1).removeprefix(f"{field.upper()}_").lower()


def _read(kind: type[Message]) -> Callable[[dict[str, Any]], Message]:
    def read(answer: dict[str, Any]) -> Message:
        if isinstance(answer.get("role"), str):
            answer = {**answer, "role": f"ROLE_{answer['role'].upper()}"}
        try:
            return json_format.ParseDict(answer, kind(), ignore_unknown_fields=True)
        except json_format.ParseError as exc:
            raise Internal(f"the service's answer is not a {kind.__name__}: {exc}") from exc

    return read


def _read_score(answer: dict[str, Any]) -> pb.ScoreResponse:
    try:
        statistics = answer.get("statistics")
        return pb.ScoreResponse(
            weights=to_message(np.asarray(answer["weights"], np.float32)),
            logits=to_message(np.asarray(answer["logits"], np.float32)),
            position=answer["position"],
            effective_sample_size=answer["effective_sample_size"],
            statistics=None if statistics is None else to_message(np.asarray(statistics, np.float32)),
            trust=answer.get("trust", 0.0),
            computed_samples=answer.get("computed_samples"),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise Internal(f"the service's answer is not a ScoreResponse: {exc!r}") from exc


def _read_files(answer: dict[str, Any]) -> pb.ExportWeighterResponse:
    try:
        files = {name: base64.b64decode(content, validate=True) for name, content in answer["files"].items()}
    except (KeyError, AttributeError, TypeError, binascii.Error) as exc:
        raise Internal(f"the service's answer is not an ExportWeighterResponse: {exc!r}") from exc
    return pb.ExportWeighterResponse(files=files)


def _weighter_path(name: str) -> str:
    return f"/v1/weighters/{quote(name, safe='')}"


def _reference_path(name: str, files: Sequence[str] = ()) -> str:
    query = urlencode([("files", file) for file in files])
    return f"/v1/references/{quote(name, safe='')}" + (f"?{query}" if query else "")


def _put_reference(request: Any) -> Route:
    body = to_json(request)
    return Route("PUT", _reference_path(body.pop("name")), body, _read(pb.Reference))


def _weighter_route(request: Any, action: str, read: Callable[[dict[str, Any]], Message]) -> Route:
    body = to_json(request)
    return Route("POST", f"{_weighter_path(body.pop('name'))}/{action}", body, read)


def _job_route(request: Any, action: str, read: Callable[[dict[str, Any]], Message]) -> Route:
    body = to_json(request)
    return Route("POST", f"/v1/jobs/{quote(body.pop('job_id'), safe='')}/{action}", body, read)


ROUTES: dict[str, Callable[[Any], Route]] = {
    "CreateWeighter": lambda r: Route("POST", "/v1/weighters", to_json(r), _read(pb.Weighter)),
    "GetWeighter": lambda r: Route("GET", _weighter_path(r.name), None, _read(pb.Weighter)),
    "ListWeighters": lambda r: Route("GET", "/v1/weighters", None, _read(pb.ListWeightersResponse)),
    "DeleteWeighter": lambda r: Route("DELETE", _weighter_path(r.name), None, _read(pb.DeleteWeighterResponse)),
    "ShareWeighter": lambda r: _weighter_route(r, "share", _read(pb.Weighter)),
    "RollbackWeighter": lambda r: _weighter_route(r, "rollback", _read(pb.RollbackWeighterResponse)),
    "ExportWeighter": lambda r: Route("GET", f"{_weighter_path(r.name)}/export", None, _read_files),
    "PutReference": _put_reference,
    "GetReference": lambda r: Route("GET", _reference_path(r.name, r.files), None, _read(pb.Reference)),
    "ListReferences": lambda r: Route("GET", "/v1/references", None, _read(pb.ListReferencesResponse)),
    "DeleteReference": lambda r: Route("DELETE", _reference_path(r.name), None, _read(pb.DeleteReferenceResponse)),
    "OpenJob": lambda r: Route("POST", "/v1/jobs", to_json(r), _read(pb.Job)),
    "CloseJob": lambda r: _job_route(r, "close", _read(pb.Job)),
    "Heartbeat": lambda r: _job_route(r, "heartbeat", _read(pb.HeartbeatResponse)),
    "QuarantineJob": lambda r: _job_route(r, "quarantine", _read(pb.Job)),
    "Score": lambda r: _job_route(r, "score", _read_score),
    "MetaUpdate": lambda r: _job_route(r, "meta-updates", _read(pb.MetaUpdateResponse)),
}
