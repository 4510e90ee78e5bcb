"""One row of a table: a name of vLLM's, and what becomes of it here."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Takes = Literal["switch", "text", "texts", "json", "optional"]
"""What follows a flag: nothing, a value, several, JSON, or a value that may be left out."""

Convert = Callable[[Any], Mapping[str, Any]]


class Effect(enum.Enum):
    """What a name of vLLM's does here."""

    SAME = "does the same"
    NOTHING = "does nothing here"
    REFUSED = "not supported"


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a name.

    default: vLLM's value, which passes in silence whatever the effect is. harmless: tells further values that pass.
    convert: our options out of a value, for those that do the same; ``to`` names them for the page.
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
        """Return true for null and the values that ask for what is done here anyway."""
        value = plain(value)
        return value is None or value == self.default or self.harmless(value)


def same(name: str, to: str, convert: Convert, why: str, *, takes: Takes = "text") -> Rule:
    """A name whose value sets options of ours."""
    return Rule(name, Effect.SAME, why, takes=takes, to=to, convert=convert)


def nothing(why: str, **defaults: Any) -> list[Rule]:
    """Names that are accepted without effect, with vLLM's defaults."""
    return [Rule(n, Effect.NOTHING, why, d, takes_of(d)) for n, d in defaults.items()]


def refused(
    why: str, *, harmless: Callable[[Any], bool] = lambda value: False, **defaults: Any
) -> list[Rule]:
    """Names that are refused unless they have vLLM's default, or a value that is harmless."""
    return [
        Rule(n, Effect.REFUSED, why, d, takes_of(d), harmless=harmless) for n, d in defaults.items()
    ]


def takes_of(default: Any) -> Takes:
    """Return what follows the flag of an option with this default."""
    if isinstance(default, bool):
        return "switch"
    if isinstance(default, dict):
        return "json"
    return "texts" if isinstance(default, list) else "text"


def plain(value: Any) -> Any:
    """Return the value that a text on the command line stands for: ``1`` of ``"1"``, None of ``"None"``."""
    if not isinstance(value, str):
        return value
    if value in ("None", "none", "null"):
        return None
    try:
        return json.loads(value)
    except ValueError:
        return value


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Return a test for these values."""
    return lambda value: value in values
