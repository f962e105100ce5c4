"""States of weighters: built fresh, restored from snapshots, saved, vouched for, and put back.

Knows the weighter, the snapshots and what the log vouches for; no threads, no use cases, nothing of jobs.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weighting_contract.errors import FailedPrecondition, InvalidArgument, Unavailable
from weighting_contract.export import export_files
from weighting_contract.spec import WeighterSpec
from weighting_service import pretaught
from weighting_service.domain import Inputs, Rollback, WeighterRecord
from weighting_service.snapshots import Snapshot, SnapshotStore, parse, state_digest
from weighting_service.texts import load_tokenizer
from weighting_service.update_log import UpdateLog
from weighting_service.weighter import Weighter, load_parameters
from weighting_service.weighter.state import FORMAT

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
CHAIN, ENVIRONMENT = "chain", "environment"  # what a snapshot's metadata says beside the weighter's state


@dataclass
class Hosted:
    """A weighter as this process serves it. Only the follower changes it, but for its record and its failure."""

    record: WeighterRecord
    weighter: Weighter
    chain: str = ""  # of the log's entry at the weighter's position; empty: not known
    environment: str = ""  # that computed the state; only checksums of equal ones can be compared
    snapshot_position: int = -1
    checksum_due: bool = False  # the log was not told the state's checksum yet
    diverged_at: int = 0  # where the state was found to be another than the one that holds; out of service until then
    reloaded: bool = False  # since it diverged
    failure: str = ""  # why its state can't be vouched for; empty: it can
    caught_up: threading.Event = field(default_factory=threading.Event)

    @property
    def out_of_service(self) -> str:
        """Why it is not served now; empty: it is."""
        if not self.failure and self.diverged_at:
            return f"its state was not the one that holds at position {self.diverged_at}; it is made anew"
        return self.failure

    def take_over(self, other: Hosted) -> None:
        """Goes on from the state of `other`."""
        self.weighter, self.chain, self.environment = other.weighter, other.chain, other.environment
        self.snapshot_position, self.checksum_due = other.snapshot_position, False


class States:
    """Makes and keeps the states of all weighters of one service. Its methods block; OSError is the storage's.

    Args:
        update_log: vouches for states.
        snapshots: keep them.
        device: where weighters live that read tokens or hidden states; those that read columns alone live on the CPU.
        models_dir: holds the folders of pretrained encoders and tokenizers.
    """

    def __init__(
        self, update_log: UpdateLog, snapshots: SnapshotStore, *, device: torch.device, models_dir: Path | None
    ) -> None:
        self._log = update_log
        self.snapshots = snapshots
        self._device = device
        self._models_dir = models_dir

    # ---- Making -----------------------------------------------------------------------------------------------------

    def create(self, record: WeighterRecord, files: Mapping[str, bytes] | None = None) -> Hosted:
        """A weighter at its beginning, and its snapshot at position 0: nothing else may know the files later, and later
        versions of torch may initialise otherwise.

        Args:
            files: of an export, to start from its parameters; None: from fresh ones.

        Raises:
            InvalidArgument: they don't fit the spec, or give no weights.
            Unavailable: the snapshot can't be written.
        """
        weighter = self._fresh(record)
        if files is not None:
            load_parameters(weighter, files)
        hosted = Hosted(record, weighter, environment=environment(weighter.device))
        if not np.isfinite(_warm_up(weighter)).all():
            raise InvalidArgument("the export's parameters give weights that are not finite; export the weighter again")
        if record.spec.tokens and record.spec.tokens.tokenizer:
            load_tokenizer(record.spec.tokens.tokenizer, self._models_dir, hosted.weighter.vocabulary_size)
        try:
            self.save(hosted)
        except OSError as exc:
            raise Unavailable(
                f"weighter {record.name!r} was not created: its snapshot can't be written ({exc})"
            ) from exc
        return hosted

    def restore(self, record: WeighterRecord) -> Hosted:
        """The weighter at its newest snapshot that verifies; without one, as it began.

        Raises:
            FailedPrecondition: without one, the log alone can't make it.
        """
        return self._restored(record, self.snapshots.load_latest(record.uid))

    def restore_vouched(self, record: WeighterRecord, before: int, every: int) -> Hosted:
        """The weighter at its newest snapshot below `before` that is the state that the log vouches for.

        Args:
            record: of the weighter.
            before: a position.
            every: its multiples are the positions whose states are vouched for.

        Raises:
            FailedPrecondition: there is none, and the log alone can't make it.
        """
        snapshot = self.snapshots.load_latest(record.uid, before)
        while snapshot is not None and (snapshot.position % every or not self._vouched(record.uid, snapshot)):
            snapshot = self.snapshots.load_latest(record.uid, snapshot.position)
        return self._restored(record, snapshot)

    def packaged(self) -> Weighter:
        """The weighter that comes with the package, as it was taught. Raises FailedPrecondition without one."""
        try:
            return Weighter.from_pretrained(pretaught.weighter_folder(), CPU)  # it reads columns alone
        except InvalidArgument as exc:
            raise _no_packaged(exc) from exc

    @staticmethod
    def packaged_files() -> dict[str, bytes]:
        """The export that comes with the package. Raises FailedPrecondition without one."""
        try:
            return export_files(pretaught.weighter_folder())
        except InvalidArgument as exc:
            raise _no_packaged(exc) from exc

    # ---- Keeping ----------------------------------------------------------------------------------------------------

    def save(self, hosted: Hosted) -> None:
        """A snapshot of the state as it is."""
        weighter = hosted.weighter
        self.snapshots.save(hosted.record.uid, weighter.position, weighter.state_tensors(), _metadata(hosted))
        hosted.snapshot_position = weighter.position

    def holds(self, hosted: Hosted) -> bool:
        """Tells the log the state's checksum; False where another replica computed another state at this position."""
        weighter = hosted.weighter
        checksum = state_digest(weighter.position, weighter.state_tensors(), _metadata(hosted))
        return self._log.vouch(hosted.record.uid, weighter.position, hosted.environment, checksum) == checksum

    def put_back(self, hosted: Hosted, position: int, rollback: Rollback) -> None:
        """Applies a rollback as the entry at `position`. Others may score meanwhile."""
        snapshot = parse(rollback.state, rollback.to_position)
        hosted.weighter.restore(position, snapshot.tensors, snapshot.metadata)
        hosted.environment = self._environment_of(hosted.record, hosted.weighter, snapshot)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _restored(self, record: WeighterRecord, snapshot: Snapshot | None) -> Hosted:
        if snapshot is None and record.initial:
            raise FailedPrecondition(
                f"no snapshot of weighter {record.name!r} can be read, and its log alone is not enough: it began with "
                f"given parameters ({record.initial}); restore its snapshots from a back-up"
            )
        weighter = self._fresh(record)
        hosted = Hosted(record, weighter, environment=environment(weighter.device))
        if snapshot is None:
            log.warning("weighter %r has no readable snapshot; replaying its log from the start", record.name)
        else:
            weighter.load_state(snapshot.tensors, snapshot.metadata)
            hosted.chain = str(snapshot.metadata.get(CHAIN, ""))
            hosted.environment = self._environment_of(record, weighter, snapshot)
            hosted.snapshot_position = snapshot.position
        _warm_up(weighter)
        return hosted

    def _vouched(self, uid: str, snapshot: Snapshot) -> bool:
        """Of one that nobody has vouched for, the checksum is published now: it is all that there is."""
        if snapshot.position == 0:
            return True
        computed = str(snapshot.metadata.get(ENVIRONMENT, ""))
        return self._log.vouch(uid, snapshot.position, computed, snapshot.digest) == snapshot.digest

    def _fresh(self, record: WeighterRecord) -> Weighter:
        return Weighter(
            record.spec,
            device=device_of(record.spec, self._device),
            models_dir=self._models_dir,
            taught_before=bool(record.initial),
        )

    def _environment_of(self, record: WeighterRecord, weighter: Weighter, snapshot: Snapshot) -> str:
        """Of states that follow from a snapshot here: one of another environment leaves its mark on all of them."""
        ours, theirs = environment(weighter.device), str(snapshot.metadata.get(ENVIRONMENT, ""))
        if theirs in ("", ours) or snapshot.position == 0:  # nothing is computed in the state at 0
            return ours
        log.info(
            "the state of weighter %r at position %d was computed by %s, and goes on with %s: later states may differ "
            "in their last bits from those of before",
            record.name,
            snapshot.position,
            theirs,
            ours,
        )
        origin = hashlib.sha256(f"{snapshot.position}:{theirs}".encode()).hexdigest()[:12]
        return f"{ours}, from {origin}"


