"""Help is short by default and whole on request; all its examples are flags that parse."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from sensorium.cli.help import GROUP_EXAMPLES, help_text
from sensorium.cli.main import build_parser, main

ARGUMENTS = {
    "batch": ["in.jsonl", "-o", "out.jsonl"],
    "generate": ["hello"],
    "pull": ["some/model"],
}
"""Positional arguments that a command cannot do without."""


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of each command that does something."""
    lists = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not lists:
        yield parser
    for found in lists:
        for sub in dict.fromkeys(found.choices.values()):
            yield from commands(sub)


PARSERS = {found.prog.removeprefix("sensorium "): found for found in commands(build_parser())}
NAMES = list(PARSERS)
LONG = [name for name in NAMES if len(PARSERS[name]._option_string_actions) > 40]


def test_the_commands_are_those() -> None:
    assert {"serve", "chat", "pull", "doctor", "info", "bench serve"} <= set(NAMES)
    assert {"serve", "chat", "generate", "embed"} <= set(LONG)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_parses(name: str) -> None:
    parser = PARSERS[name]
    common: dict[str, str] = getattr(parser, "common", {})
    shown = help_text(parser, "all")
    examples = [example for example in common.values() if "--config" not in example]
    examples += [example for example in GROUP_EXAMPLES.values() if f"Example: {example}" in shown]
    for flag, example in common.items():
        assert flag in parser._option_string_actions, flag
        assert flag in example, "an example uses its flag"
    for example in examples:
        parser.parse_args([*ARGUMENTS.get(name, []), *shlex.split(example)])


@pytest.mark.parametrize("name", LONG)
def test_it_is_short_by_default(name: str) -> None:
    parser = PARSERS[name]
    short, whole = help_text(parser), help_text(parser, "all")
    assert len(short.splitlines()) < 60 < len(whole.splitlines())
    assert 3 <= short.count("Example:") <= 10
    assert "--help all" in short
    assert "--block-size" not in short
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.option_strings:
            assert action.option_strings[-1] in whole, action.option_strings


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(LONG)))
def test_a_command_with_few_flags_shows_all(name: str) -> None:
    parser = PARSERS[name]
    assert "--help GROUP" not in help_text(parser) or len(help_text(parser).splitlines()) < 70


def test_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help", "media"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--allowed-media-domains" in shown
    assert "Example:" in shown
    assert "--max-num-seqs" not in shown


def test_an_unknown_group_names_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help", "madia"])
    assert caught.value.code == 2
    assert "there is all, " in capsys.readouterr().err


def test_help_of_a_command_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help", "doctor"], ["doctor", "--help"]):
        with pytest.raises(SystemExit):
            main(argv)
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second
