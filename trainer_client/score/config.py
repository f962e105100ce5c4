"""What one scoring is: a frozen, checked `ScoreConfig`, and the command line that mirrors it field by field.

Knows nothing of corpora, files of a scoring or the service.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_client.flags import add_flags, check_fields, credential_arguments, given_flags, setting
from trainer_client.transports import check_url
from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import check_name

PROGRAM = "python -m trainer_client.score"
WAYS = ("top", "resample")
SELECTION_FORMS = (".jsonl", ".jsonl.gz", ".parquet")

_MEANING = """\
what the numbers mean:
  A weight says how much a document should count BESIDE THE OTHERS OF ITS BATCH: mean 1 over the documents of a batch.
  Batches are drawn from the whole corpus (from all files in proportion to their sizes, mixed within --shuffle
  documents), so that weights of different batches can be compared: the larger --batch, the better. A logit is what the
  weighter says before temperature and guard; it is comparable within its batch only (column batch). A document is read
  in up to --windows windows, evenly spread over it, each as long as the reference reads; weight and logit are the means
  over its windows. A document of fewer than two tokens has neither, and is never selected.

resuming:
  After a kill, the same command with --resume goes on with the documents that have no weight yet; none is left out or
  scored twice. No weight is ever made up: while the service is away, scoring waits.
"""


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of a scoring."""

    input: tuple[str, ...] = setting(
        (), "the corpus: .jsonl, .jsonl.gz, .parquet or .txt files (one document), folders or globs", required=True
    )
    output: str = setting("", "the weights, a .parquet file with a row a document", required=True)
    text_field: str = setting("text", "field or column of a document's text")
    id_field: str = setting("", "field or column of a document's id (default: FILE:ROW)")
    source_field: str = setting("source", "field or column that says where a document is from; may be missing")

    weighter: str = setting("embedded", "embedded, embedded:///STATE, grpc(s)://HOST:PORT or http(s)://HOST:PORT")
    token_file: str = setting("", "file of the service's token (default: the token in WEIGHBRIDGE_TOKEN, or none)")
    ca: str = setting(
        "", "PEM file of the CA of the service's certificate (default: WEIGHBRIDGE_CA, or the usual ones)"
    )
    cert: str = setting("", "PEM file of a certificate of one's own (default: WEIGHBRIDGE_CERT, or none)")
    key: str = setting("", "PEM file of its key (default: WEIGHBRIDGE_KEY)")
    insecure_token: bool = setting(False, "send the token unencrypted to another machine, where the network is trusted")
    weighter_name: str = setting("default", "name of the weighter")
    weighter_from: str = setting(
        "", "make the weighter where it is missing (default: only with --weighter embedded)", ("pretaught",)
    )
    reference: str = setting(
        "pretaught", "the reference that reads the documents: its name at the service, or a folder"
    )
    profile: str = setting("", "file of a target profile (python -m trainer_client.profile)")
    target: tuple[str, ...] = setting((), "documents of the target, in place of --profile; files as for --input")
    patience_s: float = setting(3600.0, "seconds to wait for a service that is away; 0: for ever", least=0)

    batch: int = setting(128, "documents that are weighed beside each other, about", least=2)
    windows: int = setting(4, "most windows of a document that are read", least=1)
    shuffle: int = setting(8192, "documents that are mixed before they are cut into batches, and kept at once", least=2)
    seed: int = setting(0, "of the mixing, and of --select resample", least=0)
    statistics: bool = setting(False, "also write the statistics that the weighter read, a column each")

    select: str = setting("", "also write a share of the documents: the best, or drawn by weight", WAYS)
    share: float = setting(0.2, "of the documents that --select chooses")
    selection: str = setting("", "file of the selection, .jsonl, .jsonl.gz or .parquet (default: beside --output)")

    resume: bool = setting(False, "go on with a scoring that was interrupted, or select from a finished one")
    overwrite: bool = setting(False, "replace what is already there")

    def check(self) -> ScoreConfig:
        """This config. Raises InvalidArgument, naming the flag, where a value is out of range or two contradict."""
        check_fields(self)
        if not self.output.endswith(".parquet"):
            raise InvalidArgument(f"--output is {self.output!r}, expected a file called *.parquet")
        if self.shuffle < self.batch:
            raise InvalidArgument(f"--shuffle is {self.shuffle}, expected at least --batch ({self.batch})")
        if self.profile and self.target:
            raise InvalidArgument("--profile and --target exclude each other: a profile is made of target documents")
        if self.resume and self.overwrite:
            raise InvalidArgument("--resume and --overwrite exclude each other: go on, or start anew")
        self._check_selection()
        try:
            check_url(self.weighter)
        except InvalidArgument as exc:
            raise InvalidArgument(f"--weighter: {exc.message}") from exc
        check_name(self.weighter_name, "--weighter-name")
        return self

    def _check_selection(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidArgument(f"--share is {self.share}, expected more than 0 and at most 1")
        if self.selection and not self.select:
            raise InvalidArgument(f"--selection without --select: say how to choose, {' or '.join(WAYS)}")
        if self.select and not self.selection_path.name.endswith(SELECTION_FORMS):
            raise InvalidArgument(f"--selection is {self.selection!r}, expected *{', *'.join(SELECTION_FORMS)}")
        if self.select and self.selection_path == Path(self.output):
            raise InvalidArgument(f"--selection and --output are both {self.output!r}, expected two files")
        if self.select and self.text_field in ("id", "source", "weight"):
            raise InvalidArgument(f"--text-field {self.text_field} can't be told from that column of the selection")

    @property
    def selection_path(self) -> Path:
        return Path(self.selection or self.output.removesuffix(".parquet") + ".selected.jsonl.gz")

    @property
    def start_from(self) -> str:
        """What a weighter that is missing is made from; empty: it must be there."""
        return "pretaught" if self.weighter == "embedded" else self.weighter_from

    @property
    def credentials(self) -> dict[str, Any]:
        """What `connect` shows the service; what is not given may be in the environment."""
        return credential_arguments(self)

    @property
    def lasting(self) -> dict[str, Any]:
        """The settings that decide the weights, as plain JSON values: a resumed scoring must have the same."""
        values = {name: getattr(self, name) for name in _LASTING}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_LASTING = (
    *("text_field", "id_field", "source_field", "weighter_name", "reference", "profile", "target"),
    *("batch", "windows", "shuffle", "seed", "statistics"),
)


def parse(arguments: Sequence[str] | None = None) -> ScoreConfig:
    """The checked config of a command line (None: the process's own).

    Raises InvalidArgument for values that are out of range; argparse's own errors exit with code 2.
    """
    return ScoreConfig(**given_flags(_parser(), arguments)).check()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Score every document of a corpus with a weighter, and select from it.",
        epilog=_MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, ScoreConfig, _METAVARS)
    return parser


_METAVARS = {
    **dict.fromkeys(("input", "output", "token_file", "ca", "cert", "key", "profile", "target", "selection"), "FILE"),
    **dict.fromkeys(("batch", "windows", "shuffle", "seed"), "N"),
    **dict.fromkeys(("text_field", "id_field", "source_field", "weighter_name", "reference"), "NAME"),
    **{"weighter": "URL", "patience_s": "SECONDS", "share": "SHARE"},
}
