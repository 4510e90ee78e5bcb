"""Memory for caches that the system commits on first write, in huge pages.

A KV cache is sized for as many sequences as may ever run, and most of it stays unwritten for long:
touching all of it at the start would take gigabytes for a model of megabytes.

With pages of 4 KiB, reading caches and weights waits for address translation: on the machine this
was measured on, sums over a large tensor ran at 19 GB/s with them and at 27 GB/s with pages of 2
MiB, attention over long contexts gained a fifth. Linux gives such pages out on request. (Weights
lie in memory of oneDNN's: see ``threads.prepare``.)
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return ``torch.zeros`` in private memory that is committed page by page on first write.

    Huge pages where whole ones fit and the system has them. Raises MemoryError when the system
    cannot reserve as much.
    """
    num_values = math.prod(shape)
    if num_values == 0 or not sys.platform.startswith("linux"):
        return torch.zeros(shape, dtype=dtype)
    num_bytes = num_values * dtype.itemsize
    try:
        # Private: a forked child that writes would change the parent's, and shared pages count
        # differently towards the memory limit.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system cannot reserve {num_bytes} bytes for a cache") from error
    with contextlib.suppress(OSError):  # without huge pages everything still works
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)
