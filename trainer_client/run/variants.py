"""The variants of a run that one job can hold side by side: their labels, and what their weighters start from.

A variant is a method, for `dwm` and judged methods a mode, and for `dwm` the weighter's beginning. All variants of a
job share tokenizer, seed and the order of samples. Knows names only; nothing of torch, files or the service.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer_client.run.methods.names import JUDGED

METHODS = ("dwm", "uniform", "dsir", *JUDGED)
MODES = ("select", "weight", "both")
BEGINNINGS = ("pretaught", "none")  # beside the folder of an exported weighter
ROLES = ("learn", "frozen")
_SCRATCH, _EXPORT, _WEIGHT = "-scratch", "-export", "-weight"


@dataclass(frozen=True)
class Variant:
    """One way to pretrain; `label` names its folder, its column and its place in summaries."""

    label: str
    method: str
    mode: str = ""  # of dwm and judged methods
    weighter_from: str = ""  # of dwm: one of BEGINNINGS, or the folder of an exported weighter
    role: str = ""  # of dwm
    weighter: str = ""  # name of its weighter

    @property
    def learned(self) -> bool:
        """Whether a weighter has a say."""
        return self.method == "dwm"

    @property
    def judged(self) -> bool:
        """Whether a judge has a say."""
        return self.method in JUDGED

    @property
    def selects(self) -> bool:
        """Whether a weighter chooses the batch from candidates."""
        return self.learned and self.mode in ("select", "both")

    @property
    def weighs(self) -> bool:
        """Whether a weighter weighs the samples inside a batch."""
        return self.learned and self.mode in ("weight", "both")

    @property
    def records_choice(self) -> bool:
        """Whether what it keeps of its candidates is on record."""
        return self.selects or (self.judged and self.mode == "select" and self.method != "oracle")

    @property
    def records_weights(self) -> bool:
        """Whether the weights inside its batches are on record."""
        return self.weighs or (self.judged and self.mode == "weight")

    @property
    def draws_candidates(self) -> bool:
        return self.records_choice or self.method == "dsir"

    @property
    def reads_reference(self) -> bool:
        """Whether it needs the job's reference."""
        return self.selects or (self.judged and JUDGED[self.method].reads_reference)

    @property
    def pretaught(self) -> bool:
        return self.weighter_from == "pretaught"

    @property
    def from_export(self) -> bool:
        return self.learned and self.weighter_from not in BEGINNINGS

    @property
    def reads_profile(self) -> bool:
        """Whether its weighter reads statistics against the target; of an export that weighs its spec says so."""
        return self.learned and (self.selects or not self.from_export)

    @property
    def inner_weighter(self) -> str:
        """The second weighter of `both`, which weighs what the first has selected; it always starts fresh."""
        return f"{self.weighter}-inner"


def label_of(method: str, mode: str, weighter_from: str) -> str:
    """The method, for judged ones with -weight in that mode; for dwm the mode, with -scratch for a fresh weighter and
    -export for one that starts from an export."""
    if method in JUDGED and mode == "weight":
        return method + _WEIGHT
    if method != "dwm":
        return method
    return mode + {"pretaught": "", "none": _SCRATCH}.get(weighter_from, _EXPORT)


LABELS: tuple[str, ...] = (  # of runs that a job may be compared with
    *("uniform", "dsir"),
    *(label_of("dwm", mode, beginning) for mode in MODES for beginning in BEGINNINGS),
    *JUDGED,
    *(label_of(name, "weight", "") for name, judged in JUDGED.items() if judged.weighs),
)
MAIN_LABELS: tuple[str, ...] = (*LABELS, *(mode + _EXPORT for mode in MODES))  # those of the main run


def variant_of(label: str, weighter: str, role: str = "learn", weighter_from: str = "") -> Variant:
    """The variant that a label stands for, with the name of its weighter, the role of its jobs and, where the label
    does not say it, the folder that the weighter starts from."""
    if (method := label.removesuffix(_WEIGHT)) in JUDGED:
        return Variant(label, method, "select" if label == method else "weight")
    if label in METHODS:
        return Variant(label, label)
    mode, dash, beginning = label.partition("-")
    started = {"": "pretaught", _SCRATCH: "none"}.get(dash + beginning, weighter_from)
    return Variant(label, "dwm", mode, started, role, weighter)
