"""Command-line flags, generated from the fields of the configuration classes.

``max_model_len: int | None`` becomes ``--max-model-len N``, a bool ``--flag`` and ``--no-flag``, a
dict a flag that takes JSON, a tuple a flag that takes several values or is repeated. A flag that
is not given is absent from the parsed arguments, so defaults exist in ``sensorium.config`` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

from sensorium.bounds import bounds_of
from sensorium.cli import config_file
from sensorium.cli.config_file import FlagFile
from sensorium.cli.help import HelpAction
from sensorium.cli.rewrite import members_joined, spelled_out
from sensorium.compat.apply import adopt
from sensorium.compat.engine_flags import ENGINE_RULES
from sensorium.compat.rule import Rule
from sensorium.compat.server_flags import SERVER_RULES
from sensorium.compat.values import shared_value, whole_number
from sensorium.config import (
    ENGINE_SECTIONS,
    LIMITED,
    EngineConfig,
    ServerConfig,
    engine_config,
    parse_limits,
    suggestion,
)
from sensorium.environment import api_keys_of_environment
from sensorium.errors import ConfigError

TITLES = {
    "model": "model",
    "cache": "caches",
    "scheduler": "scheduling",
    "speculation": "speculation",
    "media": "media",
    "lora": "adapters",
    "parallel": "parallelism",
    "observability": "observability",
    "deprecated": "deprecated",
    "server": "server",
}
_FOREIGN = "vllm."
"""Begins the names of vLLM's flags among parsed arguments."""
_UNDERSCORED = re.compile(r"--[A-Za-z0-9_-]+(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors that suggest the nearest flag.

    ``--max_model_len`` is read as ``--max-model-len``; flags are never abbreviated. ``foreign`` are
    vLLM's flags, which are read as ``sensorium.compat`` says and are not shown in the help.
    ``common`` are the flags of the short help, each with an example. A command (not a list of
    commands) reads flags from ``--config FILE``, too; with ``has_models`` the file may list models.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        super().__init__(*args, **{**keywords, "add_help": False})
        self.foreign: dict[str, Rule] = {}
        self.common: dict[str, str] = {}
        self.has_models = False
        self.add_argument("-h", "--help", action=HelpAction)
        # Taken out of the arguments before they are parsed; it is here for the help.
        self.add_argument(
            config_file.FLAG,
            dest="config_path",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file with flags as keys, such as port: 9000; flags and the environment win",
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and exit at an unknown argument: none is ever returned."""
        args = sys.argv[1:] if args is None else args
        if self.get_default("handler") is None:
            parsed, unknown = super().parse_known_args([_dashed(arg) for arg in args], namespace)
        else:
            plain, file = self._rewritten(args)
            parsed, unknown = super().parse_known_args(plain, namespace)
            self._note_sources(parsed, file)
            parsed.listed_models = self._models(args, file) if file is not None else []
        if unknown:
            self._refuse(unknown[0].partition("=")[0])
        if hasattr(parsed, "config_path"):
            self.error("--config comes once, behind the command, and not in a file")
        self._adopt_foreign(parsed)
        return parsed, unknown

    def _rewritten(self, args: Sequence[str]) -> tuple[list[str], FlagFile | None]:
        """Return the arguments as argparse reads them, with those of ``--config``, and that file.

        vLLM's flags are known from then on.
        """
        for rule in self.foreign.values():
            if flag_of(rule.name) not in self._option_string_actions:
                self.add_argument(flag_of(rule.name), **_foreign_action(rule))
        known = self._option_string_actions
        try:
            plain, path = config_file.take_path([spelled_out(arg, known) for arg in args])
            if path is None:
                return members_joined(plain), None
            given = {config_file.base(arg) for arg in plain if arg.startswith("--")}
            has_model = any(action.dest == "model_argument" for action in self._actions)
            if has_model and plain and not plain[0].startswith("-"):
                given.add("--model")
            file = config_file.read(path, given, known, lambda flag: spelled_out(flag, known))
            return members_joined([*plain, *file.arguments]), file
        except ConfigError as error:
            self.error(error.message)

    def _models(self, args: Sequence[str], file: FlagFile) -> list[argparse.Namespace]:
        """Return the flags of each model that the file lists.

        Those on the command line count for all.
        """
        if file.models and not self.has_models:
            self.error(
                f"{file.path}: this command takes one model, no list of {config_file.MODELS}"
            )
        found = []
        for entry in file.models:
            known = self._option_string_actions
            plain, _ = config_file.take_path([spelled_out(arg, known) for arg in args])
            parsed, _ = super().parse_known_args(members_joined([*plain, *entry.arguments]))
            self._note_sources(parsed, entry)
            self._adopt_foreign(parsed)
            found.append(parsed)
        return found

    def _note_sources(self, parsed: argparse.Namespace, file: FlagFile | None) -> None:
        """Set ``config_file``, its path or None, and ``from_file``, the names of its options."""
        flags = file.flags if file is not None else frozenset()
        actions = self._option_string_actions
        used = [actions.get(flag) or actions.get(f"--no-{flag[2:]}") for flag in flags]
        names = {action.dest.removeprefix(_FOREIGN) for action in used if action is not None}
        ours = {self.foreign[name].to.partition(" ")[0] for name in names & self.foreign.keys()}
        parsed.config_file = file.path if file is not None else None
        parsed.from_file = frozenset(names | ours)

    def _adopt_foreign(self, parsed: argparse.Namespace) -> None:
        """Replace vLLM's flags by our options; ours win where both are given."""
        given = {
            name: getattr(parsed, _FOREIGN + name)
            for name in self.foreign
            if hasattr(parsed, _FOREIGN + name)
        }
        for name in given:
            delattr(parsed, _FOREIGN + name)
        try:
            adopted = adopt(given, self.foreign, flag_of)
        except ConfigError as error:
            self.error(error.message)
        for note in adopted.notes:
            print_warning(note)
        for name, value in adopted.options.items():
            before = getattr(parsed, name, None)
            if isinstance(before, dict) and isinstance(value, dict):
                setattr(parsed, name, {**value, **before})
            elif before is None:
                setattr(parsed, name, value)

    def _refuse(self, flag: str) -> NoReturn:
        """Exit, naming the nearest known flag."""
        if not flag.startswith("-"):
            self.error(f"unexpected argument {flag!r}.")
        known = [name for name in self._option_string_actions if name.startswith("--")]
        near = suggestion(flag, known) if flag.startswith("--") else ""
        if f"-{flag}" in known:
            near = f" Did you mean {f'-{flag}'!r}?"
        self.error(f"unknown flag {flag}.{near}")

    def error(self, message: str) -> NoReturn:
        """Print the error and how to get help, and exit with status 2."""
        message = message if message.endswith((".", "?")) else f"{message}."
        self.exit(2, f"error: {message}\nSee '{self.prog} --help'.\n")


def add_engine_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """Add a flag for every field of the engine's configuration, including ``--model``.

    Args:
        parser: of the command.
        without: names of fields that get no flag.
    """
    for section, cls in ENGINE_SECTIONS.items():
        add_flags(parser, cls, TITLES[section], without)
    add_progress_flag(parser)
    _add_foreign(parser, ENGINE_RULES)


def add_progress_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--progress`` and ``--no-progress``, which ``main`` puts into the environment."""
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="show progress of what takes longer than two seconds, on stderr: bars in a terminal, "
        "log lines elsewhere (default: SENSORIUM_PROGRESS, else on)",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of the server's configuration."""
    add_flags(parser, ServerConfig, TITLES["server"])
    _add_foreign(parser, SERVER_RULES)


def _add_foreign(parser: argparse.ArgumentParser, rules: Mapping[str, Rule]) -> None:
    """Accept vLLM's flags."""
    if isinstance(parser, Parser):
        parser.foreign |= rules
        parser.epilog = (
            "vLLM's flags are accepted, too (docs/from_vllm.md). Precedence: flags, environment, "
            "file of --config, defaults; sensorium info --config FILE shows the result."
        )


def add_flags(
    parser: argparse.ArgumentParser, cls: type, title: str, without: Sequence[str] = ()
) -> None:
    """Add a group with a flag for every field of a configuration class."""
    group = parser.add_argument_group(title)
    for field, kind in fields_of(cls):
        if field.name in without:
            continue
        group.add_argument(
            flag_of(field.name),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=help_of(field).replace("%", "%%"),
            **_action(field.name, kind),
        )


def engine_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given flags of the engine as keywords of ``LLM``."""
    given = vars(arguments)
    names = [field.name for cls in ENGINE_SECTIONS.values() for field, _ in fields_of(cls)]
    return {name: given[name] for name in names if name in given}


def build_engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Return the engine's configuration; warn of deprecated flags on stderr.

    Raises:
        ConfigError: a value is wrong.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        config = engine_config(**engine_keywords(arguments))
    for warning in caught:
        print_warning(str(warning.message))
        # A command that creates an LLM from the same values would warn again.
        warnings.filterwarnings("ignore", re.escape(str(warning.message)), warning.category)
    return config


def build_server_config(arguments: argparse.Namespace) -> ServerConfig:
    """Return the server's configuration, with the API key of the environment.

    Raises:
        ConfigError: a value is wrong.
    """
    given = vars(arguments)
    values = {f.name: given[f.name] for f, _ in fields_of(ServerConfig) if f.name in given}
    keys = (*values.get("api_key", ()), *api_keys_of_environment())
    return ServerConfig(**{**values, "api_key": keys})


def print_warning(message: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr)


def fields_of(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a configuration class with their types."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def flag_of(name: str) -> str:
    """Return the flag of a field, such as ``--max-model-len`` of ``max_model_len``."""
    return f"--{name.replace('_', '-')}"


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return the help of a field with its range and its default, as far as it has them."""
    default = default_text(field)
    facts = [str(bounds_of(field)), default and f"default: {default}"]
    shown = "; ".join(filter(None, facts))
    return f"{field.metadata['help']} ({shown})" if shown else field.metadata["help"]


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default as text; empty for None and empty values."""
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "" if default in (None, "", {}) else str(default)


def _action(name: str, kind: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for a field of this type."""
    kind = without_none(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    origin = typing.get_origin(kind)
    if origin is Literal:
        return {"choices": typing.get_args(kind), "type": _readable(partial(shared_value, name))}
    if origin is tuple:
        return {"nargs": "+", "action": ExtendWithJson, "metavar": "VALUE"}
    if origin is dict:
        reader = _limits if name == "limit_mm_per_prompt" else read_object
        return {"type": _readable(reader), "metavar": "JSON"}
    if kind is int:
        return {"type": partial(_integer, name), "metavar": "N"}
    if kind is float:
        return {"type": float, "metavar": "N"}
    return {"metavar": "TEXT", "type": _readable(partial(shared_value, name))}


def _integer(name: str, text: str) -> int | None:
    """Parse a number such as 8192, 8k or 8K, or vLLM's word for the default.

    Raises:
        ArgumentTypeError: the text is neither.
    """
    try:
        value = shared_value(name, text)
        return None if value is None else whole_number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def _foreign_action(rule: Rule) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for one of vLLM's flags."""
    common = {
        "dest": _FOREIGN + rule.name,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    if rule.takes == "switch":
        return {**common, "action": argparse.BooleanOptionalAction}
    if rule.takes == "texts":
        return {**common, "nargs": "+"}
    return {**common, "nargs": "?", "const": True} if rule.takes == "optional" else common


def without_none(kind: Any) -> Any:
    """Return a type without None, such as ``int`` of ``int | None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        [kind] = [k for k in typing.get_args(kind) if k is not type(None)]
    return kind


class ExtendWithJson(argparse.Action):
    """Collect the values of a repeated flag; a JSON list stands for its entries."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Append the values of one use of the flag."""
        found = list(getattr(namespace, self.dest, ()))
        for value in values:
            found.extend(self._entries(value))
        setattr(namespace, self.dest, tuple(found))

    def _entries(self, value: str) -> list[str]:
        if not value.startswith("["):
            return [value]
        try:
            entries = json.loads(value)
        except ValueError as error:
            raise argparse.ArgumentError(self, f"{value!r} is not valid JSON: {error}") from None
        if not all(isinstance(entry, str) for entry in entries):
            raise argparse.ArgumentError(self, f"{value!r} must be a list of strings")
        return list(entries)


def read_object(text: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{text!r} must be a JSON object such as {{"key": 1}}')
    return value


def _limits(text: str) -> dict[str, Any]:
    limits = parse_limits(text)
    if not text.lstrip().startswith("{") and set(limits) <= set(LIMITED):
        print_warning(f"{text} is deprecated: use --limit-mm-per-prompt '{json.dumps(limits)}'")
    return limits


def _readable(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``reader`` with its ConfigError turned into the error that argparse prints."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    return read


def _dashed(arg: str) -> str:
    if not _UNDERSCORED.fullmatch(arg):
        return arg
    name, equals, value = arg.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}"
