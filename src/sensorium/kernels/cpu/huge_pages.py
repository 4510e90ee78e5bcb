"""Memory for caches that the system commits on first write, in huge pages.

A KV cache is sized for as many sequences as may ever run, and most of it stays unwritten for long:
touching all of it at the start would take gigabytes for a model of megabytes.

With pages of 4 KiB, reading caches and weights waits for address translation: on the machine this
was measured on, sums over a large tensor ran at 19 GB/s with them and at 27 GB/s with pages of 2
MiB, attention over long contexts gained a fifth. Linux gives such pages out on request. (Weights in
oneDNN's layout lie in its memory: see ``threads.prepare``.)
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import torch

PAGE_BYTES = 2 * 1024 * 1024
LINE_BYTES = 64
SLAB_BYTES = 64 * 1024 * 1024
"""Memory of small weights that is reserved at once, and taken from the system as it is written."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return ``torch.zeros`` in private memory that is committed page by page on first write.

    Huge pages where whole ones fit and the system has them. Raises MemoryError when the system
    cannot reserve as much.
    """
    num_values = math.prod(shape)
    if num_values == 0 or not sys.platform.startswith("linux"):
        return torch.zeros(shape, dtype=dtype)
    num_bytes = num_values * dtype.itemsize
    memory = _reserved(num_bytes)
    return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)


class _Slab:
    """Memory that several weights share, as whole huge pages; held by the weights alone."""

    def __init__(self, num_bytes: int) -> None:
        memory = _reserved(num_bytes + PAGE_BYTES)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.size, self.used, self.offset = num_bytes, 0, -start % PAGE_BYTES
        self._memory = weakref.ref(memory)
        self._first: mmap.mmap | None = memory

    def take(self, num_bytes: int) -> tuple[mmap.mmap, int] | None:
        """Return the memory and the offset of so many bytes of it; None if there are not."""
        memory, self._first = self._memory(), None
        if memory is None or self.used + num_bytes > self.size:
            return None
        at = self.offset + self.used
        self.used += -(-num_bytes // LINE_BYTES) * LINE_BYTES
        return memory, at


_LOCK = threading.Lock()
_SLABS: list[_Slab] = []
"""The slab that is being filled."""
_SHORT_LIVED: ContextVar[bool] = ContextVar("_SHORT_LIVED", default=False)


@contextlib.contextmanager
def short_lived() -> Iterator[None]:
    """Let ``shared_zeros`` share no pages in this context: what is made in it does not stay.

    In a slab its place would be lost for as long as a weight beside it stays.
    """
    token = _SHORT_LIVED.set(True)
    try:
        yield
    finally:
        _SHORT_LIVED.reset(token)


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return ``zeros`` for a weight, which may share its pages with other weights.

    A weight of less than some megabytes has few huge pages of its own or none. The pages are given
    back when the last weight in a slab of ``SLAB_BYTES`` is gone. Begins at a whole cache line.
    """
    num_values = math.prod(shape)
    if num_values == 0 or not sys.platform.startswith("linux") or _SHORT_LIVED.get():
        return torch.zeros(shape, dtype=dtype)
    num_bytes = num_values * dtype.itemsize
    with _LOCK:
        place = _SLABS[0].take(num_bytes) if _SLABS and num_bytes < SLAB_BYTES else None
        if place is None:
            slab = _Slab(max(num_bytes, SLAB_BYTES))
            place = slab.take(num_bytes)
            if num_bytes < SLAB_BYTES:
                _SLABS[:] = [slab]
    assert place is not None
    memory, offset = place
    return torch.frombuffer(memory, dtype=dtype, count=num_values, offset=offset).view(shape)


def _reserved(num_bytes: int) -> mmap.mmap:
    """Return private memory of zeros in huge pages. Raises MemoryError."""
    try:
        # Private: a forked child that writes would change the parent's, and shared pages count
        # differently towards the memory limit.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system cannot reserve {num_bytes} bytes") from error
    with contextlib.suppress(OSError):  # without huge pages everything still works
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
