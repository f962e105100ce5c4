"""What learned weights cost and gain on a GPU, at sizes that are trained there; and how well a reference uses it.

    python -m benchmarks.gpu --texts DIR [--model base] [--steps 600] [--out runs/gpu]
    python -m benchmarks.gpu --data POOL --val TARGET [--test TARGET] ...
    python -m benchmarks.gpu --small

Trains a model of 25 to 125 M parameters in bf16 by `python -m trainer_client.run` from one seed: uniformly, with DWM
inside the batch, by selection from scratch, by selection pretaught and taught on, and shorter with frozen weighters.
Then the test loss of each once as many seconds had passed as uniform took for all steps, and what a step costs beyond
uniform's once a run's first steps, which are all taught, are over. The service is in the same process and on the same
device. Besides, the roofline of a reference of 25 M parameters: floating-point operations a second of scoring tokens,
of a plain loop over the same model, and of a large bf16 matrix product. `--texts` is a folder of books, wiki and web
texts: books are the target then. `--small` is all of it on the CPU in a minute, to see that it works, not for its
figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe, quantile
from benchmarks.mixtures import large_mixture
from trainer_client.reference.config import ReferenceConfig
from trainer_client.reference.train import save_reference
from trainer_client.run.data import load_corpus, make_samples
from trainer_client.run.metrics import read_metrics
from trainer_client.run.models import SIZES, count_parameters
from trainer_client.run.report import RunSummary, write_json
from trainer_client.run.tokenizer import cached_tokenizer
from weighting_service.reference import load_reference

UNIFORM, PRECISION = "uniform", "bf16"
PRETAUGHT = ("--mode", "select", "--weighter-from", "pretaught")
INSIDE = ("--mode", "weight", "--weighter-from", "none")
GOAL_COST = {"frozen": 0.02, "learn": 0.05}  # beyond uniform's step
PLAIN_SAMPLES = 32  # a pass of the plain loop


@dataclass(frozen=True)
class Setting:
    """What is trained and measured; the defaults are for a GPU."""

    data: tuple[str, ...] = ("builtin",)
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    model: str = "base"
    steps: int = 600
    compare: tuple[str, ...] = (UNIFORM, "weight-scratch", "select-scratch")  # beside pretaught selection
    frozen_steps: int = 300  # of frozen runs, which are there for their cost; 0: none
    first: int = 160  # steps that no cost is read off
    batch_size: int = 64
    seq_len: int = 512
    vocab_size: int = 8192
    lr: float = 1e-3
    eval_every: int = 50
    device: str = "cuda"
    reference: str = "base"  # of the roofline; runs have one of their own data
    samples: int = 4096  # that the roofline scores; 0: none is measured
    matrix: int = 8192  # side of the product
    rounds: int = 7

    def flags(self, out: Path) -> list[str]:
        """Of all runs; nothing is saved before the last step."""
        names = ("model", "batch_size", "seq_len", "vocab_size", "lr", "eval_every", "device")
        found = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(self, name)))]
        for name in ("data", "val", "test"):
            found += [f"--{name}", *getattr(self, name)] if getattr(self, name) else []
        saving = ("--checkpoint-every", str(self.steps))
        return [*found, *saving, "--precision", PRECISION, "--out", str(out), "--overwrite"]


SMALL = Setting(
    model="tiny",
    steps=24,
    frozen_steps=12,
    first=6,
    batch_size=16,
    seq_len=64,
    vocab_size=1024,
    lr=2e-3,
    eval_every=4,
    device="cpu",
    reference="pico",
    samples=128,
    matrix=256,
    rounds=3,
)


@dataclass(frozen=True)
class Cost:
    """A run."""

    steps: int
    test_loss: float
    loss_in_uniforms_time: float  # test loss on the curve's samples
    step_ms: float  # mean, once the first steps are over
    overhead: float  # of it, beyond uniform's
    fallback_steps: int


@dataclass(frozen=True)
class Roofline:
    """Floating-point operations a second, and the tokens a second behind them.

    A token's forward pass takes 2 N + 2 L T H: N parameters, and attention over T / 2 earlier tokens on average in each
    of L layers of width H (Kaplan et al. 2020, arXiv 2001.08361; half of it, as attention is causal).
    """

    parameters: int
    matmul: float
    scoring: float
    plain: float
    scoring_tokens: float
    plain_tokens: float

    @property
    def fraction(self) -> float:
        """Of the matrix product's throughput that scoring reaches."""
        return self.scoring / self.matmul


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything on the CPU in a minute, with tiny sizes")
    parser.add_argument("--texts", type=Path, help="folder of books, wiki and web texts, to make pool and target of")
    parser.add_argument("--data", nargs="+", help="training documents, as of trainer_client.run")
    parser.add_argument("--val", nargs="+", help="validation documents, the target")
    parser.add_argument("--test", nargs="+", help="test documents (default: half of the validation documents)")
    parser.add_argument("--model", choices=SIZES, help=f"of the runs (default: {Setting.model})")
    parser.add_argument("--steps", type=int, help=f"of each run (default: {Setting.steps})")
    compare = " ".join(Setting.compare)
    parser.add_argument("--compare", nargs="+", help=f"runs beside pretaught selection, uniform first ({compare})")
    parser.add_argument("--frozen-steps", type=int, help=f"of frozen runs; 0: none (default: {Setting.frozen_steps})")
    parser.add_argument("--samples", type=int, help=f"of the roofline; 0: leave it out (default: {Setting.samples})")
    parser.add_argument("--batch-size", type=int, help=f"samples a step (default: {Setting.batch_size})")
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {Setting.lr})")
    parser.add_argument("--device", help="cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of runs and results.json")
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --small shows on the CPU that the program works")
    if not (given.small or given.texts or (given.data and given.val)):
        parser.error("--texts is missing, or --data and --val: name a folder of texts, or a pool and the target")
    names = {field.name for field in fields(Setting)}
    named = {name: value for name, value in vars(given).items() if value is not None and name in names}
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    if given.texts:
        found = large_mixture(given.texts).write(given.out / "corpus")
        named |= {"data": (str(found["pool"]),), "val": (str(found["val"]),), "test": (str(found["test"]),)}
    setting = replace(SMALL if given.small else Setting(), **named)
    hardware = describe_device(setting.device)
    console = Console()
    console.print(hardware, highlight=False)
    results: dict[str, Any] = {"hardware": hardware, "setting": asdict(setting)}
    if setting.samples:
        roofline = measure_roofline(setting)
        console.print(roofline_table(roofline, setting))
        write_json(given.out / "results.json", results := {**results, "reference": asdict(roofline)})
    costs = train(setting, given.out)
    console.print(runs_table(costs, setting, hardware))
    values = {name: asdict(cost) for name, cost in costs.items()}
    write_json(given.out / "results.json", {**results, "runs": values})
    console.print(given.out / "results.json", highlight=False)
    return 0


