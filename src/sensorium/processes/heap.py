"""Return of freed memory to the system while a model is loaded.

glibc serves an allocation of up to 32 MiB from its heap once memory of that size has been freed.
Buffers of some megabytes that come and go between weights that stay leave holes there, which were a
fifth of the memory of a small model after loading.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LOADING_BYTES = 16 << 20
"""Size from which an allocation gets pages of its own while a model is loaded. Smaller ones share
huge pages in the heap, which separate mappings would not."""
_RUNNING_BYTES = 32 << 20
"""The same afterwards: what glibc itself arrives at in a program that frees large buffers. Steps
reuse their buffers then."""


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return freed memory to the system in this context, and what is left over at its end.

    Does nothing where the user has chosen the allocator's settings, or with another C library.
    """
    if not hasattr(_LIBC, "mallopt") or not hasattr(_LIBC, "malloc_trim") or _is_configured():
        yield
        return
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        _LIBC.malloc_trim(0)
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _RUNNING_BYTES)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING_BYTES)


def return_freed() -> None:
    """Return freed memory that lies between what is in use to the system, at once."""
    if hasattr(_LIBC, "malloc_trim") and not _is_configured():
        _LIBC.malloc_trim(0)


def _is_configured() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    names = ("mmap_threshold", "trim_threshold")
    return any(name in tunables for name in names) or any(
        f"MALLOC_{name.upper()}_" in os.environ for name in names
    )
