"""Rows of the tables: one of vLLM's names and its effect in Sensorium."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Takes = Literal["switch", "text", "texts", "json", "optional"]
"""Value of a flag: none, one, several, JSON, or an optional one."""

Convert = Callable[[Any], Mapping[str, Any]]


class Effect(enum.Enum):
    """Effect of one of vLLM's names."""

    SAME = "has the same effect"
    IGNORED = "no effect"
    REFUSED = "not supported"


@dataclass(frozen=True, slots=True)
class Rule:
    """Treatment of one of vLLM's names.

    ``default``: vLLM's value, which is accepted silently in any case, as are values for which
    ``harmless`` returns true. ``convert`` returns Sensorium's options for a value, where there are
    any; ``to`` names them in the documentation.
    """

    name: str
    effect: Effect
    why: str
    default: Any = None
    takes: Takes = "text"
    to: str = ""
    convert: Convert | None = None
    harmless: Callable[[Any], bool] = lambda value: False

    def passes(self, value: Any) -> bool:
        """Return true for null and for values that ask for the behaviour there is anyway."""
        value = plain(value)
        return value is None or value == self.default or self.harmless(value)


def same(name: str, to: str, convert: Convert, why: str, *, takes: Takes = "text") -> Rule:
    """Return the rule of a name that sets Sensorium's options."""
    return Rule(name, Effect.SAME, why, takes=takes, to=to, convert=convert)


def ignored(why: str, **defaults: Any) -> list[Rule]:
    """Return rules of names that are accepted without effect, with vLLM's defaults."""
    return [Rule(n, Effect.IGNORED, why, d, takes_of(d)) for n, d in defaults.items()]


def refused(
    why: str, *, harmless: Callable[[Any], bool] = lambda value: False, **defaults: Any
) -> list[Rule]:
    """Return rules of names that are refused unless they have a default or harmless value."""
    return [
        Rule(n, Effect.REFUSED, why, d, takes_of(d), harmless=harmless) for n, d in defaults.items()
    ]


def takes_of(default: Any) -> Takes:
    """Return the kind of value of a flag with this default."""
    if isinstance(default, bool):
        return "switch"
    if isinstance(default, dict):
        return "json"
    return "texts" if isinstance(default, list) else "text"


def plain(value: Any) -> Any:
    """Return the value of a text on the command line: 1 of ``"1"``, None of ``"None"``."""
    if not isinstance(value, str):
        return value
    if value in ("None", "none", "null"):
        return None
    try:
        return json.loads(value)
    except ValueError:
        return value


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Return a function that is true for these values."""
    return lambda value: value in values
