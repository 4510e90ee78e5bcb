"""Serve the demo model and count the valid answers that real clients get of it.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.serving import Server

HERE = Path(__file__).parent
PACKAGES: dict[str, tuple[str, ...]] = {
    "openai": ("openai", "pydantic"),
    "instructor": ("instructor",),
    "langchain": ("langchain-openai",),
    "llamaindex": ("llama-index-core", "llama-index-llms-openai-like"),
    "litellm": ("litellm",),
}
AI_SDK = "ai_sdk"
SECONDS = 900
"""What one client may take for all its cases."""


def main() -> int:
    """Run the clients that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "clients", nargs="*", help=f"of {', '.join((*PACKAGES, AI_SDK))}; default: all"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/sensorium/clients")
    parser.add_argument(
        "--url", help="base URL of a server that runs; default: start one with the demo"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=20, help="how often each case is asked")
    options = parser.parse_args()
    names = options.clients or [*PACKAGES, AI_SDK]
    unknown = set(names) - {*PACKAGES, AI_SDK}
    if unknown:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    results: list[dict[str, Any]] = []
    with _served(options.url, options.cache) as url:
        for name in names:
            command, versions = _prepared(name, options.cache)
            print(f"# {name}: {versions}", flush=True)
            results += _run(name, [*command, url, options.model, str(options.count)])
    for result in results:
        print(f"{result['valid']:3} of {result['of']:3}  {result['client']}: {result['case']}")
    return int(any(result["valid"] < result["of"] for result in results))


@contextlib.contextmanager
def _served(url: str | None, cache: Path) -> Iterator[str]:
    """The base URL of the API."""
    if url is not None:
        yield url
        return
    cache.mkdir(parents=True, exist_ok=True)
    print(f"# sensorium {importlib.metadata.version('sensorium')}, demo", flush=True)
    server = Server("demo", cache / "server.log")
    try:
        yield f"{server.url}/v1"
    finally:
        server.stop()


def _prepared(name: str, cache: Path) -> tuple[list[str], str]:
    """The command that runs a client, installed where it is not yet, and the versions of its
    packages.
    """
    folder = cache / name
    if name == AI_SDK:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (HERE / AI_SDK).iterdir():
            shutil.copy(file, folder)
        subprocess.run(["npm", "install", "--silent", "--no-audit"], cwd=folder, check=True)
        listed = subprocess.run(
            ["npm", "ls", "--depth=0", "--parseable", "--long"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        versions = [line.split(":")[1] for line in listed.stdout.splitlines()[1:]]
        return ["node", str(folder / "client.mjs")], ", ".join(versions)
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    ask = "import importlib.metadata as m, sys; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
    versions = subprocess.check_output([python, "-c", ask, *PACKAGES[name]], text=True)
    return [str(python), str(HERE / f"{name}_client.py")], versions.strip()


def _run(name: str, command: list[str]) -> list[dict[str, Any]]:
    """The results of a client; what else it writes goes to the terminal."""
    environment = {**os.environ, "OPENAI_API_KEY": "none", "LITELLM_LOG": "ERROR"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, timeout=SECONDS
    )
    results = []
    for line in done.stdout.splitlines():
        print(line, flush=True)
        if line.startswith("{"):
            results.append({"client": name, **json.loads(line)})
    if done.returncode or not results:
        results.append(
            {"client": name, "case": f"ended with {done.returncode}", "valid": 0, "of": 1}
        )
    return results


if __name__ == "__main__":
    sys.exit(main())
