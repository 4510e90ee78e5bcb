"""Fields with a help text, and the checks that all classes share."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import field
from typing import Any, NoReturn

from sensorium.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


def option(default: Any, help: str, *, factory: bool = False) -> Any:
    """A configuration field with its help text."""
    if factory:
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def suggestion(name: str, known: list[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def bad(name: str, what: str) -> NoReturn:
    """Raise ConfigError for a field."""
    raise ConfigError(f"{name} {what}.", param=name)


def check_types(config: Any) -> None:
    """Switches, texts and lists of texts must be just that; a list becomes a tuple. Numbers are checked elsewhere."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "bool" and not isinstance(value, bool):
            bad(f.name, f"must be true or false, got {value!r}")
        if f.type == "bool | None" and not isinstance(value, bool | None):
            bad(f.name, f"must be true, false or left out, got {value!r}")
        is_text = isinstance(value, str) or (value is None and f.type == "str | None")
        if f.type in ("str", "str | None") and not is_text:
            bad(f.name, f"must be a text, got {value!r}")
        if f.type == "tuple[str, ...]":
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                bad(f.name, f"must be a list of texts, got {value!r}")
            object.__setattr__(config, f.name, tuple(value))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of the choices."""
    if value not in choices:
        bad(name, f"must be one of {', '.join(choices)}, got {value!r}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise ConfigError unless the value is an integer within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        bad(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        bad(name, f"must be between {low} and {high}, got {value}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError unless the value is a number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        bad(name, f"must be a number, got {value!r}")
    if not low <= value <= high:
        bad(name, f"must be between {low:g} and {high:g}, got {value:g}")


def check_non_empty(name: str, value: object) -> None:
    """Raise ConfigError unless the value is a text with something in it."""
    if not isinstance(value, str) or not value:
        bad(name, f"must be a non-empty string, got {value!r}")
