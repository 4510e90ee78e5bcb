"""What the processes that are started from here have in common: their environment, their limits, their end."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from typing import TextIO

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_LIBC = ctypes.CDLL(None)  # loaded here, for after a fork it may be too late
_PR_SET_PDEATHSIG = 1
_ENDED_ITSELF = 0


def python_module(name: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module of this package, whatever lies in the working folder."""
    return (sys.executable, "-P", "-m", name, *arguments)


def child_environment(*, one_thread: bool = False) -> dict[str, str]:
    """The caller's environment, with the import path under which this package was found.

    ``one_thread``: libraries start no threads of their own, as in a process that is to fork.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    if one_thread:
        environment |= dict.fromkeys(_THREADS, "1")
    return environment


def end_with(parent_id: int) -> None:
    """Let the kernel end this process, just forked, when its parent ends; at once if that is so already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        os._exit(_ENDED_ITSELF)


def lower(kind: int, most: int) -> None:
    """Lower a limit of this process to ``most``, for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (limit, limit))


def limit_memory(num_bytes: int) -> None:
    """Let this process map no more than ``num_bytes`` beyond what it has mapped, and dump no core."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    lower(resource.RLIMIT_AS, mapped + num_bytes)
    lower(resource.RLIMIT_CORE, 0)


def silence_libraries() -> TextIO:
    """Point the error output at nothing; returns where it went, for our own lines."""
    log = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    return log
