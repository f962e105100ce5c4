"""Strategies for requests of the contract, made of the descriptors: any message, valid ones that were changed, bytes.

What is plausible comes from examples and from pools of names that mean something to the target; the rest is generic, so
that a new RPC or field is fuzzed as soon as it is in the contract.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from protos.weighting.v1 import weighting_pb2 as pb
from tests.fuzz import target
from weighting_contract.export import export_files
from weighting_contract.reference import reference_files
from weighting_contract.tensors import DTYPES, to_message
from weighting_service import pretaught

SERVICE = pb.DESCRIPTOR.services_by_name["WeightingService"]

INTEGERS = (0, 1, -1, 2, 7, 255, 256, 65_536, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e-9, 1e15, 1e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}

# What strings of these fields may mean something to.
WORDS: dict[str, tuple[str, ...]] = {
    "name": ("w", "t", "p", "acme/w", "steady/steady", "steady", "pretaught", "made", "/w", "../w", "a" * 200),
    "weighter": ("w", "t", "p", "acme/w", "steady/steady", "pretaught", "nobody"),
    "job_id": ("learning", "frozen", "tokens", "referred", "steady", "steady/steady", "acme/learning", "new"),
    "dtype": (*DTYPES, "bfloat16", "object", "O", "<f4", "complex128", "float32 "),
    "initial": ("pretaught", "other"),
    "tokenizer": ("bytes", "../..", "pretaught"),
    "encoder_config": (
        target.ENCODER,
        target.ENCODER.replace("256", "-1"),
        target.ENCODER.replace("256", "1000000000000"),
        target.ENCODER.replace("16", "17"),
        target.ENCODER.replace("16", "0"),
        target.ENCODER.replace("1,", "100000,"),
        target.ENCODER.replace("}", ', "num_labels": 1000000000}'),
        target.ENCODER.replace("bert", "no-such-model"),
        target.ENCODER.replace("256", '"many"'),
        '{"model_type": "bert", "auto_map": {"AutoModel": "a--b.C"}}',
        "[" * 2000,
        "{}",
    ),
    "names": (*target.NAMES, "mean"),
    "feature_names": (*target.NAMES, "mean"),
    "tenants": ("guest", "acme", "steady", "*", "no tenant"),
    "files": ("tokenizer.json", "reference.json", "../reference.json"),
    "checksum": ("0" * 64, "f" * 63),
    "tokenizer_checksum": ("0" * 64, "A" * 64),
}


def examples() -> dict[str, list[Message]]:
    """Requests of every RPC that the target takes while its furniture is whole."""
    tokens = pb.Inputs(tokens=to_message(np.arange(24, dtype=np.uint16).reshape(3, 8)))
    texts = pb.Inputs(texts=["one text", "another one", "\u00e9\u4e2d\U0001f600"])
    cotangent = to_message(np.linspace(-1, 1, 8, dtype=np.float32))
    few = to_message(np.array([0.5, -0.5, 0.1], np.float32))
    probes = to_message(np.array([1, 1, 0, 0, 1, 0, 0, 0], np.uint8))
    files = reference_files(pretaught.reference_folder())
    return {
        "CreateWeighter": [
            *target.WEIGHTERS,
            pb.CreateWeighterRequest(name="made", spec=target.SPEC),
            pb.CreateWeighterRequest(name="made", files=_export()),
        ],
        "GetWeighter": [pb.GetWeighterRequest(name=name) for name in ("w", "t")],
        "ListWeighters": [pb.ListWeightersRequest()],
        "DeleteWeighter": [pb.DeleteWeighterRequest(name="made")],
        "ShareWeighter": [pb.ShareWeighterRequest(name="w", tenants=["guest"]), pb.ShareWeighterRequest(name="w")],
        "RollbackWeighter": [pb.RollbackWeighterRequest(name="w", to_position=n) for n in (0, 20)],
        "PutReference": [pb.PutReferenceRequest(name="made", files=files, exist_ok=True)],
        "GetReference": [pb.GetReferenceRequest(name="pretaught", files=["tokenizer.json"])],
        "ListReferences": [pb.ListReferencesRequest()],
        "DeleteReference": [pb.DeleteReferenceRequest(name="made")],
        "OpenJob": [*target.JOBS, pb.OpenJobRequest(weighter="w", job_id="new")],
        "CloseJob": [pb.CloseJobRequest(job_id="new")],
        "Heartbeat": [pb.HeartbeatRequest(job_id="learning", fallback_steps=3)],
        "QuarantineJob": [pb.QuarantineJobRequest(job_id="learning", reason="why")],
        "Score": [
            pb.ScoreRequest(job_id="learning", inputs=target.batch(), min_effective_share=0.5),
            pb.ScoreRequest(job_id="frozen", inputs=target.batch(3)),
            pb.ScoreRequest(job_id="tokens", inputs=tokens),
            pb.ScoreRequest(job_id="tokens", inputs=texts),
            pb.ScoreRequest(job_id="referred", inputs=tokens, return_statistics=True),
            pb.ScoreRequest(job_id="referred", inputs=texts),
        ],
        "MetaUpdate": [
            pb.MetaUpdateRequest(job_id="learning", step=1, inputs=target.batch(), cotangent=cotangent),
            pb.MetaUpdateRequest(
                job_id="learning",
                inputs=target.batch(),
                cotangent=cotangent,
                probes=probes,
                estimator=pb.ESTIMATOR_SCORE_FUNCTION,
            ),
            pb.MetaUpdateRequest(job_id="frozen", inputs=target.batch(), cotangent=cotangent, probes=probes),
            pb.MetaUpdateRequest(job_id="tokens", inputs=texts, cotangent=few),
            pb.MetaUpdateRequest(
                job_id="referred", inputs=target.statistics(8), cotangent=cotangent, probes=probes, trust_only=True
            ),
        ],
        "WatchWeighter": [pb.WatchWeighterRequest(name="w")],
        "ExportWeighter": [pb.ExportWeighterRequest(name="w")],
    }


@st.composite
def requests(draw: Callable[..., Any], method: str) -> Message:
    """A message for one RPC: mostly an example with some fields, at any depth, that are something else."""
    known = _examples().get(method.removeprefix("Stream"), [])
    chosen = draw(st.integers(0, len(known)))
    if chosen == len(known):
        anything: Message = draw(messages(SERVICE.methods_by_name[method].input_type))
        return anything
    message: Any = type(known[chosen])()
    message.CopyFrom(known[chosen])
    if "step" in message.DESCRIPTOR.fields_by_name:
        message.step = draw(st.integers(0, 2**31))  # else one update is sent again and again
    for _ in range(draw(st.sampled_from((0, 1, 1, 2, 4)))):
        _change(draw, message)
    changed: Message = message
    return changed


def _change(draw: Callable[..., Any], message: Message) -> None:
    fields = [field for field in message.DESCRIPTOR.fields if draw(st.booleans()) or _is_set(message, field)]
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    if _holds_message(field) and message.HasField(field.name) and draw(st.integers(0, 4)):
        _change(draw, getattr(message, field.name))
        return
    old = getattr(message, field.name) if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else None
    message.ClearField(field.name)
    if field.type == FieldDescriptor.TYPE_BYTES and isinstance(old, bytes) and draw(st.booleans()):
        setattr(message, field.name, draw(corrupted(old)))
    else:
        _fill(draw, message, field)


def _is_set(message: Message, field: Any) -> bool:
    return any(set_field.number == field.number for set_field, _ in message.ListFields())


def _holds_message(field: FieldDescriptor) -> bool:
    return field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE and not field.is_repeated


@functools.cache
def messages(kind: Descriptor) -> SearchStrategy[Message]:
    """Any message of a type."""
    return tensors() if kind.name == "Tensor" else _any_message(kind)


@st.composite
def _any_message(draw: Callable[..., Any], kind: Descriptor) -> Message:
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if draw(st.integers(0, 2)):
            _fill(draw, message, field)
    return message


def _fill(draw: Callable[..., Any], message: Message, field: FieldDescriptor) -> None:
    """Sets a field that is not set to anything of its type, or leaves it."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        getattr(message, field.name).update(draw(_files()))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(_lists(field)))
    elif field.message_type:
        getattr(message, field.name).CopyFrom(draw(messages(field.message_type)))
    else:
        setattr(message, field.name, draw(values(field)))


