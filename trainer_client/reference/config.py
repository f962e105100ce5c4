"""How a reference is made: a frozen, checked `ReferenceConfig`, and the command line that mirrors it field by field.

Knows nothing of torch, data or files of a reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from trainer_client.flags import add_flags, check_fields, flag, given_flags, setting
from weighting_contract.errors import InvalidArgument

PROGRAM = "python -m trainer_client.reference"
COUNTED, SMALLEST = "counts", "pico"  # sizes: no model at all, and the smallest one
_OF_A_MODEL = ("steps", "batch_size", "lr", "warmup_steps", "seed")


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of a reference; the defaults suit the demo's runs. Steps are optimiser steps, of a model alone."""

    data: tuple[str, ...] = setting(
        ("builtin",), "the pool: builtin, files (.txt .jsonl .jsonl.gz .parquet), or a `datasets` name"
    )
    val: tuple[str, ...] = setting((), "validation documents of later runs, which are kept out of the pool")
    test: tuple[str, ...] = setting((), "test documents of later runs, kept out likewise")
    out: str = setting("runs/reference", "folder for the reference")
    overwrite: bool = setting(False, "replace a reference that is already in --out")
    size: str = setting(
        COUNTED,
        "counts: how often n-grams occur in the pool, of up to 4 M tokens, nothing is trained; or a model: size "
        "preset, or the name or folder of a transformers causal LM, about a tenth of yours or less",
    )
    steps: int = setting(300, "optimiser steps of a model; 0 takes a folder's as it is", least=0)
    tokenizer: str = setting("", "folder or tokenizer.json of a tokenizer (default: train a byte-pair one on the pool)")
    vocab_size: int = setting(1024, "entries of a tokenizer that is trained here", least=1)
    seq_len: int = setting(64, "tokens a sample", least=1)
    batch_size: int = setting(32, "samples a step", least=1)
    lr: float = setting(8e-3, "peak learning rate of AdamW")
    warmup_steps: int = setting(20, "steps of linear warm-up; constant after it", least=0)
    seed: int = setting(0, "of parameters and data order", least=0)
    ngram_buckets: int = setting(1 << 16, "buckets of the pool's hashed n-grams, a power of two from 2**10 to 2**20")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    threads: int = setting(0, "CPU threads of torch; 0: torch's own choice", least=0)

    def check(self) -> ReferenceConfig:
        """This config. Raises InvalidArgument, naming the flag, where a value is out of range."""
        check_fields(self)
        given = [name for name in _OF_A_MODEL if getattr(self, name) != getattr(ReferenceConfig, name)]
        if self.size == COUNTED and given:
            raise InvalidArgument(
                f"{flag(given[0])} is for training a model, but --size {COUNTED} trains none: name a size, such as "
                f"{SMALLEST}, or leave it out"
            )
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
                words += [flag(f.name), *(map(str, value) if isinstance(value, tuple) else (str(value),))]
        return shlex.join(words)


def parse(arguments: Sequence[str] | None = None) -> ReferenceConfig:
    """The checked config of a command line (None: the process's own).

    Raises InvalidArgument for values that are out of range; argparse's own errors exit with code 2.
    """
    return ReferenceConfig(**given_flags(_parser(), arguments)).check()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make a reference of a pool of documents, counted or trained, for a weighting service to host.",
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, ReferenceConfig)
    return parser
