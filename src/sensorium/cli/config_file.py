"""Flags in a YAML file (``--config FILE``), and models with flags of their own (``models:``).

A flag on the command line wins over the environment, the environment over the file, and the file
over the default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.config import server_only_options, suggestion
from sensorium.environment import environment_options
from sensorium.errors import ConfigError

FLAG = "--config"
MODELS = "models"
"""Key of a list of models in a file for a server."""
MAX_FILE_CHARACTERS = 1 << 20
_ALIASES = {"--model-tag": "--model"}


@dataclass(frozen=True, slots=True)
class FlagFile:
    """A file of flags: its path, its flags as command-line arguments, and the flags it sets.

    ``models``: for each entry under ``models``, its flags and those of the top.
    """

    path: str
    arguments: tuple[str, ...]
    flags: frozenset[str]
    models: tuple[FlagFile, ...] = ()


def take_path(args: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without ``--config FILE``, and the file, None without that flag.

    Raises:
        ConfigError: the flag has no file, or is given twice.
    """
    places = [place for place, arg in enumerate(args) if arg == FLAG or arg.startswith(f"{FLAG}=")]
    if not places:
        return list(args), None
    place = places[0]
    _, joined, path = args[place].partition("=")
    end = place + (1 if joined else 2)
    path = path if joined else next(iter(args[place + 1 : end]), "")
    if not path or len(places) > 1:
        raise ConfigError(f"{FLAG} takes one YAML file of flags.")
    return [*args[:place], *args[end:]], path


def read(
    path: str,
    given: Collection[str],
    known: Mapping[str, argparse.Action],
    spelled: Callable[[str], str],
) -> FlagFile:
    """Read a file; flags that are ``given``, or set by the environment, are left out.

    Args:
        path: of the YAML file.
        given: flags on the command line, without ``--no-`` and values.
        known: flags of the command, with their actions.
        spelled: returns a flag as the parser has it.

    Raises:
        ConfigError: the file cannot be read, or a key is no flag of the command; the nearest one
            is named.
    """
    top = dict(read_flags(path))
    entries = _entries(path, top.pop(MODELS, None), "--model" in given or "model" in top)
    left_out = {*given, *(f"--{name.replace('_', '-')}" for name in environment_options())}
    arguments, flags = _arguments(path, top, known, spelled, left_out)
    models = []
    for number, entry in enumerate(entries):
        _check_entry(path, number, entry, spelled)
        own, own_flags = _arguments(f"{path}: {MODELS}[{number}]", entry, known, spelled, left_out)
        shared, more = _arguments(path, top, known, spelled, {*left_out, *own_flags})
        models.append(FlagFile(path, (*shared, *own), frozenset(own_flags | more)))
    return FlagFile(path, tuple(arguments), frozenset(flags), tuple(models))


def _arguments(
    where: str,
    values: Mapping[str, Any],
    known: Mapping[str, argparse.Action],
    spelled: Callable[[str], str],
    left_out: Collection[str],
) -> tuple[list[str], set[str]]:
    """Return keys of a file as command-line arguments, and the flags that they set."""
    arguments: list[str] = []
    flags: set[str] = set()
    for key, value in values.items():
        flag = spelled(f"--{key}")
        flag = _ALIASES.get(flag, flag)
        name = base(flag)
        if name not in known and f"--no-{name[2:]}" not in known:
            raise ConfigError(f"{where}: unknown key {key!r}.{_nearest(key, known)}")
        if name not in left_out:
            arguments += _as_arguments(flag, value, known)
            flags.add(name)
    return arguments, flags


def _entries(path: str, value: Any, has_model: bool) -> list[dict[str, Any]]:
    """Return the entries under ``models``; none without that key. Raises ConfigError."""
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {MODELS} must be a list of models, each with its flags.")
    if has_model:
        raise ConfigError(f"{path}: {MODELS} lists all models; name none beside it.")
    entries = []
    for number, entry in enumerate(value):
        entry = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise ConfigError(
                f"{path}: {MODELS}[{number}] must be a model, or flags and their values such as "
                "model: demo."
            )
        if not isinstance(entry.get("model"), str):
            raise ConfigError(f"{path}: {MODELS}[{number}] needs the key 'model'.")
        entries.append(entry)
    return entries


def _check_entry(
    path: str, number: int, entry: Mapping[str, Any], spelled: Callable[[str], str]
) -> None:
    """Raise ConfigError for an option of the server in the entry of one model."""
    for key in entry:
        name = base(spelled(f"--{key}")).removeprefix("--").replace("-", "_")
        if name in server_only_options():
            raise ConfigError(
                f"{path}: {MODELS}[{number}].{key} is an option of the whole server; put it at the "
                "top of the file."
            )


def base(arg: str) -> str:
    """Return the flag that an argument sets, without ``--no-``, members and value."""
    name = arg.partition("=")[0].partition(".")[0]
    return f"--{name.removeprefix('--no-').removeprefix('--')}"


def _nearest(key: str, known: Collection[str]) -> str:
    names = [flag[2:] for flag in known if flag.startswith("--") and not flag.startswith("--no-")]
    return suggestion(key.replace("_", "-"), names)


def _as_arguments(flag: str, value: Any, known: Mapping[str, argparse.Action]) -> list[str]:
    """Return a key of a file as command-line arguments."""
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        chosen = flag if value else f"--no-{base(flag)[2:]}"
        # A switch without an opposite is off when it is left out.
        return [chosen] if value or chosen in known else []
    if isinstance(value, list):
        texts = [_text(entry) for entry in value]
        if flag in known and known[flag].nargs in ("+", "*"):
            return [flag, *texts]
        return [f"{flag}={text}" for text in texts]
    # One argument, so that a value may begin with a hyphen.
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def read_flags(path: str) -> Mapping[str, Any]:
    """Read a YAML file of flags and their values. Raises ConfigError."""
    import yaml

    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_CHARACTERS + 1)
        if len(text) > MAX_FILE_CHARACTERS:
            raise ConfigError(f"{FLAG} {path!r} is longer than {MAX_FILE_CHARACTERS} characters.")
        flags = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, RuntimeError, yaml.YAMLError) as error:
        raise ConfigError(f"{FLAG} {path!r} cannot be read: {_reason(error)}.") from error
    if flags is None:
        return {}
    if not isinstance(flags, dict) or not all(isinstance(key, str) for key in flags):
        raise ConfigError(f"{FLAG} {path!r} must hold flags and their values, such as port: 8000.")
    return flags


def _reason(error: Exception) -> str:
    """Return the reason of an error, without text of the file, which may contain API keys."""
    place = getattr(error, "problem_mark", None)
    if place is not None:
        return f"line {place.line + 1}: {getattr(error, 'problem', None)}"
    return " ".join(str(error).split())
