"""Commands of shell blocks: reading them, and checking what can be checked without running them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from sensorium.cli.main import build_parser
from tests.docs.pages import ROOT, Block

OTHER_PROGRAMS = {"docker", "echo", "git", "open-webui", "pre-commit", "systemctl"}
"""Programs whose arguments are not checked here."""
_ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)
_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")


_SHELLS = ("sh", "bash", "console")
_FIRST_WORDS = re.compile(r"(?:\.venv/|scripts/|sensorium |curl |python )")


@dataclass(frozen=True)
class Command:
    """A command: the program's name, without its folder, and its arguments."""

    program: str
    path: str
    arguments: list[str]


def is_shell(block: Block) -> bool:
    """Return true for a block of commands.

    One that says so, or one of no language that begins with a command.
    """
    return block.language in _SHELLS or (
        not block.language and _FIRST_WORDS.match(block.code) is not None
    )


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a shell block, without comments and assignments of variables."""
    found = []
    for line in _logical_lines(block.code):
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            del words[0]
        if words:
            found.append(Command(PurePath(words[0]).name, words[0], words[1:]))
    return found


def check(command: Command) -> None:
    """Check that the program, its flags and its files exist. Raises AssertionError otherwise."""
    if command.program == "sensorium":
        parsed(command)
    elif command.program in ("python", "python3"):
        _check_python(command)
    elif command.program in ("pip", "pip3"):
        _check_pip(command)
    elif command.program == "curl":
        url, body = request_of(command)
        assert url.startswith("http"), url
        assert body is None or isinstance(body, dict), body
    elif command.path.startswith("scripts/"):
        assert (ROOT / command.path).stat().st_mode & 0o100, command.path
        _check_flags(command, (ROOT / command.path).read_text(encoding="utf-8"))
    else:
        assert command.program in OTHER_PROGRAMS, f"unknown program {command.path}"


def parsed(command: Command) -> argparse.Namespace:
    """Return the arguments of a ``sensorium`` command as its parser reads them."""
    try:
        return build_parser().parse_args(command.arguments)
    except SystemExit as error:
        if error.code in (0, None):  # --help
            return argparse.Namespace()
        raise AssertionError(f"sensorium refuses {command.arguments}") from error


def request_of(command: Command) -> tuple[str, object]:
    """Return the URL of a ``curl`` command and the JSON that it sends, or None."""
    words = iter(command.arguments)
    url, body = "", None
    for word in words:
        if word in ("-H", "--header"):
            next(words)
        elif word in ("-d", "--data"):
            body = json.loads(next(words))
        else:
            assert not word.startswith("-"), f"curl {word} is not read here"
            url = word
    return url, body


def _logical_lines(code: str) -> Iterator[str]:
    """Yield commands: lines, with those that they go on in."""
    line = ""
    for part in code.splitlines():
        line += part
        if part.endswith("\\"):
            line = line[:-1]
        elif line.count("'") % 2:
            line += "\n"
        else:
            yield line
            line = ""
    assert not line, f"the command does not end: {line}"


def _check_python(command: Command) -> None:
    words = command.arguments
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, words[1]
        if words[1].startswith(("tests.", "training.", "benchmarks.")):
            folder = ROOT / words[1].replace(".", "/")
            files = folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
            _check_flags(command, "".join(file.read_text(encoding="utf-8") for file in files))
        return
    assert (ROOT / words[0]).is_file(), words[0]
    _check_flags(command, (ROOT / words[0]).read_text(encoding="utf-8"))


def _check_flags(command: Command, text: str) -> None:
    for word in command.arguments:
        if flag := _FLAG.match(word):
            assert flag[0] in text, f"{command.path} has no {flag[0]}"


def _check_pip(command: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in command.arguments:
        for extra in re.findall(r"^(?:sensorium|\.)\[(\w+)\]$", word):
            assert extra in project["optional-dependencies"], word
        if word.endswith(".whl"):
            name, version, *_ = PurePath(word).name.split("-")
            assert (name, version) == (project["name"], project["version"])
