"""The corpora by name, as flags of `run` that name their files. `books` and `wiki` need a folder of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import mixtures
from benchmarks.mixtures import Mixture

BUILTIN = "builtin"
NEED_TEXTS = ("books", "wiki")
_MADE: dict[str, Callable[[], Mixture]] = {
    "clean": mixtures.clean_mixture,
    "look-alikes": mixtures.look_alikes_mixture,
    "two-targets": mixtures.two_targets_mixture,
    "pip": lambda: mixtures.pip_mixtures()["prose"],
}


def data_flags(name: str, folder: Path, texts: Path | None) -> tuple[str, ...]:
    """The flags that name a corpus's files, which are written into `folder` if they are not there; none for built-in.

    Raises SystemExit where there is no corpus of this name, or none without a folder of texts.
    """
    if name == BUILTIN:
        return ()
    if name in NEED_TEXTS:
        if texts is None:
            raise SystemExit(f"corpus {name!r} needs --texts, a folder of books, wiki and web texts")
        make: Callable[[], Mixture] = partial(mixtures.text_mixture, name, texts)
    elif name in _MADE:
        make = _MADE[name]
    else:
        raise SystemExit(f"there is no corpus {name!r}, expected one of {', '.join((BUILTIN, *NEED_TEXTS, *_MADE))}")
    files = {
        flag: folder / name / f"{split}.jsonl"
        for flag, split in (("--data", "pool"), ("--val", "val"), ("--test", "test"))
    }
    if not all(path.is_file() for path in files.values()):
        make().write(folder / name)
    return tuple(part for flag, path in files.items() for part in (flag, str(path)))
