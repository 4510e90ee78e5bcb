"""Kernels that several processes want at once are compiled once."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sensorium.kernels.cpu import launch
from sensorium.kernels.cpu.compiler import cache
from sensorium.processes.start import child_environment

KERNEL = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import numba
from numba import types
from numba.core.typing import signature
from sensorium.kernels.cpu import launch

@numba.extending.intrinsic
def slow(typingctx):
    def codegen(context, builder, sig, args):
        print("compiles", flush=True)
        sys.stdin.readline()
        return context.get_constant(types.int64, 42)
    return types.int64(), codegen

def answer(args):
    args[3] = slow()

args = launch.pack(0, 0)
print("starts", flush=True)
launch.compile_kernel(answer, "any").serial(args)
print(args[3], flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Return a function that starts a process which compiles a kernel until it reads a line."""
    environment = child_environment() | {"XDG_CACHE_HOME": str(tmp_path)}

    with ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", KERNEL]
            process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


WAITS = "waiting for another process, which compiles the CPU kernel answer_any"


def next_line(process: subprocess.Popen[str], *skipped: str) -> str:
    """Return the next line of a process that begins with none of some words."""
    assert process.stdout is not None
    return next(line.strip() for line in process.stdout if not line.startswith(skipped))


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_of_several_processes_one_compiles_a_kernel(start: Any) -> None:
    """The others wait and load it; where it dies, one of them compiles."""
    processes = [start(), start(), start()]
    lines = {process: next_line(process, "starts", "compiling") for process in processes}
    assert sorted(lines.values()) == ["compiles", WAITS, WAITS]
    (first,) = (process for process, line in lines.items() if line == "compiles")
    first.send_signal(signal.SIGKILL)
    for process in processes:
        if process is not first:
            go_on(process)
    assert sorted("".join(p.stdout).split() for p in processes if p is not first) == [
        ["42"],
        ["compiles", "42"],
    ]


def compile_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile and run a kernel; return the kinds of files that are in its folder then."""

    def count(args: Any) -> None:
        args[3] = 42

    for module in (cache, launch):
        monkeypatch.setattr(module, "cache_folder", lambda: folder)
    args = launch.pack(0, 0)
    launch.compile_kernel(count, "any").serial(args)
    assert args[3] == 42
    return sorted(path.suffix for path in folder.iterdir())


FILES = [".lock", ".nbc", ".nbi"]


def test_a_process_that_does_not_get_on_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with a warning: no later kernel is waited for."""
    assert compile_one(tmp_path, monkeypatch) == FILES
    for path in tmp_path.glob("*.nb?"):
        path.unlink()
    (lock,) = tmp_path.iterdir()
    late: list[str] = []
    monkeypatch.setattr(cache, "MOST_WAITING", 0.0)
    monkeypatch.setattr(cache, "LATE", late)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert compile_one(tmp_path, monkeypatch) == FILES
        assert len(late) == 1
        assert [str(lock) in record.getMessage() for record in caplog.records] == [True]
        monkeypatch.setattr(cache, "MOST_WAITING", 1e9)
        for path in tmp_path.glob("*.nb?"):
            path.unlink()
        assert compile_one(tmp_path, monkeypatch) == FILES


def test_a_file_system_without_locks_keeps_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert compile_one(tmp_path, monkeypatch) == FILES
