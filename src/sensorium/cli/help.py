"""Help of commands: the flags that people use, or all of them by group.

``--help`` shows the common flags with an example each, ``--help GROUP`` one group and
``--help all`` every flag. A command with few flags shows them all.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

ALL = "all"
FEW_FLAGS = 14
"""A command with at most so many flags shows them all at once."""
OWN = "options"
"""Name of the group of flags that stand in none."""

_SENTENCE = re.compile(r"(.*?)[.;]\s.*?(\([^()]*\))?$", re.DOTALL)
"""A first sentence or clause, more, and perhaps facts in brackets at the end."""

GROUP_EXAMPLES: Mapping[str, str] = {
    "model": "--dtype bfloat16 --max-model-len 8k --num-threads 8",
    "caches": "--kv-cache-memory-bytes 4294967296 --mm-processor-cache-gb 4",
    "scheduling": "--max-num-seqs 128 --max-num-waiting 256",
    "speculation": "--speculative ngram --num-speculative-tokens 4",
    "media": "--limit-mm-per-prompt '{\"image\": 4}' --allowed-media-domains images.example.com",
    "parallelism": "--data-parallel-size 4",
    "observability": "--log-stats-interval 60",
    "deprecated": "--image-input-type pixel_values",
    "server": "--host 0.0.0.0 --port 9000 --api-key change-me",
    "sampling": "--temperature 0 --max-tokens 256 --stop END",
    "load": "--concurrency 32 --request-rate 10",
    "workload": "--num-prompts 200 --input-len 512 --output-len 64 --images 1",
    "reuse": "--prefix-len 256 --distinct-images 10",
}
"""An example of the flags of a group, by its title."""


class HelpAction(argparse.Action):
    """Print help and exit: ``--help``, ``--help all`` or ``--help GROUP``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(
            option_strings,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            nargs="?",
            const="",
            metavar="all|GROUP",
            help="show help: the common flags, all of them, or one group",
        )

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the help that ``values`` names and exit."""
        print(help_text(parser, values or ""), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Formatter that keeps the lines of a help text apart, such as those of an example."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        found = []
        for line in text.splitlines():
            found += super()._split_lines(line, width)
        return found


def help_text(parser: argparse.ArgumentParser, what: str = "") -> str:
    """Return the help of a parser: short (""), ``all``, or that of a group or subcommand.

    Exits with an error when there is no such group.
    """
    commands = _commands(parser)
    if not what:
        return parser.format_help() if commands else _short(parser)
    if what in commands:
        return help_text(commands[what])
    if what == ALL:
        return "\n".join([_whole(parser), *(_whole(sub) for sub in _distinct(commands))])
    groups = _groups(parser)
    if what.lower() not in groups:
        known = ", ".join((ALL, *commands, *groups))
        parser.error(f"there is no help on {what!r}; there is {known}")
    formatter = _formatter(parser)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    _add_section(formatter, parser, what.lower(), groups[what.lower()])
    return formatter.format_help()


def _short(parser: argparse.ArgumentParser) -> str:
    """Return the common flags with their examples, and the names of the groups."""
    common: Mapping[str, str] = getattr(parser, "common", {})
    groups = _groups(parser)
    flags = [action for actions in groups.values() for action in actions if action.option_strings]
    if len(flags) <= FEW_FLAGS or not common:
        return _whole(parser)
    formatter = _formatter(parser)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    formatter.start_section("arguments")
    formatter.add_arguments([action for action in parser._actions if not action.option_strings])
    formatter.end_section()
    formatter.start_section("common flags")
    by_name = {name: action for action in flags for name in action.option_strings}
    for name, example in common.items():
        formatter.add_argument(_with_example(_brief(by_name[name]), example))
    formatter.end_section()
    formatter.add_text(parser.epilog)
    formatter.add_text(
        f"There are {len(flags)} flags: --help {ALL} shows all of them, --help GROUP those of a "
        f"group: {', '.join(groups)}."
    )
    return formatter.format_help()


def _whole(parser: argparse.ArgumentParser) -> str:
    """Return all flags in their groups, with an example for each."""
    formatter = _formatter(parser)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    for title, actions in _groups(parser).items():
        _add_section(formatter, parser, title, actions)
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def _add_section(
    formatter: argparse.HelpFormatter,
    parser: argparse.ArgumentParser,
    title: str,
    actions: Sequence[argparse.Action],
) -> None:
    common: Mapping[str, str] = getattr(parser, "common", {})
    formatter.start_section(title)
    names = {name for action in actions for name in action.option_strings}
    example = GROUP_EXAMPLES.get(title, "")
    if example and names >= {word for word in example.split() if word.startswith("--")}:
        formatter.add_text(f"Example: {example}")
    for action in actions:
        examples = [common[name] for name in action.option_strings if name in common]
        formatter.add_argument(_with_example(action, *examples))
    formatter.end_section()


def _brief(action: argparse.Action) -> argparse.Action:
    """Return an action with the first sentence of its help, and the facts in brackets behind."""
    text = action.help or ""
    brief = _SENTENCE.sub(r"\1 \2", text).strip()
    if brief == text:
        return action
    shown = copy.copy(action)
    shown.help = brief
    return shown


def _with_example(action: argparse.Action, *examples: str) -> argparse.Action:
    """Return an action whose help ends with an example on a line of its own."""
    if not examples:
        return action
    shown = copy.copy(action)
    text = examples[0].replace("%", "%%")
    shown.help = f"{action.help or ''}\nExample: {text}"
    return shown


def _groups(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Return the visible arguments by the title of their group, without empty groups."""
    found: dict[str, list[argparse.Action]] = {}
    hidden = {"config_path"} if _commands(parser) else set()
    for group in parser._action_groups:
        title = str(group.title or OWN)
        title = "arguments" if title == "positional arguments" else title
        shown = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest not in hidden
        ]
        if shown:
            found.setdefault(title, []).extend(shown)
    return found


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of subcommands by name; none for a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _distinct(
    commands: Mapping[str, argparse.ArgumentParser],
) -> list[argparse.ArgumentParser]:
    """Return each parser once, however many names it has."""
    return list(dict.fromkeys(commands.values()))


def _formatter(parser: argparse.ArgumentParser) -> argparse.HelpFormatter:
    return _Formatter(parser.prog)
