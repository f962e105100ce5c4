"""The variants of a run that one job can hold side by side: their labels, and what their weighters start from.

A variant is a method and, for `dwm`, a mode and the weighter's beginning. All variants of a job share tokenizer, seed
and the order of samples. Knows names only; nothing of torch, files or the service.
"""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("dwm", "uniform", "dsir")
MODES = ("select", "weight", "both")
BEGINNINGS = ("pretaught", "none")
ROLES = ("learn", "frozen")
_SCRATCH = "-scratch"


@dataclass(frozen=True)
class Variant:
    """One way to pretrain; `label` names its folder, its column and its place in summaries."""

    label: str
    method: str
    mode: str = ""  # of dwm
    weighter_from: str = ""  # of dwm
    role: str = ""  # of dwm
    weighter: str = ""  # name of its weighter

    @property
    def learned(self) -> bool:
        """Whether a weighter has a say."""
        return self.method == "dwm"

    @property
    def selects(self) -> bool:
        """Whether a weighter chooses the batch from candidates."""
        return self.mode in ("select", "both")

    @property
    def weighs(self) -> bool:
        """Whether a weighter weighs the samples inside a batch."""
        return self.mode in ("weight", "both")

    @property
    def draws_candidates(self) -> bool:
        return self.selects or self.method == "dsir"

    @property
    def pretaught(self) -> bool:
        return self.weighter_from == "pretaught"

    @property
    def reads_profile(self) -> bool:
        """Whether its weighter reads statistics against the target."""
        return self.learned and (self.selects or self.pretaught)

    @property
    def inner_weighter(self) -> str:
        """The second weighter of `both`, which weighs what the first has selected; it always starts fresh."""
        return f"{self.weighter}-inner"


def label_of(method: str, mode: str, weighter_from: str) -> str:
    """uniform, dsir, or for dwm the mode, with -scratch where its weighter starts from fresh parameters."""
    if method != "dwm":
        return method
    return mode if weighter_from == "pretaught" else mode + _SCRATCH


LABELS: tuple[str, ...] = (
    *("uniform", "dsir"),
    *(label_of("dwm", mode, beginning) for mode in MODES for beginning in BEGINNINGS),
)


def variant_of(label: str, weighter: str, role: str = "learn") -> Variant:
    """The variant that a label stands for, with the name of its weighter and the role of its jobs."""
    if label in METHODS:
        return Variant(label, label)
    mode = label.removesuffix(_SCRATCH)
    beginning = "none" if label.endswith(_SCRATCH) else "pretaught"
    return Variant(label, "dwm", mode, beginning, role, weighter)
