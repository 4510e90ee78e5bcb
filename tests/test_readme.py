"""The tree of the source in the README is the one that there is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sensorium"


def tree() -> dict[Path, set[str]]:
    """Names of the modules that the README lists, by folder; only of folders of which it lists any."""
    lines = (ROOT / "README.md").read_text().partition("\nsrc/sensorium/\n")[2].splitlines()
    found: dict[Path, set[str]] = {}
    folders: list[str] = []
    for line in lines:
        if not line.startswith("  "):
            break
        words = line.split()
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        if words[0].endswith("/"):
            folders[depth:] = [words[0]]
            continue
        folder = SOURCE.joinpath(*folders[:depth])
        names = itertools.takewhile(
            lambda word: word.endswith(".py"), (w.strip(",") for w in words)
        )
        found.setdefault(folder, set()).update(names)
    return found


TREE = tree()


@pytest.mark.parametrize("folder", TREE, ids=lambda folder: str(folder.relative_to(SOURCE)))
def test_each_module_of_a_listed_folder_is_listed(folder: Path) -> None:
    """Modules that are new, renamed or gone show at once."""
    there = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert TREE[folder] == there


def test_the_tree_is_found() -> None:
    """Else the test above would have nothing to look at."""
    assert {"core", "multimodal", "engine"} <= {folder.name for folder in TREE}
