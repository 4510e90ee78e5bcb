"""Options in effect, and where each value comes from: flag, environment, file or default."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, NamedTuple

from sensorium.cli.flags import fields_of
from sensorium.config import ENGINE_SECTIONS, EngineConfig, ServerConfig
from sensorium.environment import API_KEYS, environment_options, log_level

DEFAULT = "default"
SECRET = "api_key"
"""Option whose value is never shown."""
_MOST_CHARACTERS = 200


class Option(NamedTuple):
    """Value of an option and its source, such as ``flag`` or ``file serve.yaml``."""

    value: Any
    source: str

    @property
    def text(self) -> str:
        """Return the value on one line, a long one cut."""
        text = json.dumps(self.value, ensure_ascii=False, default=str)
        cut = len(text) > _MOST_CHARACTERS
        return f"{text[:_MOST_CHARACTERS]}…" if cut else text


def in_effect(
    arguments: argparse.Namespace, engine: EngineConfig, server: ServerConfig
) -> dict[str, Option]:
    """Return all options by name.

    Args:
        arguments: as a ``Parser`` has parsed them.
        engine: made of the arguments.
        server: made of the arguments.
    """
    sections: list[Any] = [*(getattr(engine, section) for section in ENGINE_SECTIONS), server]
    found = {}
    for section in sections:
        for field, _ in fields_of(type(section)):
            value = _shown(field.name, getattr(section, field.name))
            found[field.name] = Option(value, _source(field.name, arguments))
    return found


def not_default(arguments: argparse.Namespace, engine: EngineConfig, server: ServerConfig) -> str:
    """Return the options that are set, on one line such as ``port=9000 (flag)``."""
    return ", ".join(
        f"{name}={option.text} ({option.source})"
        for name, option in in_effect(arguments, engine, server).items()
        if option.source != DEFAULT
    )


def _source(name: str, arguments: argparse.Namespace) -> str:
    given = vars(arguments)
    variables = environment_options()
    keys = [key for key in API_KEYS if os.environ.get(key)]
    if name == SECRET and keys:
        variables[name] = keys[0]
    if name in given and name not in arguments.from_file:
        return "flag"
    if name in variables:
        return f"environment {variables[name]}"
    return f"file {arguments.config_file}" if name in given else DEFAULT


def _shown(name: str, value: Any) -> Any:
    if name == SECRET:
        return f"{len(value)} set"
    if name == "log_level" and value is None:
        return log_level().lower()
    return list(value) if isinstance(value, tuple) else value