def device_of(spec: WeighterSpec, device: torch.device) -> torch.device:
    """Where a weighter of this spec lives in a service with this device.

    On the CPU where it reads columns alone. It is so small that starting a GPU's kernels would take longer than the CPU
    takes to compute, and behind a reference's or a trainer's they would have to wait. And torch has one thread for all
    backward passes on a GPU: in a trainer's own process, one that waits there for weights would keep the weighter from
    learning what those weights wait for.
    """
    on_device = spec.tokens or (spec.features and spec.features.hidden_size)
    return device if on_device else CPU


def environment(device: torch.device) -> str:
    """What a state depends on beside the updates, down to its last bits."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"format {FORMAT}, torch {torch.__version__}, {device.type} {kind}, {threads} threads"


def _metadata(hosted: Hosted) -> Mapping[str, Any]:
    return {**hosted.weighter.state_metadata(), CHAIN: hosted.chain, ENVIRONMENT: hosted.environment}


def _no_packaged(exc: InvalidArgument) -> FailedPrecondition:
    return FailedPrecondition(f"this installation has no pretaught weighter: {exc.message}")


def _warm_up(weighter: Weighter) -> np.ndarray:
    """One forward pass, so that the first caller doesn't pay for lazy initialisation; its weights."""
    spec = weighter.spec
    names, hidden = (len(spec.features.names), spec.features.hidden_size) if spec.features else (0, 0)
    (scores,) = weighter.score(
        [
            Inputs(
                features=np.zeros((2, names), np.float32) if names else None,
                hidden=np.zeros((2, hidden), np.float32) if hidden else None,
                tokens=np.zeros((2, 1), np.int64) if spec.tokens else None,
                lengths=np.ones(2, np.int64) if spec.tokens else None,
            )
        ]
    )
    return scores.weights