@functools.cache  # making a strategy takes longer than drawing from it
def _lists(field: FieldDescriptor) -> SearchStrategy[list[Any]]:
    return st.lists(values(field), max_size=5)


@functools.cache
def values(field: FieldDescriptor) -> SearchStrategy[Any]:
    """Values of a scalar field or of an element of a repeated one."""
    if field.message_type:
        return messages(field.message_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return strings(field.name)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.one_of(st.sampled_from(FLOATS), st.floats(0, 1), st.floats())
    low, high = BOUNDS[field.cpp_type]
    fitting = [value for value in INTEGERS if low <= value <= high]
    return st.one_of(st.sampled_from(fitting), st.integers(0, 20), st.integers(low, high))


@functools.cache
def strings(field: str) -> SearchStrategy[str]:
    """Text that may mean something in a field of that name, and text of any kind that UTF-8 knows."""
    anything = st.text(st.characters(codec="utf-8"), max_size=40)
    odd = st.sampled_from(("", " ", "\x00", "\n", "a/b", "%2F", "\u202e", "x" * 5000))
    words = WORDS.get(field)
    return st.one_of(st.sampled_from(words), st.sampled_from(words), odd, anything) if words else odd | anything


@st.composite
def tensors(draw: Callable[..., Any]) -> pb.Tensor:
    """Arrays of any dtype of the contract and odd values, and messages that don't add up."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    size = int(np.prod(shape))
    flat = np.zeros(size, dtype)
    for i, value in enumerate(draw(st.lists(st.sampled_from(FLOATS + INTEGERS), max_size=min(size, 12)))):
        with np.errstate(all="ignore"):
            flat[i] = value if dtype.kind == "f" else int(np.nan_to_num(value)) % (int(np.iinfo(dtype).max) + 1)
    message = to_message(flat.reshape(shape))
    match draw(st.integers(0, 7)):
        case 0:
            message.dtype = draw(strings("dtype"))
        case 1:
            message.shape[:] = draw(st.lists(st.sampled_from(INTEGERS), max_size=70))
        case 2:
            message.data = draw(st.binary(max_size=64))
        case 3:
            message.shape[:] = [0, *draw(st.lists(st.sampled_from(INTEGERS), max_size=70))]
            message.data = b""
    return message


@st.composite
def _files(draw: Callable[..., Any]) -> dict[str, bytes]:
    """The files of a reference or of an exported weighter, some of them damaged, missing or too many."""
    files = dict(draw(st.sampled_from((_reference(), _export(), _export(checked=False)))))
    for name in draw(st.lists(st.sampled_from((*files, "more.bin")), max_size=3)):
        if draw(st.booleans()):
            files[name] = draw(corrupted(files.get(name, b"")))
        else:
            files.pop(name, None)
    return files


@st.composite
def corrupted(draw: Callable[..., Any], content: bytes) -> bytes:
    """The bytes with some of them flipped, cut out, repeated or put in between."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(damaged)))
        match draw(st.integers(0, 3)):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del damaged[at : at + draw(st.sampled_from((1, 4, 100, 1 << 20)))]
            case 2:
                damaged[at:at] = damaged[at : at + draw(st.integers(1, 64))]
            case _:
                damaged[at:at] = draw(st.binary(max_size=16) | st.sampled_from(PIECES))
    return bytes(damaged)


# Tags of fields 1 to 3 with: a lone surrogate as text, a length beyond the end, groups in groups, a varint without end.
PIECES = (
    *(bytes([number << 3 | 2, 3]) + b"\xed\xa0\x80" for number in (1, 2, 3)),
    *(bytes([number << 3 | 2]) + b"\xff\xff\xff\xff\x0f" for number in (1, 2, 3)),
    b"\x0b" * 300,
    b"\xff" * 20,
    b"\x00" * 8,
)


@st.composite
def serialised(draw: Callable[..., Any], method: str) -> bytes:
    """Bytes for one RPC: of a request that was damaged on its way, or of chance."""
    if draw(st.integers(0, 3)):
        damaged: bytes = draw(corrupted(draw(requests(method)).SerializeToString(deterministic=True)))
        return damaged
    anything: bytes = draw(st.binary(max_size=300) | st.sampled_from(PIECES))
    return anything


@functools.cache
def _examples() -> dict[str, list[Message]]:
    return examples()


@functools.cache
def _reference() -> dict[str, bytes]:
    return dict(reference_files(pretaught.reference_folder()))


@functools.cache
def _export(checked: bool = True) -> dict[str, bytes]:
    """Without its checksums, as old ones are, damage gets further than to these."""
    files = export_files(pretaught.weighter_folder())
    if checked:
        return files
    values = {name: value for name, value in json.loads(files["config.json"]).items() if not name.endswith("sha256")}
    return {**files, "config.json": json.dumps(values).encode()}
