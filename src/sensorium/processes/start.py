"""How processes of this program are started, and how they begin."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

_THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
    *("RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"),
)
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


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Start processes in here whose program decides itself when to end: Ctrl-C does not reach them.

    A terminal interrupts the whole process group. A process that is only starting has no say in it yet, and Python
    would end it with a traceback; the mask of signals is inherited, so that it may take its time to ignore them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent_id: int) -> None:
    """Let the kernel end this process, just forked, when its parent ends; at once if that is so already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        os._exit(_ENDED_ITSELF)


def silence_libraries() -> TextIO:
    """Point the error output at nothing; returns where it went, for our own lines."""
    log = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    return log
