"""Tokenizers of weighters that take texts: "bytes", or a tokenizer in the service's models directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weighting_contract.errors import InvalidArgument
from weighting_service.models_dir import model_folder


def load_tokenizer(
    name: str, models_dir: Path | None, vocabulary_size: int | None = None
) -> Callable[[tuple[str, ...]], list[list[int]]]:
    """A function from texts to token ids (no special tokens).

    "bytes" needs no file: ids 0..255 are the UTF-8 bytes. Any other name is a folder of `models_dir` that holds a
    `tokenizer.json`. Raises InvalidArgument where there is none, or it has more tokens than `vocabulary_size`.
    """
    if name == "bytes":
        if vocabulary_size is not None and vocabulary_size < 256:
            raise InvalidArgument(
                f"spec.tokens.tokenizer is 'bytes', with ids from 0 to 255, but the encoder knows {vocabulary_size}; "
                "give it a vocab_size of at least 256"
            )
        return lambda texts: [list(text.encode()) for text in texts]
    folder = model_folder(name, models_dir, "spec.tokens.tokenizer")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InvalidArgument(f"spec.tokens.tokenizer is {name!r}, but that folder has no tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    if vocabulary_size is not None and tokenizer.get_vocab_size() > vocabulary_size:
        raise InvalidArgument(
            f"spec.tokens.tokenizer {name!r} has {tokenizer.get_vocab_size()} tokens, but the encoder knows "
            f"{vocabulary_size}; they do not belong together"
        )
    return lambda texts: [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
