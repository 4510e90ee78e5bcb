"""Limits of the memory and files of a process, and how much memory there is."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

_LIBC = ctypes.CDLL(None)  # loaded here, for after a fork it may be too late
STACK_BYTES = 1 << 20
"""Size of the stack of a thread in a process whose memory is limited; the default is 8 MiB."""
_ATTRIBUTES_BYTES = 256
"""More than a ``pthread_attr_t`` has anywhere."""
_LEAST_AVAILABLE = 1 << 28


def lower(kind: int, most: int) -> None:
    """Lower a limit of this process to ``most``, for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (limit, limit))


def limit_memory(num_bytes: int) -> None:
    """Limit this process to ``num_bytes`` more memory than it has, and to no core dump.

    Private memory that can be written to counts (the heap, anonymous mappings), addresses that are
    only reserved do not. The stacks of threads that start from now on, which count whole, become
    small: ``STACK_BYTES``.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        kib = next(line.split()[1] for line in file if line.startswith("VmData:"))
    lower(resource.RLIMIT_DATA, int(kib) * 1024 + num_bytes)
    lower(resource.RLIMIT_CORE, 0)
    _shrink_stacks()


def _shrink_stacks() -> None:
    """Set the size of the stacks of threads for which a library asks for no other.

    Where that cannot be, they stay.
    """
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    with contextlib.suppress(AttributeError):  # another C library than glibc and musl
        _LIBC.pthread_attr_init(attributes)
        _LIBC.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK_BYTES))
        _LIBC.pthread_setattr_default_np(attributes)


def available_memory() -> int:
    """Return the bytes of memory that this host or its control group has available."""
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


def total_memory() -> int:
    """Return the bytes of memory of this host, or a lower limit of its control group."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return total


def resident_memory() -> int:
    """Return the bytes of memory that this process has taken, pages of files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)
