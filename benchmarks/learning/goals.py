"""What learned weights are to reach, and whether they do. Knows figures and the names of methods in full.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.learning.figures import ORACLE, UNIFORM, Figures
from benchmarks.learning.results import Results

INSIDE = "dwm-weight"  # DWM inside the batch
SCRATCH, PRETAUGHT, FROZEN = "dwm", "dwm-pretaught", "dwm-frozen"  # by selection
STATIC = ("dsir", "difference")
ABLATIONS = ("dsir-warm",)  # shown, but nobody's method: what a part of DWM does for another one
TEXTS = ("builtin", "books", "wiki")


@dataclass(frozen=True)
class Goal:
    """A figure and what it is to be."""

    what: str
    value: float
    bound: float
    at_least: bool = False  # else at most

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def goals(results: Results, all_figures: list[Figures]) -> Iterator[Goal]:
    """All whose runs are there."""
    table = {(f.corpus, f.method): f for f in all_figures}
    inside = {name for name, flags in results.methods.items() if flags.get("mode") == "weight"}
    for corpus in results.corpora:
        by_method = {method: f for (of, method), f in table.items() if of == corpus}
        if corpus in TEXTS:
            yield from _inside(corpus, by_method, inside)
            yield from _selection(corpus, by_method)
        if corpus == "clean":
            yield from _clean(by_method)
        if corpus == "look-alikes":
            yield from _look_alikes(by_method)
        yield from _equal_compute(corpus, by_method)
    taught = [f.teaching_seconds for f in all_figures if f.method in (INSIDE, SCRATCH, PRETAUGHT)]
    if taught:
        yield Goal("teaching, share of the training time, the largest of all", max(taught), 0.08)


def _inside(corpus: str, by_method: dict[str, Figures], inside: set[str]) -> Iterator[Goal]:
    ours = by_method.get(INSIDE)
    if ours is None:
        return
    if corpus == "builtin":
        gain = by_method[UNIFORM].test_loss - ours.test_loss
        yield Goal(f"{corpus}: DWM inside the batch, nats below uniform", gain, 0.12, at_least=True)
    others = {m: f.test_loss for m, f in by_method.items() if m in inside and not m.startswith(("dwm", ORACLE))}
    if others:
        best = min(others, key=lambda method: others[method])
        yield Goal(f"{corpus}: DWM inside the batch, {best} being the best of the others", ours.test_loss, others[best])


def _selection(corpus: str, by_method: dict[str, Figures]) -> Iterator[Goal]:
    shares = {SCRATCH: 0.85 if corpus == "builtin" else 0.80, PRETAUGHT: 0.92, FROZEN: 0.85}
    for method, share in shares.items():
        f = by_method.get(method)
        if f is not None and f.gap_closed is not None:
            yield Goal(f"{corpus}: {method}, share of the gap closed", f.gap_closed, share, at_least=True)
    for method in (PRETAUGHT, FROZEN):
        f = by_method.get(method)
        if f is None:
            continue
        what = f"{corpus}: {method}, compute to uniform's end"
        if corpus != "wiki":
            yield Goal(f"{what}, of uniform's", f.compute_to_uniform, 0.50)
        elif ORACLE in by_method:
            yield Goal(f"{what}, of the oracle's", f.compute_to_uniform / by_method[ORACLE].compute_to_uniform, 1.2)


def _equal_compute(corpus: str, by_method: dict[str, Figures]) -> Iterator[Goal]:
    ours = [by_method[m].loss_at_compute for m in (SCRATCH, PRETAUGHT, FROZEN) if m in by_method]
    others = {
        m: f.loss_at_compute for m, f in by_method.items() if not m.startswith(("dwm", ORACLE)) and m not in ABLATIONS
    }
    if corpus != "clean" and ours and others:
        best = min(others, key=lambda method: others[method])
        yield Goal(
            f"{corpus}: the best DWM at equal compute, {best} being the best of the others", min(ours), others[best]
        )


def _clean(by_method: dict[str, Figures]) -> Iterator[Goal]:
    for method in (SCRATCH, PRETAUGHT, FROZEN):
        if method in by_method:
            ratio = by_method[method].test_loss / by_method[UNIFORM].test_loss
            yield Goal(f"clean: {method}, of uniform's loss", ratio, 1.003)


def _look_alikes(by_method: dict[str, Figures]) -> Iterator[Goal]:
    ours = [by_method[m].test_loss for m in (SCRATCH, PRETAUGHT, FROZEN) if m in by_method]
    static = [by_method[m].test_loss for m in STATIC if m in by_method]
    if ours and static:
        yield Goal("look-alikes: the best DWM, nats below the best static method", min(static) - min(ours), 0.1, True)
