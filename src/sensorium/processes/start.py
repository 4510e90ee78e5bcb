"""Start, common beginning and quick end of child processes."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Collection, Iterator
from typing import NoReturn, TextIO

from sensorium import environment

_THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
    *("RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"),
)
_NO_POOLS = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Settings of libraries that start a thread per core when they are imported or first used, and are
given nothing here that they could share among them."""
_LIBC = ctypes.CDLL(None)  # loaded here, for after a fork it may be too late
_PR_SET_PDEATHSIG = 1
_ENDED_ITSELF = 0


def python_module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module of this package from any working folder."""
    return (sys.executable, "-P", "-m", name, *arguments)


def child_environment(*, one_thread: bool = False) -> dict[str, str]:
    """Return the caller's environment, with the import path under which this package was found.

    ``one_thread``: libraries start no threads of their own, as in a process that is to fork.
    """
    variables = _NO_POOLS | os.environ
    variables["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    if one_thread:
        variables |= dict.fromkeys(_THREADS, "1")
    return variables


def forgo_pools() -> None:
    """Keep numpy and the tokenizers of this process from starting a thread per core.

    For a program of our own, before they are imported; what the environment sets is kept.
    """
    for name, value in _NO_POOLS.items():
        os.environ.setdefault(name, value)


STOPS = frozenset({signal.SIGINT, signal.SIGTERM})
"""Signals that ask a program to stop."""


@contextlib.contextmanager
def interrupts_held(held: Collection[signal.Signals] = (signal.SIGINT,)) -> Iterator[None]:
    """Block Ctrl-C for the processes that are started in this context.

    A terminal interrupts the whole process group, and Python ends a process with a traceback that
    has not come to ``begin_child`` yet. The mask of signals is inherited, and stays. ``held``: the
    signals to block; for this process, they come at the end of the context or when it unblocks
    them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child() -> None:
    """Begin a process that another one of this program has started.

    It ignores signals of its group, and logs.

    A terminal interrupts the whole process group, and a supervisor terminates all processes of a
    service. The process in front decides when to stop, and lets running requests finish.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=environment.log_level(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def end_with(parent_id: int) -> None:
    """Let the kernel end this process, just forked, when its parent ends.

    At once if that is so already.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        os._exit(_ENDED_ITSELF)


def silence_libraries() -> TextIO:
    """Discard what this process writes to its standard output and error.

    Return the error stream from before, for the log.
    """
    log = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    return log


def end_process(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown.

    That takes seconds once torch and compiled kernels are loaded, and the system takes all of it
    back anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
