"""One word for one thing: the names that were given up, and how docstrings begin."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sensorium"

GIVEN_UP = re.compile(
    r"\b(KVLedger|FeatureBudget|Preparer|RequestStream|PlaceholderSpan|class Draft|Foreign|SegmentFolder"
    r"|Inbox|class Arrival|both_ways|upright\(|[Ss]tretch(es)?|[Ll]est|[Aa]new|[Ss]trangers?"
    r"|of no account)\b"
)
"""Names that were replaced (see the glossary of docs/architecture.md), and words that no operator uses."""
INTERROGATIVES = {"Whether", "What", "Who", "Which", "How", "Where", "Why", "When"}

PYTHON = sorted(path for path in SOURCE.rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_words_that_were_given_up() -> None:
    assert len(PYTHON) > 100
    assert len(PAGES) > 10
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*PYTHON, *PAGES]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if GIVEN_UP.search(line)
    ]
    assert not found


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring of a module, a class, a function or an attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            text = getattr(value, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(text, str):
                yield statement.lineno, text


def test_docstrings_begin_with_an_imperative_or_a_noun() -> None:
    """A first line such as ``Whether it is so`` makes no sense without the name."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in PYTHON
        for line, text in docstrings(path)
        if text.split() and text.split()[0].strip(":,") in INTERROGATIVES
    ]
    assert not found


def test_the_help_uses_none_of_them() -> None:
    """Help is made of the configuration's fields, but parts of it are written by commands."""
    import sys

    for command in ([], ["serve"], ["chat"], ["bench", "serve"]):
        done = subprocess.run(
            [sys.executable, "-m", "sensorium", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        assert not GIVEN_UP.search(done.stdout)
