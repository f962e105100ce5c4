"""A reference as files: what they are called, what is in them, and the checksum that identifies them all.

Clients make and upload references, services verify and host them: this is what both must agree on. Knows bytes and
folders; nothing of torch, of transformers or of how token losses are computed.

| file               | content                                                                                      |
|--------------------|----------------------------------------------------------------------------------------------|
| config.json        | a causal LM of transformers, as `save_pretrained` writes it; not of a counted reference      |
| counts.safetensors | of the pool: `unigrams` [V] int64, each token as a label; `ngrams` [buckets] uint32, hashed; |
|                    | `bi_and_trigrams` [buckets] uint16 or uint32, hashed, of a counted reference alone           |
| model.safetensors  | the model's parameters, in one file; not of a counted reference                              |
| tokenizer.json     | of the tokenizers library                                                                    |
| reference.json     | `ReferenceInfo` and the format: which of the above belong together, and where they come from |

A *counted* reference has no model: its token losses come from its counts (`weighting_contract.counted`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from weighting_contract.errors import AlreadyExists, InvalidArgument
from weighting_contract.folder import read_files, sync, write_durably
from weighting_contract.spec import check_text

FORMAT = 1
MOST_BUCKETS = 1 << 23  # of bi- and trigrams: 32 MB, as a reference has to fit into a message
MANIFEST = "reference.json"
CONTENT = ("config.json", "counts.safetensors", "model.safetensors", "tokenizer.json")  # the checksum's order
FILES = (*CONTENT, MANIFEST)
MODEL = ("config.json", "model.safetensors")  # both, or none of a counted one
_EXPECTED = f"{', '.join(FILES)}, or all but {' and '.join(MODEL)}"


@dataclass(frozen=True)
class ReferenceInfo:
    """What a reference says about itself."""

    checksum: str  # of `reference_checksum`: equal exactly for references that give equal statistics
    tokenizer_checksum: str  # SHA-256 of tokenizer.json, in hex
    vocab_size: int  # of the tokenizer: one more than its largest token id
    seq_len: int  # longest sample that it was made of, in labels; a sample has one token more
    trained_on: str  # words for people
    command: str  # that made it
    steps: int  # of training; 0 of a counted one
    loss: float  # mean token NLL on its pool, nats


@dataclass(frozen=True)
class Counts:
    """What a reference knows of its pool besides the model."""

    unigrams: np.ndarray  # [V] int64, how often each token is a label
    ngrams: np.ndarray  # [buckets] int64, `weighting_contract.ngrams.count_ngrams`
    # [buckets] of an integer type, `weighting_contract.counted.count_bi_and_trigrams`, of a counted reference
    bi_and_trigrams: np.ndarray | None = None


def reference_checksum(files: Mapping[str, bytes], seq_len: int) -> str:
    """SHA-256, in hex, over all that decides the statistics that a reference gives.

    The digest is of the text "weighbridge-reference-1;seq_len=N;" and then, for each name of CONTENT in its order that
    is there, of the text "NAME:SIZE;" with the size in bytes, and the file's bytes.
    """
    digest = hashlib.sha256(f"weighbridge-reference-{FORMAT};seq_len={seq_len};".encode())
    for name in CONTENT:
        if name not in files:
            continue
        digest.update(f"{name}:{len(files[name])};".encode())
        digest.update(files[name])
    return digest.hexdigest()


def build_reference(
    config: bytes | None,
    model: bytes | None,
    tokenizer: bytes,
    counts: Counts,
    *,
    seq_len: int,
    trained_on: str,
    command: str,
    steps: int,
    loss: float,
) -> dict[str, bytes]:
    """The files of a reference, for `write_reference` or an upload.

    Args:
        config, model, tokenizer: contents of config.json, model.safetensors and tokenizer.json; the first two are None
            for a counted one.
        counts: of the pool; more than 2**32 - 1 n-grams in a bucket are stored as so many.

    Raises:
        InvalidArgument: contents that are no reference.
    """
    tables = {"unigrams": counts.unigrams.astype(np.int64), "ngrams": _stored(counts.ngrams)}
    if counts.bi_and_trigrams is not None:
        largest = np.uint16 if counts.bi_and_trigrams.max() <= np.iinfo(np.uint16).max else np.uint32
        tables["bi_and_trigrams"] = _stored(counts.bi_and_trigrams).astype(largest)
    files = {"counts.safetensors": safetensors.numpy.save(tables), "tokenizer.json": tokenizer}
    if config is not None and model is not None:
        files |= {"config.json": config, "model.safetensors": model}
    info = ReferenceInfo(
        checksum=reference_checksum(files, seq_len),
        tokenizer_checksum=hashlib.sha256(tokenizer).hexdigest(),
        vocab_size=len(counts.unigrams),
        seq_len=seq_len,
        trained_on=trained_on,
        command=command,
        steps=steps,
        loss=loss,
    )
    files[MANIFEST] = json.dumps({"format": FORMAT, **asdict(info)}, indent=2).encode() + b"\n"
    check_reference(files, "the reference")
    return files


def reference_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The verified files of the reference in a folder; other files that lie there are left alone.

    Raises:
        InvalidArgument: one sentence about the first thing that is wrong, as of `check_reference`.
    """
    folder = Path(folder)
    files = read_files(folder, FILES, f"there is no reference at {folder}: expected a folder with {_EXPECTED}")
    check_reference(files, str(folder))  # names what is missing
    return files