def describe_device(device: str) -> str:
    """`describe`, and the GPU's name, memory and CUDA version before it."""
    if torch.device(device).type != "cuda":
        return describe()
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}\n{describe()}"


# ---- Runs -----------------------------------------------------------------------------------------------------------


def train(setting: Setting, out: Path) -> dict[str, Cost]:
    """All runs, one after the other, as a user starts them. Raises SystemExit where they fail."""
    jobs = {"learn": (*PRETAUGHT, "--compare", *setting.compare, "--steps", str(setting.steps))}
    if setting.frozen_steps:
        steps = ("--role", "frozen", "--steps", str(setting.frozen_steps))
        jobs |= {"frozen-select": (*PRETAUGHT, *steps), "frozen-weight": (*INSIDE, *steps)}
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, RunSummary] = {}
    seconds: dict[str, float] = {}
    for job, flags in jobs.items():
        folder = out / "runs" / job
        done = subprocess.run([sys.executable, "-m", "trainer_client.run", *setting.flags(folder), *flags])
        if done.returncode:
            raise SystemExit(f"the runs failed with status {done.returncode}; what they said stands above")
        for path in sorted(folder.glob("*/summary.json")):
            name = job if job != "learn" else path.parent.name
            found[name] = RunSummary.read(path)
            seconds[name] = step_seconds(path.parent / "metrics.jsonl", setting.first, setting.eval_every)
    whole = found[UNIFORM].test_curve[-1][1]
    costs = {}
    for name, run in found.items():
        at, losses = [point[1] for point in run.test_curve], [point[2] for point in run.test_curve]
        costs[name] = Cost(
            steps=run.steps,
            test_loss=run.test_loss,
            loss_in_uniforms_time=float(np.interp(whole, at, losses)),
            step_ms=1e3 * seconds[name],
            overhead=seconds[name] / seconds[UNIFORM] - 1,
            fallback_steps=run.fallback_steps,
        )
    return costs


