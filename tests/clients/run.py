"""Serve the demo model and count the valid answers that real clients get of it.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients.environments import CACHE, HERE, NODE, install, python_of, versions
from tests.e2e.serving import Server

AI_SDK = "ai_sdk"
PYTHON = ("openai", "instructor", "langchain", "llamaindex", "litellm")
SECONDS = 900
"""What one client may take for all its cases."""


def main() -> int:
    """Run the clients that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "clients", nargs="*", help=f"of {', '.join((*PYTHON, AI_SDK))}; default: all"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument(
        "--url", help="base URL of a server that runs; default: start one with the demo"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=20, help="how often each case is asked")
    options = parser.parse_args()
    names = options.clients or [*PYTHON, AI_SDK]
    unknown = set(names) - {*PYTHON, AI_SDK}
    if unknown:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    results: list[dict[str, Any]] = []
    with _served(options.url, options.cache) as url:
        for name in names:
            install(name, options.cache)
            print(f"# {name}: {versions(name, options.cache)}", flush=True)
            command = _command(name, options.cache)
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


def _command(name: str, cache: Path) -> list[str]:
    """The command that runs a client."""
    if name in NODE:
        return ["node", str(cache / name / "client.mjs")]
    return [str(python_of(name, cache)), str(HERE / f"{name}_client.py")]


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
