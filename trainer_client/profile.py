"""Target profiles as files: made of documents against a reference's pool, stored with what they belong to, read again.

    python -m trainer_client.profile --reference DIR --documents FILE... --out FILE.safetensors

A file holds `log_ratios` [buckets] float16, and the checksums of documents, tokenizer and reference in its header.
Knows no service; torch is needed for the documents' counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import Row, check_buckets
from weighting_contract.profile import Profile, make_profile
from weighting_contract.reference import MANIFEST, read_counts, reference_files

FORMAT = "weighbridge-profile-1"
_KEYS = ("documents_checksum", "tokenizer_checksum", "reference_checksum")


def reference_profile(reference: str | os.PathLike[str], documents: Sequence[Row] | np.ndarray) -> Profile:
    """The profile of documents against the pool of the reference in a folder.

    Args:
        documents: token ids of each, by the reference's tokenizer.

    Raises:
        InvalidArgument: a damaged reference, rows that are no token ids, or none at all.
    """
    return make_profile(documents, read_counts(reference_files(reference)).ngrams)


def save_profile(
    path: str | os.PathLike[str], profile: Profile, *, tokenizer_checksum: str, reference_checksum: str
) -> None:
    """Writes a profile and what it belongs to; the file is there whole or not at all. OSError: the disk refuses."""
    metadata = {
        "format": FORMAT,
        "documents_checksum": profile.documents_checksum,
        "tokenizer_checksum": tokenizer_checksum,
        "reference_checksum": reference_checksum,
    }
    content = safetensors.numpy.save({"log_ratios": profile.log_ratios}, metadata)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_profile(
    path: str | os.PathLike[str], *, reference_checksum: str = "", tokenizer_checksum: str = ""
) -> Profile:
    """The profile in a file of `save_profile`.

    Args:
        reference_checksum, tokenizer_checksum: that it must belong to; "": any.

    Raises:
        InvalidArgument: one sentence about a file that is missing, damaged, something else, or of another reference or
            tokenizer.
    """
    expected = "expected a file of python -m trainer_client.profile"
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            table = file.get_tensor("log_ratios") if "log_ratios" in file.keys() else None  # noqa: SIM118
    except FileNotFoundError as exc:
        raise InvalidArgument(f"there is no file {path}; {expected}") from exc
    except (OSError, safetensors.SafetensorError) as exc:
        raise InvalidArgument(f"{path} can't be read: {exc}; {expected}") from exc
    if table is None or metadata.get("format") != FORMAT or any(key not in metadata for key in _KEYS):
        raise InvalidArgument(f"{path} is a safetensors file, but no profile; {expected}")
    if table.ndim != 1 or table.dtype != np.float16:
        raise InvalidArgument(
            f"{path}: log_ratios is {table.dtype.name} of shape {list(table.shape)}, expected float16 of [buckets]"
        )
    check_buckets(len(table))
    for key, wanted in (("reference_checksum", reference_checksum), ("tokenizer_checksum", tokenizer_checksum)):
        if wanted and metadata[key] != wanted:
            raise InvalidArgument(
                f"{path} belongs to the {key.replace('_', ' ')} {metadata[key][:12]}..., but the one in use is "
                f"{wanted[:12]}...; make the profile again with it"
            )
    return Profile(table, metadata["documents_checksum"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a profile file.

    Returns:
        The exit code: 0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer_client.profile",
        description="Make the target profile of documents against the pool of a reference.",
    )
    parser.add_argument("--reference", required=True, metavar="DIR", help="folder of trainer_client.reference")
    parser.add_argument(
        "--documents", required=True, nargs="+", metavar="FILE", help=".txt .jsonl .jsonl.gz .parquet, or folders"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the profile, a safetensors file")
    given = parser.parse_args(arguments)

    def command(_: object) -> int:
        print(_make(given.reference, given.documents, given.out))
        return 0

    from trainer_client.run.shell import in_shell  # needs rich, which reading a profile doesn't

    return in_shell("trainer_client.profile", command)


def _make(reference: str, names: Sequence[str], out: str) -> str:
    """Writes the file; a sentence about it."""
    from trainer_client.run.data import load_documents
    from trainer_client.run.tokenizer import Tokenizer

    files = reference_files(reference)
    about = json.loads(files[MANIFEST])
    tokenizer = Tokenizer.from_json(files["tokenizer.json"].decode())
    rows = [row for row in tokenizer.encode_batch([d.text for d in load_documents(names)]) if row]
    profile = make_profile(rows, read_counts(files).ngrams)
    save_profile(out, profile, tokenizer_checksum=about["tokenizer_checksum"], reference_checksum=about["checksum"])
    return (
        f"{out}: {len(rows)} documents of {sum(map(len, rows)):,} tokens against the pool of reference "
        f"{about['checksum'][:12]}, {len(profile.log_ratios):,} buckets"
    )


if __name__ == "__main__":
    sys.exit(main())
