"""Tokenizers of weighters that take texts: "bytes", or a tokenizer in the service's models directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weighting_contract.errors import InvalidArgument


def load_tokenizer(name: str, models_dir: Path | None) -> Callable[[tuple[str, ...]], list[list[int]]]:
    """A function from texts to token ids (no special tokens).

    "bytes" needs no file: ids 0..255 are the UTF-8 bytes. Any other name is a folder of `models_dir` that holds a
    `tokenizer.json`. Raises InvalidArgument where there is none.
    """
    if name == "bytes":
        return lambda texts: [list(text.encode()) for text in texts]
    folder = model_folder(name, models_dir, "spec.tokens.tokenizer")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InvalidArgument(f"spec.tokens.tokenizer is {name!r}, but that folder has no tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda texts: [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def model_folder(name: str, models_dir: Path | None, field: str) -> Path:
    """The folder `name` inside `models_dir`. Raises InvalidArgument where it isn't there or leads outside."""
    if models_dir is None:
        raise InvalidArgument(f"{field} is {name!r}, but this service has no models directory; start it with --models")
    root = models_dir.resolve()
    folder = (root / name).resolve()
    if root not in folder.parents or not folder.is_dir():
        raise InvalidArgument(f"{field} is {name!r}, expected the name of a folder in the service's models directory")
    return folder
