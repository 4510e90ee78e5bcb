"""The directions of imports, as docs/architecture.md draws them: lower rows never import higher ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sensorium"

ROWS = {
    "compat": 0,
    "config": 0,
    "bounds": 0,
    "params": 0,
    "outputs": 0,
    "errors": 0,
    "environment": 0,
    "processes": 0,
    "forks": 0,
    "tracing": 0,
    "kernels": 1,
    "core": 1,
    "multimodal": 1,
    "metrics": 1,
    "layers": 2,
    "text": 2,
    "models": 3,
    "runtime": 4,
    "engine": 5,
    "llm": 6,
    "async_llm": 6,
    "server": 6,
    "cli": 6,
    "bench": 6,
}
SAME_ROW = {
    ("compat", "errors"),
    ("config", "compat"),
    ("cli", "llm"),
    ("cli", "server"),
    ("cli", "bench"),
    ("bench", "llm"),
    ("outputs", "errors"),
    ("params", "errors"),
    ("params", "bounds"),
    ("config", "bounds"),
    ("config", "errors"),
    ("config", "environment"),
    ("environment", "errors"),
    ("forks", "errors"),
    ("tracing", "errors"),
}
MODULES_ALLOWED = {
    # Of core, the runner sees the plans and the messages in them, never the scheduler.
    ("runtime", "core"): {"plan", "request"},
    ("text", "multimodal"): {"parse", "placeholders", "items", "processor"},
    ("models", "multimodal"): {"processor", "placeholders", "items", "decode"},
    ("runtime", "multimodal"): {"items"},
}
FORBIDDEN = {
    "core": {"torch", "numpy", "transformers", "fastapi"},
    "config": {"torch", "numpy"},
    "params": {"torch", "numpy"},
    "errors": {"torch", "numpy"},
    "outputs": {"torch", "numpy"},
}
EVERYWHERE_LAZY = {"transformers"}
ONLY_SERVER = {"fastapi", "uvicorn", "starlette"}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in ROWS)


def room(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(dotted name, at top level, for type checking only) of every import."""
    found: list[tuple[str, bool, bool]] = []

    def visit(node: ast.AST, top: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                names = (f"{child.module}.{alias.name}" for alias in child.names)
                found.extend((name, top, typing_only) for name in names)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                visit(child, False, typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                visit(child, top, True)
            else:
                visit(child, top, typing_only)

    visit(ast.parse(path.read_text()), True, False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_directions(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "__main__", "entrypoints", "assets", "demo", "demo_audio"):
        return
    assert own in ROWS, f"{own} has no row: add it to the drawing and to this test"
    for name, _, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "sensorium" or len(parts) < 2 or parts[1] not in ROWS:
            continue
        other = parts[1]
        if other == own:
            continue
        assert ROWS[other] < ROWS[own] or (own, other) in SAME_ROW, f"{own} imports {name}"
        allowed = MODULES_ALLOWED.get((own, other))
        if allowed is not None and len(parts) > 2:
            assert parts[2] in allowed, (
                f"{own} may import only {sorted(allowed)} of {other}: {name}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_foreign_imports(path: Path) -> None:
    own = room(path)
    for name, top, typing_only in imports(path):
        root = name.split(".")[0]
        assert root not in FORBIDDEN.get(own, set()) or typing_only, f"{own} imports {name}"
        assert not (root in EVERYWHERE_LAZY and top), f"{name} must be imported inside a function"
        assert not (root in ONLY_SERVER and own not in ("server", "cli")), f"{own} imports {name}"


def test_the_scheduler_loop_fits_on_a_screen() -> None:
    """The calls that a newcomer reads first stay short."""
    longest = {
        ("engine/engine.py", "step"): 20,
        ("core/scheduler.py", "schedule"): 50,
        ("core/scheduler.py", "commit"): 50,
        ("runtime/runner.py", "execute"): 50,
        ("multimodal/pipeline.py", "load"): 50,
    }
    for (file, function), limit in longest.items():
        tree = ast.parse((PACKAGE / file).read_text())
        sizes = [
            (node.end_lineno or 0) - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
        ]
        assert sizes, f"{file} has no {function}"
        assert max(sizes) <= limit, f"{file}: {function} has {max(sizes)} lines, at most {limit}"


def test_importing_sensorium_is_light() -> None:
    """`import sensorium` must not load torch: the command line and the HTTP process start fast."""
    import subprocess
    import sys

    heavy = ("torch", "transformers", "fastapi", "numba")
    code = f"import sys, sensorium; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
