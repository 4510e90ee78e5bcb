"""Translation of vLLM's options into Sensorium's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.compat.rule import Effect, Rule, plain
from sensorium.errors import ConfigError

_SECRET = frozenset({"hf_token"})
"""Names whose values are not repeated in messages."""


@dataclass(slots=True)
class Adopted:
    """Sensorium's options, and notes about vLLM's options that have no effect."""

    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def adopt(
    given: Mapping[str, Any],
    rules: Mapping[str, Rule],
    display: Callable[[str], str] = lambda name: name,
) -> Adopted:
    """Apply the rules of the names in ``given``; each must have one.

    ``display`` gives the form of a name in messages. Raises ConfigError for options that are not
    available.
    """
    adopted, idle = Adopted(), dict[str, list[str]]()
    for name, value in given.items():
        rule = rules[name]
        if rule.effect is Effect.IGNORED and value is not None:
            idle.setdefault(rule.why, []).append(display(name))
        elif rule.passes(value):
            continue
        elif rule.convert is not None:
            _add(adopted.options, _converted(rule, value, display(name)))
        else:
            shown = "" if value is True or name in _SECRET else f" {_abbreviate(value)}"
            raise ConfigError(f"{display(name)}{shown} is not supported: {rule.why}.", param=name)
    for why, names in idle.items():
        verb = "has" if len(names) == 1 else "have"
        adopted.notes.append(f"{', '.join(names)} {verb} no effect: {why}.")
    return adopted


def _converted(rule: Rule, value: Any, display: str) -> Mapping[str, Any]:
    assert rule.convert is not None
    try:
        return rule.convert(plain(value))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{display} has an invalid value: {_abbreviate(value)}.") from error


def _add(options: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add options; mappings such as ``hf_overrides`` are merged."""
    for name, value in more.items():
        before = options.get(name)
        options[name] = {**before, **value} if isinstance(before, dict) else value


def _abbreviate(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
