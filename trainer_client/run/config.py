"""What one run is: a frozen, checked `RunConfig`, and the command line that mirrors it field by field.

Knows nothing of torch, files of a run or the service. Every flag is a field; its help text is the field's metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import secrets
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer_client.cadence import Cadence, usual_cadence
from trainer_client.flags import add_flags, check_fields, credential_arguments, flag, given_flags, setting
from trainer_client.run.config_file import read_settings
from trainer_client.run.methods.names import JUDGED
from trainer_client.run.variants import LABELS, METHODS, MODES, ROLES, Variant, label_of, variant_of
from trainer_client.select.choice import WARM_UP
from trainer_client.select.seen import TIMES_TO_WEAR
from trainer_client.transports import check_url
from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import check_name

HYPERGRADIENTS = ("finite_difference", "jvp", "exact")
SCHEDULES = ("online", "staged")
PARALLEL = ("auto", "ddp", "fsdp2")
PRECISIONS = ("float32", "bf16")
LR_SCHEDULES = ("constant", "cosine")  # constant: the loss at a step does not depend on how many are to come


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run; the defaults are the demo's. Names carry their units; steps are optimiser steps."""

    data: tuple[str, ...] = setting(
        ("builtin",), "training documents: builtin, files (.txt .jsonl .jsonl.gz .parquet), or a `datasets` name"
    )
    val: tuple[str, ...] = setting(
        (), "validation documents, the target that weights are learned for; same forms (default: the built-in ones)"
    )
    test: tuple[str, ...] = setting(
        (), "test documents, only ever evaluated; same forms (default: half of the validation documents)"
    )
    group_by: str = setting(
        "source", "field of the documents that takes the place of their source, for metrics, reports and the oracle"
    )
    model: str = setting("nano", "size preset, or the name or folder of a transformers causal LM")
    tokenizer: str = setting("", "folder or tokenizer.json of a tokenizer (default: train a byte-pair one on the data)")
    vocab_size: int = setting(1024, "entries of a tokenizer that is trained here", least=1)

    method: str = setting(
        "dwm",
        "dwm: a learned weighter; uniform: none; dsir: fixed n-gram likeness; "
        + "; ".join(f"{name}: {judged.about}" for name, judged in JUDGED.items()),
        METHODS,
    )
    mode: str = setting("select", "choose the batch from candidates, weight the samples inside it, or both", MODES)
    compare: tuple[str, ...] = setting(
        (), f"also run these from the same seed and data order: {', '.join(LABELS)}", LABELS
    )
    steps: int = setting(600, "optimiser steps", least=1)
    batch_size: int = setting(32, "samples a step", least=1)
    seq_len: int = setting(64, "tokens a sample", least=1)
    lr: float = setting(2e-3, "peak learning rate of AdamW")
    warmup_steps: int = setting(20, "steps of linear warm-up of the learning rate", least=0)
    lr_schedule: str = setting("constant", "after the warm-up: constant, or a cosine to a tenth", LR_SCHEDULES)
    seed: int = setting(0, "of parameters, data order and validation draws", least=0, most=2**32 - 1)

    parallel: str = setting(
        "auto", "over the ranks of torchrun: ddp, fsdp2, or auto (ddp where there are several ranks)", PARALLEL
    )
    accumulate: int = setting(1, "micro-batches that a rank takes its part of a batch in", least=1)
    precision: str = setting("float32", "of forward passes; bf16: by autocast, parameters stay float32", PRECISIONS)
    compile: bool = setting(False, "compile the model's blocks with torch.compile")
    recompute: bool = setting(False, "recompute the activations of the model's blocks in the backward pass")

    weighter: str = setting("embedded", "embedded, embedded:///STATE, grpc(s)://HOST:PORT or http(s)://HOST:PORT")
    token_file: str = setting("", "file of the service's token (default: the token in WEIGHBRIDGE_TOKEN, or none)")
    ca: str = setting(
        "", "PEM file of the CA of the service's certificate (default: WEIGHBRIDGE_CA, or the usual ones)"
    )
    cert: str = setting("", "PEM file of a certificate of one's own (default: WEIGHBRIDGE_CERT, or none)")
    key: str = setting("", "PEM file of its key (default: WEIGHBRIDGE_KEY)")
    insecure_token: bool = setting(False, "send the token unencrypted to another machine, where the network is trusted")
    weighter_name: str = setting("default", "name of the weighter; it is created where it does not exist")
    weighter_from: str = setting(
        "pretaught", "what the weighter starts from: pretaught, none (fresh), or the folder of an exported weighter"
    )
    role: str = setting(
        "learn", "learn: it is taught by this run; frozen: it scores, and is sent what its trust is earned by", ROLES
    )
    candidates: int = setting(5, "selection: candidates a place in the batch", least=1)
    probes: int = setting(
        4,
        "selection: samples of a taught batch that are drawn evenly; with two or more it counts for the trust",
        least=0,
    )
    ahead: int = setting(2, "selection: steps that candidates are scored ahead of training", least=0)
    select_min_share: float = setting(0.1, "selection: least effective share of the candidates")
    wear: float = setting(
        TIMES_TO_WEAR,
        "selection: times trained on, beyond twice the usual, that divide a content's weight by e (0: never)",
        least=0,
    )
    select_warmup: int = setting(
        -1,
        "selection: first steps, in which a falling share of each batch is drawn evenly (-1: 100, for other methods "
        "than dwm none; the oracle never has any)",
        least=-1,
    )
    reference: str = setting(
        "auto", "selection: auto (made of the data, cached), a reference's folder, or its name at the service"
    )
    profile: str = setting("", "selection: file of a target profile (default: made of the validation documents)")
    judge_temperature: float = setting(
        0.5, "methods other than dwm: divides their standardised logits; 0: the highest ones take all", least=0
    )
    oracle_source: tuple[str, ...] = setting(
        (), "oracle: the target's sources (default: those of the validation documents, or the nearest by n-grams)"
    )
    on_failure: str = setting("uniform", "without an answer: uniform weights, or stop", ("uniform", "raise"))
    deadline: float = setting(
        0.0, "longest that a step waits for the service, seconds (0: 1 second, for an embedded one 60)", least=0
    )
    on_older_service: str = setting(
        "resend",
        "a service restored from before this run's last updates: send them again, go on without, or stop teaching",
        ("resend", "continue", "stop"),
    )
    hypergradient: str = setting("finite_difference", "how the cotangent is computed", HYPERGRADIENTS)
    meta_every: int = setting(
        0,
        "steps between meta-updates (0: 10, or 50 for a frozen weighter and, with --mode select, one taught before)",
        least=0,
    )
    meta_first: int = setting(
        -1,
        "first steps, which have a meta-update each (-1: 100 where a fresh weighter chooses, and with --mode both; 32 "
        "where one chooses that is frozen or was taught before; inside the batch none, of a frozen one every tenth of "
        "300)",
        least=-1,
    )
    meta_batch: int = setting(12, "samples of the batch that a meta-update carries")
    val_batch: int = setting(4, "validation samples behind a cotangent", least=1)
    schedule: str = setting("online", "teach during training, or between stages of pinned weights", SCHEDULES)
    stages: int = setting(5, "stages of the staged schedule", least=1)
    stage_updates: int = setting(30, "meta-updates between two stages", least=1)

    out: str = setting("", "folder for everything that the run writes (default: runs/ and a name of its own)")
    resume: bool = setting(False, "continue the run in --out; its own settings are used where no flag is given")
    overwrite: bool = setting(False, "replace a run that is already in --out")
    checkpoint_every: int = setting(100, "steps between checkpoints", least=1)
    eval_every: int = setting(25, "steps between evaluations", least=1)
    eval_samples: int = setting(128, "samples of a split that an evaluation takes; the last one takes all", least=1)
    replay_weights: str = setting(
        "",
        "train with the samples and weights that the run in this folder had, without a service; its settings are "
        "used where no flag is given",
    )
    wandb: str = setting("", "project of Weights & Biases that metrics go to, too")
    eval_tasks: tuple[str, ...] = setting((), "tasks of lm-evaluation-harness that the trained models are evaluated on")
    eval_include: tuple[str, ...] = setting((), "folders with task files (.yaml) for --eval-tasks")
    dry_run: bool = setting(False, "say what would happen, and train nothing")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    threads: int = setting(
        1, "CPU threads of torch, 1 is fastest for the small presets; 0: torch's own choice", least=0
    )

    def check(self) -> RunConfig:
        """This config. Raises InvalidArgument, naming the flag, where a value is out of range or two contradict."""
        check_fields(self)
        if not 0 < self.lr <= 1:
            raise InvalidArgument(f"--lr is {self.lr}, expected more than 0 and at most 1")
        self._check_variants()
        if self.schedule == "staged" and self.stages > self.steps:
            raise InvalidArgument(f"--stages is {self.stages}, expected at most --steps ({self.steps})")
        if self.resume and self.overwrite:
            raise InvalidArgument("--resume and --overwrite exclude each other: continue the run, or replace it")
        if self.eval_include and not self.eval_tasks:
            raise InvalidArgument("--eval-include without --eval-tasks: name the tasks of those files to evaluate")
        if not self.group_by or self.group_by == "text":
            raise InvalidArgument(f"--group-by is {self.group_by!r}, expected a field of the documents beside text")
        if not self.out:
            raise InvalidArgument("--out is empty, expected a folder for what the run writes")
        if self.data != ("builtin",) and not self.val:
            raise InvalidArgument(
                "--data without --val: name validation documents, they are what weights are learned for"
            )
        self._check_weighter()
        return self

    def _check_variants(self) -> None:
        for i, label in enumerate(self.compare):
            if label == self.main.label or label in self.compare[:i]:
                raise InvalidArgument(f"--compare {label} is there already: this job's runs must differ")
        learned = [v for v in self.variants if v.learned]
        if not 2 <= self.meta_batch <= self.batch_size and learned:
            raise InvalidArgument(
                f"--meta-batch is {self.meta_batch}, expected from 2 to --batch-size ({self.batch_size}): "
                "a meta-update carries samples of the step's batch"
            )
        for variant in learned:
            if self.schedule == "staged" and variant.mode != "weight":
                raise InvalidArgument(
                    f"--schedule staged goes with --mode weight only, but the run {variant.label!r} selects"
                )
        if self.main.learned and self.main.mode == "both" and self.role == "frozen":
            raise InvalidArgument(
                "--role frozen goes with --mode select or weight, not with both: the second weighter of both starts "
                "fresh, and would stay uniform"
            )
        self._check_selection(any(v.selects for v in learned))
        self._check_judged()

    def _check_selection(self, selects: bool) -> None:
        if not 0 <= self.select_min_share <= 1:
            raise InvalidArgument(f"--select-min-share is {self.select_min_share}, expected from 0 to 1")
        if not math.isfinite(self.wear):
            raise InvalidArgument(f"--wear is {self.wear}, expected a finite number of times")
        if selects and self.probes > self.batch_size:
            raise InvalidArgument(f"--probes is {self.probes}, expected at most --batch-size ({self.batch_size})")
        if not self.reference:
            raise InvalidArgument("--reference is empty, expected auto, a folder, or a name at the service")
        if self.profile and not selects:
            raise InvalidArgument("--profile is for runs that select, and none of this job's does: leave it out")

    def _check_judged(self) -> None:
        if self.main.judged and (self.mode == "both" or not (JUDGED[self.method].weighs or self.mode == "select")):
            can = "--mode select or weight" if JUDGED[self.method].weighs else "--mode select"
            raise InvalidArgument(f"--mode is {self.mode}, but --method {self.method} goes with {can} only")
        if not math.isfinite(self.judge_temperature):
            raise InvalidArgument(f"--judge-temperature is {self.judge_temperature}, expected a finite number")
        if self.oracle_source and not any(v.method == "oracle" for v in self.variants):
            raise InvalidArgument("--oracle-source is for the method oracle, which none of this job's runs is of")

    def _check_weighter(self) -> None:
        if not math.isfinite(self.deadline):
            raise InvalidArgument(f"--deadline is {self.deadline}, expected a finite number of seconds")
        try:
            check_url(self.weighter)
        except InvalidArgument as exc:
            raise InvalidArgument(f"--weighter: {exc.message}") from exc
        if not self.weighter_from:
            raise InvalidArgument(
                "--weighter-from is empty, expected pretaught, none, or the folder of an exported weighter"
            )
        check_name(self.weighter_name, "--weighter-name")
        for variant in self.variants:  # the longest names are made of it
            if variant.learned:
                check_name(variant.inner_weighter, f"--weighter-name, with what the run {variant.label!r} adds,")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without what only concerns the start (resume, overwrite, dry run)."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _OF_THE_START}

    @property
    def credentials(self) -> dict[str, Any]:
        """What `connect` shows the service; what is not given may be in the environment."""
        return credential_arguments(self)

    def cadence(self, variant: Variant) -> Cadence:
        """The steps in which the weighter of a variant is taught, or its trust is earned."""
        usual = usual_cadence(
            chooses=variant.selects,
            frozen=variant.role == "frozen",
            taught_before=not variant.weighs and (variant.pretaught or variant.from_export),  # of both, one is fresh
        )
        if self.meta_first >= 0:
            usual = replace(usual, first=self.meta_first, first_every=1)
        if self.meta_every:
            usual = replace(usual, every=self.meta_every, first_every=min(usual.first_every, self.meta_every))
        return usual

    def warm_up_of(self, method: str) -> int:
        """First steps of a run of that method in which a part of a chosen batch is drawn evenly all the same."""
        if self.select_warmup < 0:
            return WARM_UP if method == "dwm" else 0
        return self.select_warmup

    @property
    def main(self) -> Variant:
        """What the job is about; its weighter is exported."""
        label = label_of(self.method, self.mode, self.weighter_from)
        return variant_of(label, self.weighter_name, self.role, self.weighter_from)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All runs of the job, the main one first; those that it is compared with have weighters of their own."""
        return (self.main, *(variant_of(label, f"{self.weighter_name}-{label}") for label in self.compare))


# May differ between the two halves of a resumed run. Device and threads may not: sums would round differently.
_CREDENTIALS = ("token_file", "ca", "cert", "key", "insecure_token")
_OF_THE_START = ("resume", "overwrite", "dry_run")
_ADDED = ("wandb", "eval_tasks", "eval_include")  # to a run, without a say in it
_FREE_ON_RESUME = (
    *("out", "checkpoint_every", "weighter", "on_failure", "deadline", "on_older_service"),
    *("parallel", "accumulate", "compile", "recompute"),  # sums round differently: equal to 1e-5, not to the bit
    *(*_CREDENTIALS, *_OF_THE_START, *_ADDED),
)
# A replay is another job: it has its own folder and company. What its records depend on is as it was.
_OWN_OF_REPLAY = ("out", "replay_weights", "compare", *_ADDED)
_FIXED_BY_RECORDS = ("seed", "batch_size", "seq_len", "candidates")


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """The checked config of a command line (None: the process's own).

    Flags win over the file of --config. Without --out the run gets a new folder. With --resume the settings of the run
    in --out, with --replay-weights those of the run there, stand in for what is not given. Raises InvalidArgument where
    that contradicts them; argparse's own errors exit with code 2.
    """
    given = given_flags(_parser(), arguments)
    file = given.pop("config", None)
    if file is not None:
        given = {**read_settings(Path(file), typing.get_type_hints(RunConfig)), **given}
    if given.get("resume"):
        given = _over_saved(given)
    elif given.get("replay_weights"):
        given = _over_replayed(given)
    given.setdefault("out", _new_folder())
    return RunConfig(**given).check()


def _new_folder() -> str:
    """Runs may start in the same second, and in containers, where they have the same process id."""
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer_client.run",
        description="Pretrain a small causal language model with learned data weights, and teach the weighter.",
        argument_default=argparse.SUPPRESS,  # so that a flag that is given can be told from a default
    )
    parser.add_argument("--config", help="file of settings, YAML or JSON, by the names of these flags; flags win")
    add_flags(parser, RunConfig)
    return parser


def _over_saved(given: dict[str, Any]) -> dict[str, Any]:
    """`given` flags over the saved settings of the run in its --out folder."""
    if not given.get("out"):
        raise InvalidArgument("--resume without --out: name the folder of the run to continue")
    path = Path(given["out"]) / "config.json"
    if not path.is_file():
        raise InvalidArgument(f"--resume: {path.parent} holds no run to continue ({path.name} is missing)")
    saved = load(path).to_dict()
    for name, value in given.items():
        if name not in _FREE_ON_RESUME and value != saved[name]:
            raise InvalidArgument(
                f"{flag(name)} is {_shown(value)}, but the run in {path.parent} was started with "
                f"{_shown(saved[name])}; "
                "leave the flag out to continue it, or start a new run in another --out"
            )
    return {**saved, **given}


def _over_replayed(given: dict[str, Any]) -> dict[str, Any]:
    """`given` settings over those of the run whose records are replayed."""
    root = Path(given["replay_weights"])
    if not (root / "config.json").is_file():
        raise InvalidArgument(f"--replay-weights: {root} holds no run to replay (config.json is missing)")
    if given.get("out") and Path(given["out"]).resolve() == root.resolve():
        raise InvalidArgument(f"--out is {root}, whose records --replay-weights replays: name another folder")
    saved = load(root / "config.json").to_dict()
    for name in _FIXED_BY_RECORDS:
        if given.get(name, saved[name]) != saved[name]:
            raise InvalidArgument(
                f"{flag(name)} is {given[name]}, but the records of the run in {root} are of {saved[name]}: leave the "
                "flag out, or replay another run"
            )
    return {**{name: value for name, value in saved.items() if name not in _OWN_OF_REPLAY}, **given}


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "nothing"


def load(path: Path) -> RunConfig:
    """The config in a run's config.json. Raises InvalidArgument where the file is not one."""
    try:
        values: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        config = RunConfig(**fields)
        missing = sorted(set(config.to_dict()) - set(fields))
    except (ValueError, KeyError, TypeError) as exc:
        raise InvalidArgument(f"{path} is not the settings of a run: {exc}") from exc
    if missing:
        raise InvalidArgument(
            f"{path} is the config.json of an earlier version, whose runs can't be continued (it lacks "
            f"{', '.join(missing)}): start the run anew in another --out, or with --overwrite"
        )
    for name, hint in typing.get_type_hints(RunConfig).items():
        value = getattr(config, name)
        if not _is_of(value, hint):
            kind = hint.__name__ if isinstance(hint, type) else "a list of strings"
            raise InvalidArgument(f"{path} is damaged: {name} is {value!r}, expected {kind}")
    return config


def _is_of(value: Any, hint: Any) -> bool:
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str):
        return type(value) is hint  # a bool is no int here
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
