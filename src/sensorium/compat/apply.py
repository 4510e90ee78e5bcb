"""vLLM's names that were given, turned into options of ours."""

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
    """Options of ours that follow, and what is to be told of names that do nothing."""

    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def adopt(
    given: Mapping[str, Any],
    rules: Mapping[str, Rule],
    spelled: Callable[[str], str] = lambda name: name,
) -> Adopted:
    """Apply the rules of the names in ``given``; each must have one.

    spelled: how a name is written in messages. Raises ConfigError for what is not supported.
    """
    adopted, idle = Adopted(), dict[str, list[str]]()
    for name, value in given.items():
        rule = rules[name]
        if rule.effect is Effect.NOTHING and value is not None:
            idle.setdefault(rule.why, []).append(spelled(name))
        elif rule.passes(value):
            continue
        elif rule.convert is not None:
            _add(adopted.options, _converted(rule, value, spelled(name)))
        else:
            shown = "" if value is True or name in _SECRET else f" {_shown(value)}"
            raise ConfigError(
                f"{spelled(name)}{shown} is not supported here: {rule.why}.", param=name
            )
    for why, names in idle.items():
        verb = "does" if len(names) == 1 else "do"
        adopted.notes.append(f"{', '.join(names)} {verb} nothing here: {why}.")
    return adopted


def _converted(rule: Rule, value: Any, spelled: str) -> Mapping[str, Any]:
    assert rule.convert is not None
    try:
        return rule.convert(plain(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{spelled} has a value that is none: {_shown(value)}.") from error


def _add(options: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add options; mappings (``hf_overrides``) of several names are put together."""
    for name, value in more.items():
        before = options.get(name)
        options[name] = {**before, **value} if isinstance(before, dict) else value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
