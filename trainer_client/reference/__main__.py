"""`python -m trainer_client.reference`: flags in, a folder and its table out, mistakes as sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainer_client.reference.config import ReferenceConfig, parse
from trainer_client.run.shell import in_shell

if TYPE_CHECKING:
    from trainer_client.reference.train import SavedReference


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a reference.

    Returns:
        The exit code: 0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted; nothing is left then.
    """

    def command(console: Console) -> int:
        _show(_make(parse(arguments), console), console)
        return 0

    return in_shell("trainer_client.reference", command)


def _make(config: ReferenceConfig, console: Console) -> SavedReference:
    # Torch and transformers take seconds to import: --help and mistakes in the flags need not wait for them.
    from trainer_client.reference.train import load_pool, save_reference
    from trainer_client.run.config import RunConfig
    from trainer_client.run.data import make_samples
    from trainer_client.run.device import set_up_torch
    from trainer_client.run.progress import preparing
    from trainer_client.run.tokenizer import cached_tokenizer, load_tokenizer
    from weighting_contract.reference import check_free

    check_free(config.out, replace=config.overwrite)
    device = set_up_torch(RunConfig(device=config.device, threads=config.threads))
    with preparing(console, "training the reference") as progress:
        documents = load_pool(config, progress)
        tokenizer = (
            load_tokenizer(config.tokenizer)
            if config.tokenizer
            else cached_tokenizer([d.text for d in documents], config.vocab_size, progress=progress)
        )
        samples = make_samples(documents, tokenizer, config.seq_len, progress=progress)
        return save_reference(
            samples,
            tokenizer,
            config.out,
            config,
            trained_on=f"{' '.join(config.data)}: {len(samples):,} samples of {config.seq_len} tokens",
            command=config.command(),
            device=device,
            progress=progress,
        )


def _show(made: SavedReference, console: Console) -> None:
    table = Table("reference", "", title_justify="left", show_header=False)
    for name, value in (
        ("parameters", f"{made.parameters:,}" if made.parameters else "none, it is counted"),
        ("vocabulary", f"{made.info.vocab_size:,} tokens"),
        ("loss on its pool", f"{made.info.loss:.3f} nats a token"),
        ("steps of training", f"{made.info.steps:,}"),
        ("time", f"{made.seconds:.1f} s"),
        ("size of the folder", f"{made.size_bytes / 1e6:.2f} MB"),
        ("checksum", made.info.checksum[:16]),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(f"{made.folder}  [dim]for the folder that a service gets as --models[/dim]", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
