"""The table of published faults in ``docs/security.md`` and the tests of this folder say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "tests/reliability"
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> list[str]:
    """The lines of the tables of the section, without their heads."""
    text = (ROOT / "docs" / "security.md").read_text()
    section = text.partition("## Published faults of others")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| ---", "| fault |", "| case |"))]


def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = (n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for name in functions if name.startswith("test_")}


def path_of(name: str) -> Path:
    return ROOT / (name if "/" in name else f"{FOLDER}/{name}")


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[2:60])
def test_each_row_names_tests_that_exist(row: str) -> None:
    """A row without a test, or with one that was renamed, is a promise that nobody keeps."""
    found = TEST.findall(row.rpartition(" | ")[2])
    assert found, row
    for file, name in found:
        assert path_of(file).is_file(), file
        assert name in names_in(path_of(file)), name


def test_each_file_is_in_the_table() -> None:
    """Whoever looks for a fault finds its test, and the other way round."""
    named = {path_of(file) for row in rows() for file, _ in TEST.findall(row)}
    files = set((ROOT / FOLDER).glob("test_*.py")) - {Path(__file__)}
    assert not {path.name for path in files - named}


def test_ids_of_faults_look_like_ids() -> None:
    """A typing error in an id leads nobody to the fault."""
    for row in rows():
        for word in re.findall(r"\b(?:CVE|GHSA)[-\w]*", row):
            assert re.fullmatch(r"CVE-20\d\d-\d{4,6}|GHSA(-[23456789cfghjmpqrvwx]{4}){3}", word), (
                word
            )
