"""The reference of a job that selects: made of its data and cached, from a folder, or one that the service has.

Knows the client for that last case; nothing of how a run uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer_client.client import connect
from trainer_client.reference.config import COUNTED, SMALLEST, ReferenceConfig
from trainer_client.reference.train import make_reference
from trainer_client.run.compute import training_flops
from trainer_client.run.config import RunConfig
from trainer_client.run.data import Progress
from trainer_client.run.models import count_config_parameters
from trainer_client.run.task import Task
from trainer_client.run.tokenizer import Tokenizer, default_cache_dir, load_tokenizer
from weighting_contract.counted import MOST_TOKENS
from weighting_contract.errors import InvalidArgument, NotFound, WeighbridgeError
from weighting_contract.reference import check_reference, read_counts, reference_files, write_reference

logger = logging.getLogger(__name__)

AUTO = "auto"
_CACHE_FORMAT = 1  # part of the key: raise it when training or counting changes
_CONFIG = "config.json"  # a counted reference has none
_NEEDED = ("counts.safetensors", "tokenizer.json")  # of a reference that the service has


@dataclass(frozen=True)
class RunReference:
    """A reference as a job needs it."""

    name: str  # at the service
    checksum: str
    tokenizer_checksum: str  # of its tokenizer.json
    tokenizer: Tokenizer
    seq_len: int  # longest sample that it scores whole, in labels
    parameters: int  # 0: it is counted
    ngrams: np.ndarray  # [buckets] int64, of its pool
    files: dict[str, bytes] | None = None  # to give to the service; None: it has them
    trained_flops: float = 0.0  # where it was trained for the job

    def about(self) -> dict[str, Any]:
        """For summaries."""
        return {"name": self.name, "checksum": self.checksum, "parameters": self.parameters}


def given_reference(config: RunConfig) -> RunReference | None:
    """The reference that --reference names; None where it is to be made. A resumed run goes on with its own copy.

    Raises:
        InvalidArgument: a damaged folder, no such reference at the service, or one with another tokenizer than
            --tokenizer.
        WeighbridgeError: the service can't be asked.
    """
    copy = Path(config.out) / "reference"
    if config.resume and copy.is_dir():
        found = _of_files(reference_files(copy), trained=config.reference == AUTO)
    elif config.reference == AUTO:
        return None
    elif Path(config.reference).is_dir():
        found = _of_files(reference_files(config.reference))
    else:
        found = _of_service(config)
    if config.tokenizer and load_tokenizer(config.tokenizer).checksum != found.tokenizer.checksum:
        raise InvalidArgument(
            f"--tokenizer {config.tokenizer} is another tokenizer than that of --reference {config.reference}: their "
            "token ids mean different texts; leave --tokenizer out, or name a reference of it"
        )
    return found


def reference_recipe(task: Task) -> ReferenceConfig:
    """Of a reference that is made for a job that selects: counted, where the pool is small enough to be counted."""
    return ReferenceConfig(size=COUNTED if task.train.tokens.size <= MOST_TOKENS else SMALLEST)


def made_reference(
    config: RunConfig,
    task: Task,
    device: torch.device,
    progress: Progress | None,
    *,
    cache_dir: Path | None = None,
    recipe: ReferenceConfig | None = None,
) -> RunReference:
    """A reference of the job's training samples, from the cache where they met this recipe before.

    Args:
        cache_dir: None: that of tokenizers. A cache that can't be written is a warning, not an error; a damaged entry
            is made anew.
        recipe: size and training; None: `reference_recipe`.
    """
    settings = _settings(config, task, recipe)

    def train() -> dict[str, bytes]:
        return make_reference(
            task.train,
            task.tokenizer,
            settings,
            trained_on=f"{' '.join(config.data)}: {len(task.train):,} samples of {config.seq_len} tokens",
            command=settings.command(),
            device=device,
            progress=progress,
        ).files

    files = cached_or_trained(_cache_folder(task, settings, cache_dir), "reference", train)
    return _of_files(files, trained=True)


def cached_reference(
    config: RunConfig, task: Task, *, cache_dir: Path | None = None, recipe: ReferenceConfig | None = None
) -> RunReference | None:
    """What `made_reference` would find in the cache, None where it would make it."""
    files = cached_files(_cache_folder(task, _settings(config, task, recipe), cache_dir), "reference")
    return None if files is None else _of_files(files, trained=True)


def _settings(config: RunConfig, task: Task, recipe: ReferenceConfig | None) -> ReferenceConfig:
    recipe = recipe or reference_recipe(task)
    return replace(
        recipe,
        data=config.data,
        val=config.val,
        test=config.test,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=min(recipe.batch_size, len(task.train)),
    )


def _cache_folder(task: Task, settings: ReferenceConfig, cache_dir: Path | None) -> Path:
    names = ("size", "steps", "batch_size", "lr", "warmup_steps", "seed", "ngram_buckets")
    key = cache_key(settings, names, task.tokenizer.checksum, task.train.tokens)
    return (cache_dir or default_cache_dir()) / f"reference-{key}"


def _of_files(files: dict[str, bytes], trained: bool = False) -> RunReference:
    """A reference that is given to the service; `trained`: for jobs like this one, in batches of the default size."""
    info = check_reference(files, "the reference")
    parameters = _parameters(files)
    return RunReference(
        name=f"run-{info.checksum[:16]}",
        checksum=info.checksum,
        tokenizer_checksum=info.tokenizer_checksum,
        tokenizer=_tokenizer(files["tokenizer.json"], "the reference"),
        seq_len=info.seq_len,
        parameters=parameters,
        ngrams=read_counts(files).ngrams,
        files=files,
        trained_flops=training_flops(parameters, info.steps * ReferenceConfig.batch_size * info.seq_len) * trained,
    )


def _of_service(config: RunConfig) -> RunReference:
    what = f"--reference {config.reference}"
    try:
        with connect(config.weighter, **config.credentials) as client:
            found = client.get_reference(config.reference, (_CONFIG, *_NEEDED))
    except NotFound as exc:
        raise InvalidArgument(f"{what} is neither a folder nor known to the service: {exc.message}") from exc
    except WeighbridgeError as exc:
        exc.message = f"{what} is no folder, and the service {config.weighter} can't be asked for it: {exc.message}"
        exc.args = (exc.message,)
        raise
    files = dict(found.files)
    where = f"{what}, as the service {config.weighter} has it"
    if missing := [name for name in _NEEDED if name not in files]:
        raise InvalidArgument(f"{where}, lacks {missing[0]}: it can't be used")
    if hashlib.sha256(files["tokenizer.json"]).hexdigest() != found.tokenizer_checksum:
        raise InvalidArgument(f"{where}, has a tokenizer.json of another checksum than it says: it can't be used")
    try:
        counts = read_counts(files)
    except Exception as exc:  # of safetensors, for bytes that are none
        raise InvalidArgument(f"{where}, has counts that can't be read ({exc}): it can't be used") from exc
    return RunReference(
        name=config.reference,
        checksum=found.checksum,
        tokenizer_checksum=found.tokenizer_checksum,
        tokenizer=_tokenizer(files["tokenizer.json"], where),
        seq_len=found.seq_len,
        parameters=_parameters(files),
        ngrams=counts.ngrams,
    )


def _parameters(files: Mapping[str, bytes]) -> int:
    return count_config_parameters(files[_CONFIG]) if _CONFIG in files else 0


def _tokenizer(content: bytes, where: str) -> Tokenizer:
    try:
        return Tokenizer.from_json(content.decode())
    except ValueError as exc:
        raise InvalidArgument(f"{where}: tokenizer.json can't be read: {exc}") from exc


def cache_key(recipe: ReferenceConfig, names: Sequence[str], checksum: str, tokens: np.ndarray) -> str:
    """Of everything that decides a model that is trained here.

    Args:
        names: of the recipe's settings that have a say.
        checksum: of what it starts from, or reads its samples by.
        tokens: its samples.
    """
    values = {name: value for name, value in asdict(recipe).items() if name in names}
    about = f"{_CACHE_FORMAT}:{json.dumps(values, sort_keys=True)}:{checksum}:{tokens.dtype.str}:{tokens.shape}:"
    digest = hashlib.sha256(about.encode())
    digest.update(np.ascontiguousarray(tokens).tobytes())
    return digest.hexdigest()[:32]


def cached_files(folder: Path, what: str) -> dict[str, bytes] | None:
    """The files of a model in the cache; None where it is not there, or damaged, which is said."""
    if not folder.exists():
        return None
    try:
        return reference_files(folder)
    except InvalidArgument as exc:
        logger.warning("the cached %s is damaged (%s); it is made again", what, exc)
        return None


def cached_or_trained(folder: Path, what: str, train: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """The files of a model in the cache, else of one that is trained and cached; where it can't be, that is said."""
    files = cached_files(folder, what)
    if files is None:
        files = train()
        try:
            write_reference(folder, files, replace=True)
        except (OSError, WeighbridgeError) as exc:
            logger.warning("the %s could not be cached in %s (%s); the next run makes it again", what, folder, exc)
    return files