def step_seconds(metrics: Path, first: int, eval_every: int) -> float:
    """Mean wall seconds of a training step after the first ones, evaluations left out."""
    ends = np.array([line["seconds"] for line in read_metrics(metrics)])  # of steps 1, 2, ...
    taken = np.diff(ends)[first - 1 :]
    steps = np.arange(first + 1, len(ends) + 1)
    return float(taken[steps % eval_every != 0].mean())


def runs_table(costs: dict[str, Cost], setting: Setting, hardware: str) -> Table:
    size = f"{setting.model}, batches of {setting.batch_size} x {setting.seq_len} tokens, {PRECISION}"
    goals = ", ".join(f"{role} {most:.0%}" for role, most in GOAL_COST.items())
    title = f"{size}, on {hardware.splitlines()[0]}\nmore: than uniform's step; goals: {goals}"
    result = Table("", "steps", "test loss", "in uniform's time", "ms a step", "more", "unanswered", title=title)
    for name, c in costs.items():
        losses = f"{c.test_loss:.3f}", f"{c.loss_in_uniforms_time:.3f}"
        if name.startswith("frozen"):
            losses = "", ""  # of another number of steps
        more = "" if name == UNIFORM else f"{c.overhead:+.1%}"
        result.add_row(name, str(c.steps), *losses, f"{c.step_ms:.1f}", more, str(c.fallback_steps))
    return result


# ---- The reference --------------------------------------------------------------------------------------------------


def measure_roofline(setting: Setting) -> Roofline:
    """Scoring by a reference that has learned nothing: its speed does not depend on that."""
    device = torch.device(setting.device)
    documents = load_corpus(setting.data, setting.val, setting.test).train
    tokenizer = cached_tokenizer([d.text for d in documents], setting.vocab_size)
    samples = make_samples(documents, tokenizer, setting.seq_len)
    rows = list(samples.tokens[: setting.samples].astype(np.int64))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "reference"
        config = ReferenceConfig(size=setting.reference, steps=0)
        save_reference(samples, tokenizer, folder, config, trained_on="nothing", command="benchmark")
        reference = load_reference(folder, device)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().to(device)
    # In turns, so that whatever else the machine does meets all alike.
    kinds: dict[str, Callable[[], object]] = {
        "scoring": lambda: reference.raw_statistics(rows),
        "plain": lambda: plain_loop(model, rows, device),
        "matmul": matmul(setting.matrix, device),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(setting.rounds + 1):
        for name, what in kinds.items():
            times[name].append(timed(what, device))
    seconds = {name: quantile(of[1:], 0.5) for name, of in times.items()}
    parameters, tokens = count_parameters(model), sum(len(row) - 1 for row in rows)
    size = SIZES[setting.reference]
    flops = 2 * parameters + 2 * size.layers * setting.seq_len * size.hidden
    return Roofline(
        parameters=parameters,
        matmul=2 * setting.matrix**3 / seconds["matmul"],
        scoring=flops * tokens / seconds["scoring"],
        plain=flops * tokens / seconds["plain"],
        scoring_tokens=tokens / seconds["scoring"],
        plain_tokens=tokens / seconds["plain"],
    )


@torch.inference_mode()
def plain_loop(model: Any, rows: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """[N, T] token losses, as one would write it by hand; on a GPU in bf16, as references score there."""
    losses = []
    for start in range(0, len(rows), PLAIN_SAMPLES):
        tokens = torch.from_numpy(np.stack(rows[start : start + PLAIN_SAMPLES])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=tokens[:, :-1]).logits
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none"))
    return torch.cat(losses).cpu()


def matmul(side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A product of two bf16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def timed(what: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    start = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def roofline_table(roofline: Roofline, setting: Setting) -> Table:
    title = f"a reference of {roofline.parameters / 1e6:.1f} M parameters, samples of {setting.seq_len} tokens"
    result = Table("", "tokens/s", "TFLOP/s", "of the product", title=title)
    for name, tokens, flops in (
        ("raw_statistics", f"{roofline.scoring_tokens:,.0f}", roofline.scoring),
        ("plain loop", f"{roofline.plain_tokens:,.0f}", roofline.plain),
        (f"bf16 product of {setting.matrix}", "", roofline.matmul),
    ):
        result.add_row(name, tokens, f"{flops / 1e12:.3f}", f"{flops / roofline.matmul:.2f}")
    return result


if __name__ == "__main__":
    sys.exit(main())
