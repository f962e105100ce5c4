"""Tokenizers of the training run: a byte-level BPE trained at first use and cached, or one that exists already.

Knows nothing of documents' sources, samples or models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer_client.run.documents import Progress
from weighting_contract.errors import InvalidArgument

logger = logging.getLogger(__name__)

VOCAB_SIZE = 1024
_BYTES = 256  # the alphabet of a byte-level BPE
_CACHE_FORMAT = 1  # part of the key: raise it when training changes


class Tokenizer:
    """Texts to token ids and back; no special tokens, no padding, no truncation."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that the text of a tokenizer.json describes. Raises ValueError where it is none."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as exc:  # the library raises nothing narrower
            raise ValueError(str(exc)) from exc

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def checksum(self) -> str:
        """SHA-256 of its JSON, in hex: equal exactly for tokenizers that encode alike."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> str:
        return str(self._backend.to_str())

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and other tools read; atomic."""
        _write_atomically(Path(path), self.to_json())


def cached_tokenizer(
    texts: Sequence[str],
    vocab_size: int = VOCAB_SIZE,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """The tokenizer trained on `texts`, from the cache where these texts met this vocabulary size before.

    Args:
        texts: training documents.
        vocab_size: at most so many tokens; a tiny corpus gives fewer.
        cache_dir: by default `weighbridge` in $XDG_CACHE_HOME or ~/.cache. A cache that can't be written is a
            warning, not an error; a damaged file is trained anew.

    Raises:
        InvalidArgument: fewer tokens than there are bytes.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / f"tokenizer-{vocab_size}-{_key(texts, vocab_size)[:32]}.json"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    trained = train_tokenizer(texts, vocab_size, progress=progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps({"checksum": trained.checksum, "tokenizer": trained.to_json()}))
    except OSError as exc:
        logger.warning("the tokenizer could not be cached in %s (%s); the next run trains it again", folder, exc)
    return trained


def train_tokenizer(
    texts: Sequence[str], vocab_size: int = VOCAB_SIZE, *, progress: Progress | None = None
) -> Tokenizer:
    """A byte-level BPE (every text can be encoded, and decodes to itself); equal texts give equal tokenizers.

    Raises:
        InvalidArgument: fewer tokens than there are bytes.
    """
    if vocab_size < _BYTES:
        raise InvalidArgument(f"--vocab-size is {vocab_size}, expected {_BYTES} or more: every byte needs a token")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(_reported(texts, progress), trainer=trainer, length=len(texts))
    return Tokenizer(backend)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that transformers can read one from.

    Raises:
        InvalidArgument: there is none, or it can't be read.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise InvalidArgument(f"no tokenizer at {path}: expected a tokenizer.json or a folder of a transformers model")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        return _from_transformers(path)
    try:
        return Tokenizer.from_json(file.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise InvalidArgument(f"{file} is not a tokenizer.json that can be read: {exc}") from exc


def _from_transformers(folder: Path) -> Tokenizer:
    """For folders without tokenizer.json: transformers converts older formats."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = getattr(loaded, "backend_tokenizer", None)
    except Exception as exc:  # missing files, foreign formats: transformers raises many kinds
        raise InvalidArgument(f"the folder {folder} has no tokenizer that transformers can read: {exc}") from exc
    if not isinstance(backend, tokenizers.Tokenizer):
        raise InvalidArgument(f"the tokenizer in {folder} has no fast version; save it as a tokenizer.json first")
    return Tokenizer(backend)


def _reported(texts: Sequence[str], progress: Progress | None) -> Iterator[str]:
    for index, text in enumerate(texts):
        if progress is not None and index % 256 == 0:
            progress(index, len(texts), "training the tokenizer")
        yield text
    if progress is not None:
        progress(len(texts), len(texts), "training the tokenizer")


def _key(texts: Sequence[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{_CACHE_FORMAT}:{vocab_size}".encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f":{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """`weighbridge` in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "weighbridge"


def _read_cache(path: Path) -> Tokenizer | None:
    try:
        entry = json.loads(path.read_text("utf-8"))
        tokenizer = Tokenizer.from_json(entry["tokenizer"])
        if tokenizer.checksum != entry["checksum"]:
            raise ValueError("its checksum does not match")
        return tokenizer
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        logger.warning("the cached tokenizer %s is damaged (%s); it is trained again", path, exc)
        return None


def _write_atomically(path: Path, text: str) -> None:
    """A temporary file beside `path`, fsynced and renamed: readers see the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
