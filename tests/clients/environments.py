"""Environments of the clients, each of its own: ``python -m tests.clients.environments`` installs them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "clients"
CACHE = Path.home() / ".cache/sensorium/clients"
PACKAGES: dict[str, tuple[str, ...]] = {
    "openai": ("openai", "pydantic"),
    "agents": ("openai-agents",),
    "anthropic": ("anthropic",),
    "instructor": ("instructor",),
    "langchain": ("langchain-openai",),
    "litellm": ("litellm",),
    "llamaindex": ("llama-index-core", "llama-index-llms-openai-like"),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
}
"""Packages of an environment for Python. ``openai`` and ``anthropic`` are among our own tests', too."""
NODE: dict[str, Path] = {"ai_sdk": HERE / "ai_sdk", "node": EXAMPLES / "node"}
"""Folders of programs for node, whose ``package.json`` is an environment."""


def python_of(name: str, cache: Path = CACHE) -> Path:
    """The interpreter of an environment, be it there or not."""
    return cache / name / "bin/python"


def is_installed(name: str, cache: Path = CACHE) -> bool:
    """Whether an environment is there, whole."""
    return (cache / name / "complete").exists()


def install(name: str, cache: Path = CACHE) -> None:
    """Install an environment, or the newest versions into one that is there."""
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    if name in NODE:
        for file in NODE[name].iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        subprocess.run(["npm", "install", "--silent", "--no-audit"], cwd=folder, check=True)
    else:
        python = python_of(name, cache)
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--upgrade", *PACKAGES[name]], check=True
        )
    (folder / "complete").touch()


def versions(name: str, cache: Path = CACHE) -> str:
    """The versions of an environment's packages."""
    folder = cache / name
    if name in NODE:
        listed = subprocess.run(
            ["npm", "ls", "--depth=0", "--parseable", "--long"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return ", ".join(line.split(":")[1] for line in listed.stdout.splitlines()[1:])
    ask = "import importlib.metadata as m, sys; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
    names = [package.partition("[")[0] for package in PACKAGES[name]]
    found = subprocess.check_output([python_of(name, cache), "-c", ask, *names], text=True)
    return found.strip()


def main() -> None:
    """Install the environments that the command line names, or all of them."""
    known = [*PACKAGES, *NODE]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    for name in options.names or known:
        if name not in known:
            parser.error(f"no such environment: {name}")
        install(name, options.cache)
        print(f"{name}: {versions(name, options.cache)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
