"""Code blocks and names in the pages.

What they say is there - flags, files, variables - and can be parsed.

Blocks of Python and requests are run by ``test_running.py``.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import functools
import json
import re
import tomllib
from collections.abc import Iterator

import pytest
import yaml

from sensorium.cli.main import build_parser
from sensorium.compat.engine_flags import ENGINE_RULES
from sensorium.compat.server_flags import SERVER_RULES
from tests.docs.commands import check, commands_of, is_shell
from tests.docs.pages import BLOCKS, PAGES, ROOT, Block, text_of

UNREAD = ("", "text", "output", "nginx")
"""Languages of blocks that are not read here: drawings, messages, other programs' files."""
OTHERS = (
    "--config",
    "--no",
    "--build-arg",
    "--constraint",
    "--cov",
    "--gpus",
    "--preload",
    "--shm-size",
)
"""What is read before the parser, the beginning of flags, and flags of other programs."""
HISTORY = ("CHANGELOG.md",)
"""Pages that also name what is gone."""
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
_FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|jinja)")
_VARIABLE = re.compile(r"SENSORIUM_[A-Z_]+[A-Z]")
_FOLDERS = (
    "",
    "src/sensorium",
    "src",
    "docs",
    "tests",
    "tests/reliability",
    "tests/models",
    "tests/fuzz",
    "examples",
)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_can_be_read(block: Block) -> None:
    if is_shell(block):
        for command in commands_of(block):
            check(command)
    elif block.language == "python":
        compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "ini":
        configparser.ConfigParser(strict=False, interpolation=None).read_string(block.code)
    else:
        assert block.language in UNREAD, f"blocks of {block.language!r} are not checked yet"


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the flags of a parser and of those of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)


@functools.cache
def known_flags() -> frozenset[str]:
    """Return all flags: of the commands, of vLLM as far as there is a rule for them, of scripts
    and tools.
    """
    found = {*flags_of(build_parser()), *OTHERS}
    found |= {f"--{name.replace('_', '-')}" for name in (*ENGINE_RULES, *SERVER_RULES)}
    tools = [*(ROOT / "scripts").iterdir(), *ROOT.glob("benchmarks/**/*.py")]
    tools += [*ROOT.glob("training/**/*.py"), *ROOT.glob("tests/fuzz/*.py"), ROOT / "Dockerfile"]
    for path in tools:
        if path.is_file():
            found |= set(_FLAG.findall(path.read_text(encoding="utf-8")))
    return frozenset(found)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_flags_that_the_text_names_exist(page: str) -> None:
    text = "\n".join(_CODE.findall(text_of(page))).replace("max_model_len", "max-model-len")
    named = set(_FLAG.findall(text))
    negated = {flag for flag in named if flag.replace("--disable-", "--enable-") in known_flags()}
    assert named - known_flags() - negated == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_files_that_the_text_names_exist(page: str) -> None:
    """Full paths, and their ends within the package or the folders of tests that a page speaks of."""
    named = {name for code in _CODE.findall(text_of(page)) for name in _FILE.findall(code)}
    folders = [ROOT / folder for folder in _FOLDERS]
    missing = {
        name
        for name in named
        if not any((folder / name).exists() for folder in folders)
        and not any(ROOT.glob(f"src/**/{name}"))
    }
    assert missing == set()


def test_variables_that_the_text_names_exist() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").iterdir()]
    known = {
        name
        for path in sources
        if path.is_file()
        for name in _VARIABLE.findall(path.read_text(encoding="utf-8"))
    }
    named = {name for page in PAGES for name in _VARIABLE.findall(text_of(page))}
    assert named - known == set()