def check_reference(files: Mapping[str, bytes], where: str) -> ReferenceInfo:
    """What the files say about themselves, once they are verified; `where` they come from is for messages.

    Raises:
        InvalidArgument: a file that is missing or none of a reference's, a truncated or damaged safetensors file,
            a checksum that does not match, counts of another vocabulary.
    """
    for name in files:
        if name not in FILES:
            raise InvalidArgument(f"{where}: {name!r} is no file of a reference, expected {', '.join(FILES)}")
    counted = not any(name in files for name in MODEL)
    for name in FILES:
        if name not in files and not (counted and name in MODEL):
            raise InvalidArgument(f"{where}: {name} is missing; a reference is {_EXPECTED}")
    info = _info(files[MANIFEST], where)
    for name in ("counts.safetensors", "model.safetensors"):
        if name in files:
            _check_whole(files[name], f"{where}: {name}")
    tokenizer_checksum = hashlib.sha256(files["tokenizer.json"]).hexdigest()
    if tokenizer_checksum != info.tokenizer_checksum:
        raise InvalidArgument(
            f"{where}: tokenizer.json has the checksum {tokenizer_checksum[:12]}..., but {MANIFEST} names "
            f"{info.tokenizer_checksum[:12]}...: it is another tokenizer than the reference was made with"
        )
    counts = read_counts(files)
    if counted and counts.bi_and_trigrams is None:
        raise InvalidArgument(
            f"{where}: config.json is missing, and so is `bi_and_trigrams` in counts.safetensors: a reference has a "
            "model, or these counts in place of it"
        )
    if not counted and counts.bi_and_trigrams is not None:
        raise InvalidArgument(
            f"{where}: counts.safetensors has `bi_and_trigrams`, which a reference with a model has not"
        )
    checksum = reference_checksum(files, info.seq_len)
    if checksum != info.checksum:
        raise InvalidArgument(
            f"{where}: the files have the checksum {checksum[:12]}..., but {MANIFEST} names {info.checksum[:12]}...: "
            "a file was changed or belongs to another reference; copy or make the reference again"
        )
    _check_counts(counts, info, where)
    return info


def read_counts(files: Mapping[str, bytes]) -> Counts:
    """The counts in verified files. Raises InvalidArgument where they are not there."""
    try:
        tensors = safetensors.numpy.load(files["counts.safetensors"])
    except (KeyError, TypeError, safetensors.SafetensorError) as exc:  # such as a dtype that numpy doesn't have
        raise InvalidArgument(f"counts.safetensors can't be read: {exc}, expected integers") from exc
    if missing := {"unigrams", "ngrams"} - tensors.keys():
        raise InvalidArgument(f"counts.safetensors lacks {min(missing)!r}, expected unigrams and ngrams")
    if any(tensor.dtype.kind not in "iu" for tensor in tensors.values()):
        raise InvalidArgument("counts.safetensors holds counts that are no integers")
    return Counts(tensors["unigrams"], tensors["ngrams"].astype(np.int64), tensors.get("bi_and_trigrams"))


