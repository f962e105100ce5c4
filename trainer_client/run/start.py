"""The exported weighter that --weighter-from names: read, checked against what the run's samples are, and kept with it.

Knows files and specs; nothing of the service or of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer_client.run.config import RunConfig
from trainer_client.run.variants import Variant
from weighting_contract.columns import COLUMNS, needs_profile, unknown_columns
from weighting_contract.errors import FailedPrecondition, InvalidArgument
from weighting_contract.export import check_export, export_files
from weighting_contract.spec import WeighterSpec


@dataclass(frozen=True)
class Start:
    """An exported weighter that a run can give what it reads."""

    folder: Path
    files: dict[str, bytes]
    spec: WeighterSpec

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of each sample, in its order."""
        return self.spec.features.names if self.spec.features else ()

    @property
    def tokenizer_checksum(self) -> str:
        """Of the one tokenizer that it takes samples of; empty: any."""
        return self.spec.features.tokenizer_checksum if self.spec.features else ""


def given_start(config: RunConfig) -> Start | None:
    """The export that --weighter-from names; None where it names none. A resumed run goes on with its own copy.

    Raises:
        InvalidArgument: a folder that holds no whole export.
        FailedPrecondition: a weighter that reads what no run can give.
    """
    if not config.main.from_export or config.replay_weights:
        return None
    copy = Path(config.out) / "weighter-start"
    folder = copy if config.resume and copy.is_dir() else Path(config.weighter_from)
    try:
        files = export_files(folder)
    except InvalidArgument as exc:
        raise InvalidArgument(
            f"--weighter-from is {config.weighter_from}, neither pretaught nor none nor a whole export: {exc.message}"
        ) from exc
    start = Start(folder, files, check_export(files, str(folder)).spec)
    _check_inputs(start)
    return start


def check_tokenizer(start: Start | None, checksum: str) -> None:
    """Raises FailedPrecondition where the weighter takes samples of another tokenizer than the one of this checksum."""
    if start and start.tokenizer_checksum not in ("", checksum):
        raise FailedPrecondition(
            f"--weighter-from: the weighter in {start.folder} takes samples of the tokenizer "
            f"{start.tokenizer_checksum[:12]}... (spec.features.tokenizer_checksum), but this run's has the checksum "
            f"{checksum[:12]}...: name that tokenizer by --tokenizer or --reference, or start from another weighter"
        )


def reads_profile(variant: Variant, start: Start | None) -> bool:
    """Whether a variant's weighter reads statistics against the target."""
    return variant.reads_profile or (variant.from_export and start is not None and needs_profile(start.columns))


def _check_inputs(start: Start) -> None:
    spec = start.spec
    features = spec.features
    named = f"--weighter-from: the weighter in {start.folder} reads"
    if features and features.hidden_size:
        raise FailedPrecondition(
            f"{named} a pooled hidden state of {features.hidden_size} (spec.features.hidden_size), which does not "
            "travel between model sizes, and a run gives none; start from a weighter that reads columns alone"
        )
    if spec.tokens or not features:
        raise FailedPrecondition(f"{named} token ids, but a run gives it columns; start from one that reads columns")
    if unknown := unknown_columns(features.names):
        raise FailedPrecondition(
            f"{named} {', '.join(map(repr, unknown))} (spec.features.names), but a run gives {', '.join(COLUMNS)}; "
            "start from a weighter that reads some of these"
        )
