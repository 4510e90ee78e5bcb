"""Import directions, inner rooms and sizes of files, as docs/architecture.md states them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.private_names import uses_by_folder

PACKAGE = Path(__file__).parents[1] / "src" / "sensorium"

ROWS = {
    "compat": 0,
    "config": 0,
    "bounds": 0,
    "params": 0,
    "outputs": 0,
    "errors": 0,
    "environment": 0,
    "progress": 0,
    "processes": 0,
    "forks": 0,
    "tracing": 0,
    "distributed": 1,
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
    "ray": 6,
    "cli": 6,
    "bench": 6,
}
SAME_ROW = {
    ("compat", "errors"),
    ("config", "compat"),
    ("cli", "llm"),
    ("cli", "server"),
    ("cli", "bench"),
    ("cli", "ray"),
    ("ray", "async_llm"),
    ("ray", "llm"),
    ("ray", "server"),
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
    ("processes", "environment"),
    ("progress", "environment"),
    ("processes", "errors"),
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
ONLY_RAY = {"ray"}

INNER_ORDER: dict[str, tuple[set[str], ...]] = {
    "multimodal": (
        {"items", "inputs", "shared_memory", "tensors"},
        {"processor", "placeholders"},
        {"decode"},
        {"cache", "workers"},
        {"fetch"},
        {"parse"},
        {"stats", "files", "context"},
        {"item_digests"},
        {"pipeline"},
    ),
    "text": (
        {"spelling", "tokenizer", "backend", "control", "detokenizer", "stops", "grammar"},
        {"chat"},
        {"tools"},
    ),
    "kernels": ({"adapters", "int8_cache", "batch", "weight", "reference"}, {"cpu"}, {"ops"}),
    "models": (
        {"interface", "configs", "rope", "dtypes"},
        {"gguf"},
        {"loading"},
        {"lora"},
        {"media"},
        {"parts"},
        {"embedder", "native", "hub_gguf", "shares"},
        {"families"},
        {"registry"},
        {"encoders"},
        {"loader", "needs"},
    ),
    "engine": (
        {"stats", "wire", "shared", "iterations", "stations"},
        {"loading"},
        {"encoding"},
        {"parallel"},
        {"grammar"},
        {"adapters", "engine", "executor"},
        {"prompts"},
        {"outputs"},
        {"serving", "offline"},
    ),
    "server": (
        {
            *("openai.protocol", "responses.protocol", "anthropic.protocol"),
            *("openai.logprobs", "http.encoding"),
        },
        {
            *("context", "errors", "payload", "admission", "turns", "access_log"),
            "responses.store",
        },
        {"models"},
        {"files"},
        {"batches"},
        {"http"},
        {"openai"},
        {"responses", "anthropic"},
        {"routes", "playground", "adapters"},
        {"openapi", "app"},
        {"launch"},
    ),
    "ray": (
        {"cluster", "extra", "logs", "routing", "start", "tasks"},
        {"media"},
        {"encoders"},
        {"data", "serving"},
    ),
    "cli": (
        {
            "flags",
            "help",
            "config_file",
            "options",
            "sampling",
            "attachments",
            "rewrite",
            "reference",
            "from_vllm",
        },
        {"chat", "doctor", "batch"},
        {"commands"},
        {"main"},
    ),
}
"""Rooms and single modules of a package: each may import those of earlier rows, and single
modules of its own row."""
MOST_FILES = 12
MOST_LINES = 450
MOST_FUNCTION_LINES = 60

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in ROWS)


def room(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def short(path: Path) -> str:
    """The name of a file within the package."""
    return path.relative_to(PACKAGE).as_posix()


@cache
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


def wrong_directions(path: Path) -> Iterator[str]:
    """What is wrong with the packages that a file imports."""
    own = room(path)
    if own in ("__init__", "__main__", "entrypoints", "assets", "demo", "demo_audio"):
        return
    if own not in ROWS:
        yield f"{own} has no row: add it to the drawing and to this test"
        return
    for name, _, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "sensorium" or len(parts) < 2 or parts[1] not in ROWS:
            continue
        other = parts[1]
        if other == own:
            continue
        if not (ROWS[other] < ROWS[own] or (own, other) in SAME_ROW):
            yield f"{own} imports {name}"
        allowed = MODULES_ALLOWED.get((own, other))
        if allowed is not None and len(parts) > 2 and parts[2] not in allowed:
            yield f"{own} may import only {sorted(allowed)} of {other}: {name}"


def found_in(files: Sequence[Path], check: Callable[[Path], Iterable[str]]) -> dict[str, list[str]]:
    """What is wrong by the name of its file, without files that nothing is wrong with.

    One test looks at all files: as a test each, they were a quarter of all tests, which every
    process of a run would collect.
    """
    found = {short(path): list(check(path)) for path in files}
    return {name: wrong for name, wrong in found.items() if wrong}


def test_directions() -> None:
    assert found_in(FILES, wrong_directions) == {}


def inner_room(parts: Sequence[str], order: Mapping[str, int]) -> str:
    """Module or folder of a package that a path below it belongs to, as ``order`` names it."""
    names = [part.removesuffix(".py") for part in parts]
    return ".".join(names[:2]) if ".".join(names[:2]) in order else names[0]


def wrong_inner_directions(path: Path) -> Iterator[str]:
    """What is wrong with the rooms of its own package that a file imports."""
    package = room(path)
    order = {name: row for row, names in enumerate(INNER_ORDER[package]) for name in names}
    own = inner_room(path.relative_to(PACKAGE / package).parts, order)
    if own not in order:
        yield f"{own} of {package} has no place: add it to INNER_ORDER"
        return
    for name, _, typing_only in imports(path):
        parts = name.split(".")
        if parts[:2] != ["sensorium", package] or len(parts) < 3 or typing_only:
            continue
        other = inner_room(parts[2:], order)
        if other.split(".")[0] == own.split(".")[0] or other not in order:
            continue
        beside = order[other] == order[own] and not (PACKAGE / package / other).is_dir()
        if not (order[other] < order[own] or beside):
            yield f"{package}/{own} imports {name}"


def test_inner_directions() -> None:
    inner = [p for p in FILES if p.parent != PACKAGE and p.name != "__init__.py"]
    inner = [p for p in inner if room(p) in INNER_ORDER]
    assert {room(path) for path in inner} == set(INNER_ORDER)
    assert found_in(inner, wrong_inner_directions) == {}


def test_folders_are_small() -> None:
    for folder in {path.parent for path in FILES}:
        names = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert len(names) <= MOST_FILES, f"{folder.relative_to(PACKAGE)}: {len(names)} files"


def too_long(path: Path) -> Iterator[str]:
    """The file, if it is too long, and each function that is."""
    text = path.read_text()
    if (num_lines := text.count("\n")) > MOST_LINES:
        yield f"has {num_lines} lines: split it where a reader would"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if num_lines > MOST_FUNCTION_LINES:
                yield f"{node.name} has {num_lines} lines"


def test_files_and_functions_are_short() -> None:
    """Kernels apart: a kernel is one long loop, and calls in it would cost."""
    assert found_in([p for p in FILES if room(p) != "kernels"], too_long) == {}


def links_of_architecture() -> Iterator[tuple[str, str]]:
    """(dotted name, file) of each link of docs/architecture.md to a class or function."""
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    yield from re.findall(r"\[`([\w.]+)`\]\(\.\./(src/[^)]+\.py)\)", page)


def test_the_steps_of_a_request_name_what_there_is() -> None:
    found = list(links_of_architecture())
    assert len(found) >= 10
    for name, file in found:
        node: ast.AST = ast.parse((PACKAGE.parents[1] / file).read_text())
        for part in name.split("."):
            named = [
                child
                for child in ast.walk(node)
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and child.name == part
            ]
            assert named, f"docs/architecture.md: {file} has no {name}"
            node = named[0]


def test_the_tree_names_each_folder() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    tree = page.partition("```\nsrc/sensorium/")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+)/", tree))
    folders = {path.parent.name for path in FILES if path.parent != PACKAGE}
    assert folders <= named, f"not in the tree of docs/architecture.md: {folders - named}"


def wrong_foreign_imports(path: Path) -> Iterator[str]:
    """What is wrong with the libraries that a file imports."""
    own = room(path)
    for name, top, typing_only in imports(path):
        root = name.split(".")[0]
        if root in EVERYWHERE_LAZY and top:
            yield f"{name} must be imported inside a function"
        if (
            (root in FORBIDDEN.get(own, set()) and not typing_only)
            or (root in ONLY_SERVER and own not in ("server", "cli", "ray"))
            or (root in ONLY_RAY and own != "ray")
        ):
            yield f"{own} imports {name}"


def test_foreign_imports() -> None:
    assert found_in(FILES, wrong_foreign_imports) == {}


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


PRIVATE_NAMES = {
    # Uses in tests of what the package keeps to itself, at most so many by folder. A new test goes
    # through a door: parts that it makes itself (tests/parts.py), a snapshot, what users see.
    ".": 1,
    "core": 2,
    "engine": 28,
    "gpu": 1,
    "multimodal": 13,
    "runtime": 2,
    "text": 6,
    "training": 5,
}


def test_private_names_stay_private() -> None:
    """Numbers may only fall; whoever makes one fall lowers it here."""
    grown = {
        folder: number
        for folder, number in uses_by_folder().items()
        if number > PRIVATE_NAMES.get(folder, 0)
    }
    assert grown == {}, "tests use more names of others that begin with an underscore"


def test_importing_sensorium_is_light() -> None:
    """`import sensorium` must not load torch: the command line and the HTTP process start fast."""
    import subprocess
    import sys

    heavy = ("torch", "transformers", "fastapi", "numba", "ray", "pyarrow")
    code = f"import sys, sensorium; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"