def write_reference(folder: str | os.PathLike[str], files: Mapping[str, bytes], *, replace: bool = False) -> Path:
    """Puts the files of a reference into `folder`, all of them or, if anything goes wrong, none.

    A folder that holds this very reference stays as it is. Another one is refused, or with `replace` gives way.

    Raises:
        InvalidArgument: as of `check_reference`; nothing was written.
        AlreadyExists: the folder holds another reference and `replace` is not set, or other things.
        OSError: the disk refuses; what was there stays.
    """
    folder = Path(folder).absolute()
    info = check_reference(files, "the reference")
    if _held_checksum(folder) == info.checksum:
        return folder
    check_free(folder, replace=replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name, content in files.items():
            write_durably(new / name, content)
        sync(new)
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    sync(folder.parent)
    return folder


def check_free(folder: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Raises AlreadyExists where `write_reference` would refuse to put another reference into the folder."""
    folder = Path(folder)
    if not os.path.lexists(folder):
        return
    foreign = [folder.name] if not folder.is_dir() else sorted(p.name for p in folder.iterdir() if p.name not in FILES)
    if foreign:
        raise AlreadyExists(f"{folder} holds something else than a reference ({foreign[0]}): choose another folder")
    if any(folder.iterdir()) and not replace:
        raise AlreadyExists(f"{folder} holds another reference: choose another folder, or overwrite it")


def _info(manifest: bytes, where: str) -> ReferenceInfo:
    try:
        values: dict[str, Any] = json.loads(manifest)
        given = values.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InvalidArgument(f"{where}: {MANIFEST} is not the description of a reference: {exc!r}") from exc
    if given != FORMAT:
        raise InvalidArgument(f"{where}: {MANIFEST} has format {given!r}, this version reads {FORMAT}")
    kinds = {"int": int, "str": str, "float": (int, float)}
    for field in fields(ReferenceInfo):
        value = values.get(field.name)
        if not isinstance(value, kinds[str(field.type)]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise InvalidArgument(f"{where}: {MANIFEST} has {field.name} {value!r}, expected {field.type}")
    info = ReferenceInfo(**{field.name: values[field.name] for field in fields(ReferenceInfo)})
    for name, least in (("seq_len", 1), ("vocab_size", 1), ("steps", 0)):
        if not least <= values[name] < 2**31:
            raise InvalidArgument(f"{where}: {MANIFEST} has {name} {values[name]}, expected {least} to {2**31 - 1}")
    if not math.isfinite(info.loss):
        raise InvalidArgument(f"{where}: {MANIFEST} has loss {info.loss}, expected a finite number; make it again")
    for name in ("trained_on", "command"):
        check_text(values[name], f"{where}: {MANIFEST}: {name}")
    return info


def _check_whole(content: bytes, what: str) -> None:
    """Raises InvalidArgument where a safetensors file does not end where its header says."""
    try:
        safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as exc:
        raise InvalidArgument(f"{what} is truncated or damaged: {exc}") from exc


def _stored(counts: np.ndarray) -> np.ndarray:
    stored: np.ndarray = np.minimum(counts, np.iinfo(np.uint32).max).astype(np.uint32)
    return stored


def _check_counts(counts: Counts, info: ReferenceInfo, where: str) -> None:
    if counts.unigrams.shape != (info.vocab_size,) or counts.ngrams.ndim != 1:
        raise InvalidArgument(
            f"{where}: counts.safetensors has unigrams of shape {list(counts.unigrams.shape)} and ngrams of "
            f"{list(counts.ngrams.shape)}, expected [{info.vocab_size}] for the vocabulary and [buckets]"
        )
    tables = (counts.unigrams, counts.ngrams, counts.bi_and_trigrams)
    if any((table < 0).any() for table in tables if table is not None):
        raise InvalidArgument(f"{where}: counts.safetensors has counts below 0")
    shape = (1,) if counts.bi_and_trigrams is None else counts.bi_and_trigrams.shape
    if len(shape) != 1 or not _is_power_of_two(shape[0]) or shape[0] > MOST_BUCKETS:
        raise InvalidArgument(
            f"{where}: counts.safetensors has `bi_and_trigrams` of shape {list(shape)}, expected [buckets], a power of "
            f"two up to {MOST_BUCKETS}"
        )


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def _held_checksum(folder: Path) -> str | None:
    """Of the intact reference in the folder; None where there is none."""
    try:
        return check_reference(reference_files(folder), str(folder)).checksum
    except InvalidArgument:
        return None
