"""Uses in tests of names that the package keeps to itself (``_name`` of another object or module)."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATCHES = {"setattr", "delattr", "getattr", "hasattr"}


def uses_by_folder() -> Counter[str]:
    """Return how many uses each folder right below ``tests`` has; those of files in it are "."."""
    uses: Counter[str] = Counter()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        inside = path.relative_to(ROOT / "tests").parts
        uses[inside[0] if len(inside) > 1 else "."] += len(list(uses_in(path)))
    return +uses


def uses_in(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in _names(node):
            if name in own_names():
                yield getattr(node, "lineno", 0), name


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node takes of another object or module."""
    if isinstance(node, ast.Attribute):
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and _name_of(node.func) in PATCHES:
        for argument in node.args[:2]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value.rpartition(".")[2]


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


@cache
def own_names() -> frozenset[str]:
    """Return the private names that the package or the training code defines."""
    found: set[str] = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "training").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    private = {name for name in found if name.startswith("_") and not name.endswith("__")}
    return frozenset(private - {"_replace", "_asdict"})  # public methods of named tuples
