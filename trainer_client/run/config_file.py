"""Settings of a run from a file: a YAML mapping (JSON is YAML too) whose keys are the names of the flags.

Knows names and kinds of settings only, not what they mean.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from weighting_contract.errors import InvalidArgument

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_MANY = "a string or a list of strings"
_EXPONENT = re.compile(r"[-+]?[\d.]+e[-+]?\d+", re.IGNORECASE)  # 2e-3: to YAML 1.1 a string, as it has no point
_SHOWN = 60  # characters of a value in a message


def read_settings(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file, by field; strings where many are possible become tuples.

    Args:
        hints: type of every setting that there is: bool, int, float, str, or a tuple of strings.

    Raises:
        InvalidArgument: no such file, not YAML, not a mapping, a key that is no setting or there twice, or a value of
            the wrong kind.
    """
    where = f"--config {path}"
    text = _text(path, where)
    try:
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), where)
        values = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise InvalidArgument(f"{where} is not YAML: {_reason(exc)}") from exc
    except RecursionError as exc:
        raise InvalidArgument(f"{where} is not a mapping of settings: it is nested too deeply") from exc
    return {_field(key, hints, where): _value(key, given, hints, where) for key, given in values.items()}


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as exc:
        raise InvalidArgument(f"{where} can't be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{where} is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc


def _reason(exc: yaml.YAMLError) -> str:
    mark = getattr(exc, "problem_mark", None)
    if mark is None:
        return " ".join(str(exc).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {exc.problem}"


def _check_keys(node: Any, where: str) -> None:
    """A later key silently replaces an earlier one when YAML is loaded, so they are looked for before that."""
    if not isinstance(node, yaml.MappingNode):
        raise InvalidArgument(f"{where} is not a mapping: expected lines such as `batch_size: 32`")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = _name(key.value), key.start_mark.line + 1
        if name in lines:
            raise InvalidArgument(f"{where} has {key.value} twice, in lines {lines[name]} and {line}: leave one out")
        lines[name] = line


def _name(key: Any) -> str:
    return str(key).removeprefix("--").replace("-", "_")


def _field(key: Any, hints: Mapping[str, Any], where: str) -> str:
    name = _name(key)
    if name not in hints:
        nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
        raise InvalidArgument(f"{where}: {key} is not a setting, the nearest is {nearest}; --help lists them all")
    return name


def _value(key: Any, given: Any, hints: Mapping[str, Any], where: str) -> Any:
    hint = hints[_name(key)]
    if hint is float and isinstance(given, str) and _EXPONENT.fullmatch(given):
        return float(given)
    if hint is float and type(given) is int:
        return float(given)
    if hint in _KINDS:
        if type(given) is hint:
            return given
        quotes = "; put it in quotes" if hint is str and isinstance(given, int | float) else ""
        raise InvalidArgument(f"{where}: {key} is {_shown(given)}, expected {_KINDS[hint]}{quotes}")
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InvalidArgument(f"{where}: {key} is {_shown(given)}, expected {_MANY}")
    return tuple(items)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
