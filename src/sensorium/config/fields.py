"""Fields with a help text and a range, and the checks that all classes share."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import field
from typing import Any, NoReturn

from sensorium.bounds import Bounds, wrong_number
from sensorium.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


def option(
    default: Any,
    help: str,
    *,
    factory: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """Return a configuration field with its help text and, for a number, its range.

    Args:
        default: the default, or with ``factory`` what makes it.
        help: one or two sentences for ``--help`` and the documentation.
        factory: ``default`` is called for each instance.
        ge: least value.
        gt: the value must be greater.
        le: greatest value.
    """
    metadata = {"help": help, "bounds": Bounds(ge=ge, gt=gt, le=le)}
    if factory:
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def suggestion(name: str, known: list[str]) -> str:
    """Return "Did you mean 'x'?" for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def bad(name: str, what: str) -> NoReturn:
    """Raise ConfigError for a field."""
    raise ConfigError(f"{name} {what}.", param=name)


def check_fields(config: Any) -> None:
    """Check the types of all fields, and the ranges of numbers; a list becomes a tuple.

    Raises:
        ConfigError: a value has another type than its field, or is out of its range.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "bool" and not isinstance(value, bool):
            bad(f.name, f"must be true or false, got {value!r}")
        if f.type == "bool | None" and not isinstance(value, bool | None):
            bad(f.name, f"must be true, false or left out, got {value!r}")
        is_text = isinstance(value, str) or (value is None and f.type == "str | None")
        if f.type in ("str", "str | None") and not is_text:
            bad(f.name, f"must be a string, got {value!r}")
        if f.type == "tuple[str, ...]":
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                bad(f.name, f"must be a list of strings, got {value!r}")
            object.__setattr__(config, f.name, tuple(value))
        if str(f.type).startswith("dict") and not isinstance(value, dict):
            bad(f.name, f"must be a mapping, got {value!r}")
    wrong = wrong_number(config)
    if wrong is not None:
        bad(*wrong)


def check_number(name: str, value: object, bounds: Bounds, kind: type = int) -> None:
    """Raise ConfigError unless the value is a number of a kind within its bounds."""
    problem = bounds.problem(value, kind)
    if problem is not None:
        bad(name, problem)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of the choices."""
    if value not in choices:
        bad(name, f"must be one of {', '.join(choices)}, got {value!r}")


def check_non_empty(name: str, value: object) -> None:
    """Raise ConfigError unless the value is a non-empty string."""
    if not isinstance(value, str) or not value:
        bad(name, f"must be a non-empty string, got {value!r}")
