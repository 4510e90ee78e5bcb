"""``sensorium bench startup``: from starting a process to its first token."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sensorium import progress
from sensorium.bench import report
from sensorium.errors import ConfigError

STAGES = ("interpreter_seconds", "import_seconds", "load_seconds", "first_token_seconds")
"""Stages of a start in order; ``total_seconds`` is their sum."""
TAIL_BYTES = 2000
T = TypeVar("T")


def run(arguments: argparse.Namespace, keywords: Mapping[str, Any]) -> int:
    """Start processes one after another, print medians and write all values."""
    settings = {"runs": arguments.runs, "cold_runs": arguments.cold_runs}
    if arguments.command is not None:
        seconds = _repeated(
            arguments.runs, lambda: time_command(arguments.command, arguments.timeout)
        )
        results = {
            **report.header("startup", {**settings, "command": arguments.command}),
            "total_seconds": report.summary_dict(seconds),
        }
        print(
            f"first output after {results['total_seconds']['p50']:.2f} s, "
            f"median of {arguments.runs}"
        )
    else:
        results = report.header("startup", {**settings, "engine": report.plain(keywords)})
        for name, num_runs in (("cold", arguments.cold_runs), ("warm", arguments.runs)):
            start = functools.partial(
                time_start, keywords, cold=name == "cold", timeout=arguments.timeout
            )
            results[name] = _summaries(_repeated(num_runs, start))
        print(table(results))
    if arguments.output is not None:
        report.write_json(results, arguments.output)
    return 0


def _repeated(number: int, start: Callable[[], T]) -> list[T]:
    """Return the results of so many starts, and show how many are done."""
    results = []
    with progress.bar("Starts", number, unit="starts") as shown:
        for _ in range(number):
            results.append(start())
            shown.update()
    return results


def time_start(keywords: Mapping[str, Any], *, cold: bool, timeout: float) -> dict[str, float]:
    """Return the seconds of each stage of one start.

    Args:
        keywords: of ``LLM``.
        cold: use an empty folder for compiled kernels.
        timeout: seconds for the process.

    Raises:
        ConfigError: the process failed; the message has the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as empty:
        environment = dict(os.environ)
        if cold:
            environment.setdefault("HF_HOME", str(_cache_home() / "huggingface"))
            environment["XDG_CACHE_HOME"] = empty
        command = [sys.executable, "-m", "sensorium.bench.first_token", json.dumps(dict(keywords))]
        begin = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
        )
    if done.returncode != 0:
        raise ConfigError(f"The started process failed: {done.stderr[-TAIL_BYTES:].strip()}")
    marks = json.loads(done.stdout.splitlines()[-1])
    moments = [begin, *(marks[n] for n in ("started", "imported", "loaded", "first_token"))]
    seconds = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return {**dict(zip(STAGES, seconds, strict=True)), "total_seconds": moments[-1] - begin}


def time_command(command: str, timeout: float) -> float:
    """Return the seconds until a command writes non-blank output to stdout; it is then stopped.

    Raises:
        ConfigError: the command cannot be run, ends without output, or takes longer than
            ``timeout`` seconds.
    """
    begin = time.monotonic()
    try:
        words = shlex.split(command)
        if not words:
            raise ValueError("it is empty")
        process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The command cannot be run: {error}.", param="command") from error
    assert process.stdout is not None
    try:
        while (left := begin + timeout - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                continue
            written = os.read(process.stdout.fileno(), 1 << 16)
            if written.strip():
                return time.monotonic() - begin
            if not written:
                raise ConfigError("The command ended without any output.", param="command")
        raise ConfigError(f"The command wrote nothing within {timeout:g} s.", param="command")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.stdout.close()
        process.wait()


def table(results: Mapping[str, Any]) -> str:
    """Return a table with the medians of the stages, cold and warm."""
    lines = [f"{'seconds (median)':<24}{'cold':>10}{'warm':>10}"]
    for stage in (*STAGES, "total_seconds"):
        cells = []
        for name in ("cold", "warm"):
            summary = results[name][stage]
            cells.append(f"{'-' if summary is None else format(summary['p50'], '.2f'):>10}")
        lines.append(f"{stage.removesuffix('_seconds').replace('_', ' '):<24}" + "".join(cells))
    lines.append("cold: the CPU kernels are compiled; warm: they come from the cache on disk")
    return "\n".join(lines)


def _summaries(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        stage: report.summary_dict([run[stage] for run in runs])
        for stage in (*STAGES, "total_seconds")
    }


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
