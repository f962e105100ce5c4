"""The judged methods by name, and what each can do. Knows names only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """A method whose say comes from a judge."""

    about: str  # for people
    weighs: bool = True  # it can also weigh the samples inside a batch
    reads_trainer: tuple[str, ...] = ()  # modes in which its judge runs the trainer's model
    reads_reference: bool = False  # its judge was made from the job's reference


JUDGED: dict[str, Judged] = {
    "random": Judged("chance, as uneven as a weighter"),
    "oracle": Judged("the label of the target's samples"),
    "loss": Judged("LinUpper of the trainer's loss", reads_trainer=("select",)),
    "rho": Judged("reducible holdout loss", reads_trainer=("select",), reads_reference=True),
    "similarity": Judged("the trainer's hidden states against validation's", reads_trainer=("select", "weight")),
    "alignment": Judged("the step's own cotangent", reads_trainer=("select", "weight")),
    "difference": Judged("cross-entropy difference, static", weighs=False, reads_reference=True),
}
