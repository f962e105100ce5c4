"""Command lines that mirror frozen dataclasses field by field: a flag's help and bounds are its field's metadata.

Knows argparse and nothing of what the settings mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weighting_contract.errors import InvalidArgument


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    *,
    least: float | None = None,
    most: float | None = None,
    required: bool = False,
) -> Any:
    """A field that is a flag: a bool is a switch, a tuple takes several values."""
    metadata = {"help": help, "choices": tuple(choices), "least": least, "most": most, "required": required}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a field; a unit at the end of its name is left out."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, settings: type, metavars: Mapping[str, str] | None = None) -> None:
    """A flag for each field of a dataclass. The parser's own `argument_default` decides about those not given."""
    hints = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        text, hint = f.metadata["help"].replace("%", "%%"), hints[f.name]
        if hint is bool:
            parser.add_argument(flag(f.name), action="store_true", help=text)
            continue
        if "default" not in text and f.default not in ("", ()):
            text += f" (default: {' '.join(f.default) if isinstance(f.default, tuple) else f.default})"
        many: dict[str, Any] = {} if hint in (int, float, str) else {"nargs": "+"}
        parser.add_argument(
            flag(f.name),
            dest=f.name,
            type=hint if hint in (int, float) else str,
            choices=f.metadata["choices"] or None,
            required=f.metadata["required"],
            metavar=(metavars or {}).get(f.name),
            help=text,
            **many,
        )


def given_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What a command line (None: the process's own) sets, by field; argparse's own errors exit with code 2."""
    given = vars(parser.parse_args(arguments))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def check_fields(settings: Any) -> None:
    """Raises InvalidArgument, naming the flag, for a value that is missing, out of range or none of the choices."""
    for f in dataclasses.fields(settings):
        value, choices = getattr(settings, f.name), f.metadata["choices"]
        least, most = f.metadata["least"], f.metadata["most"]
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item not in choices and item != f.default:
                raise InvalidArgument(f"{flag(f.name)} is {item!r}, expected one of {', '.join(choices)}")
        if least is not None and not value >= least:
            raise InvalidArgument(f"{flag(f.name)} is {value}, expected {least} or more")
        if most is not None and not value <= most:
            raise InvalidArgument(f"{flag(f.name)} is {value}, expected at most {most}")
        if f.metadata["required"] and not value:
            raise InvalidArgument(f"{flag(f.name)} is missing: {f.metadata['help']}")


class ConnectionSettings(typing.Protocol):
    """What a command says of a service's credentials; an empty text: what the environment has."""

    @property
    def token_file(self) -> str: ...
    @property
    def ca(self) -> str: ...
    @property
    def cert(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def insecure_token(self) -> bool: ...


def credential_arguments(settings: ConnectionSettings) -> dict[str, Any]:
    """What `connect` shows the service; what is not given may be in the environment."""
    return {
        "token": Path(settings.token_file) if settings.token_file else None,
        "ca": settings.ca or None,
        "cert": settings.cert or None,
        "key": settings.key or None,
        "insecure_token": settings.insecure_token,
    }
