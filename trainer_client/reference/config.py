"""How a reference is made: a frozen, checked `ReferenceConfig`, and the command line that mirrors it field by field.

Knows nothing of torch, data or files of a reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weighting_contract.errors import InvalidArgument

PROGRAM = "python -m trainer_client.reference"


def _flag(default: Any, help: str, least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of a reference; the defaults suit the demo's runs. Steps are optimiser steps."""

    data: tuple[str, ...] = _flag(
        ("builtin",), "the pool: builtin, files (.txt .jsonl .jsonl.gz .parquet), or a `datasets` name"
    )
    val: tuple[str, ...] = _flag((), "validation documents of later runs, which are kept out of the pool")
    test: tuple[str, ...] = _flag((), "test documents of later runs, kept out likewise")
    out: str = _flag("runs/reference", "folder for the reference")
    overwrite: bool = _flag(False, "replace a reference that is already in --out")
    size: str = _flag(
        "tiny", "size preset, or the name or folder of a transformers causal LM; at most a tenth of yours"
    )
    steps: int = _flag(300, "optimiser steps; 0 takes a folder's model as it is", least=0)
    tokenizer: str = _flag("", "folder or tokenizer.json of a tokenizer (default: train a byte-pair one on the pool)")
    vocab_size: int = _flag(1024, "entries of a tokenizer that is trained here", least=1)
    seq_len: int = _flag(64, "tokens a sample", least=1)
    batch_size: int = _flag(32, "samples a step", least=1)
    lr: float = _flag(8e-3, "peak learning rate of AdamW")
    warmup_steps: int = _flag(20, "steps of linear warm-up; constant after it", least=0)
    seed: int = _flag(0, "of parameters and data order", least=0)
    ngram_buckets: int = _flag(1 << 16, "buckets of the pool's hashed n-grams, a power of two from 2**10 to 2**20")
    device: str = _flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    threads: int = _flag(0, "CPU threads of torch; 0: torch's own choice", least=0)

    def check(self) -> ReferenceConfig:
        """This config. Raises InvalidArgument, naming the flag, where a value is out of range."""
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if least is not None and value < least:
                raise InvalidArgument(f"{_name(f.name)} is {value}, expected {least} or more")
        if not 0 < self.lr <= 1:
            raise InvalidArgument(f"--lr is {self.lr}, expected more than 0 and at most 1")
        if not (1 << 10 <= self.ngram_buckets <= 1 << 20 and self.ngram_buckets & (self.ngram_buckets - 1) == 0):
            raise InvalidArgument(
                f"--ngram-buckets is {self.ngram_buckets}, expected a power of two from 1024 to 1048576"
            )
        return self

    def command(self) -> str:
        """The command line that makes the same reference, without where it goes."""
        words = PROGRAM.split()
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("out", "overwrite"):
                words += [_name(f.name), *(map(str, value) if isinstance(value, tuple) else (str(value),))]
        return shlex.join(words)


def parse(arguments: Sequence[str] | None = None) -> ReferenceConfig:
    """The checked config of a command line (None: the process's own).

    Raises InvalidArgument for values that are out of range; argparse's own errors exit with code 2.
    """
    given = vars(_parser().parse_args(arguments))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return ReferenceConfig(**given).check()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train a small reference model on a pool of documents, for a weighting service to host.",
    )
    for f in dataclasses.fields(ReferenceConfig):
        text, default = f.metadata["help"].replace("%", "%%"), f.default
        if isinstance(default, bool):
            parser.add_argument(_name(f.name), action="store_true", help=text)
            continue
        if default and "default" not in text:
            text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        many: dict[str, Any] = {"nargs": "+", "type": str} if isinstance(default, tuple) else {"type": type(default)}
        parser.add_argument(_name(f.name), default=default, help=text, **many)
    return parser


def _name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
