"""What the processes that are started from here have in common: their environment, their limits, their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
    *("RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"),
)
_LIBC = ctypes.CDLL(None)  # loaded here, for after a fork it may be too late
_PR_SET_PDEATHSIG = 1
STACK_BYTES = 1 << 20
"""Of a thread in a process whose memory is limited; the default is 8 MiB."""
_ATTRIBUTES_BYTES = 256
"""More than a ``pthread_attr_t`` has anywhere."""
_ENDED_ITSELF = 0
_LEAST_AVAILABLE = 1 << 28


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


def lower(kind: int, most: int) -> None:
    """Lower a limit of this process to ``most``, for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (limit, limit))


def limit_memory(num_bytes: int) -> None:
    """Let this process have no more than ``num_bytes`` of memory of its own beyond what it has, and dump no core.

    Private memory that can be written to counts (the heap, anonymous mappings), addresses that are only reserved do
    not. The stacks of threads that start from now on, which count whole, become small: ``STACK_BYTES``.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        kib = next(line.split()[1] for line in file if line.startswith("VmData:"))
    lower(resource.RLIMIT_DATA, int(kib) * 1024 + num_bytes)
    lower(resource.RLIMIT_CORE, 0)
    _shrink_stacks()


def _shrink_stacks() -> None:
    """Set the size of the stacks of threads for which a library asks for no other; where that cannot be, they stay."""
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    with contextlib.suppress(AttributeError):  # another C library than glibc and musl
        _LIBC.pthread_attr_init(attributes)
        _LIBC.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK_BYTES))
        _LIBC.pthread_setattr_default_np(attributes)


def available_memory() -> int:
    """Return the bytes of memory that are available on this host, or to its control group where that has less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text()))
    except (OSError, ValueError):
        return available
    return max(available, _LEAST_AVAILABLE)


def silence_libraries() -> TextIO:
    """Point the error output at nothing; returns where it went, for our own lines."""
    log = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    return log
