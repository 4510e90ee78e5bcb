"""Huge pages for memory that every step reads from end to end.

With pages of 4 KiB, reading caches and weights waits for address translation: on the machine this was measured on, sums
over a large tensor ran at 19 GB/s with them and at 27 GB/s with pages of 2 MiB, attention over long contexts gained a
fifth. Linux gives such pages out on request. (Weights lie in memory of oneDNN's: see ``threads.prepare``.)
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

PAGE_BYTES = 2 * 1024 * 1024
_HUGEPAGE = 14  # MADV_HUGEPAGE of madvise(2)


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``torch.zeros``, on huge pages where whole ones fit and the system has them.

    The memory is taken from the system when it is first written.
    """
    tensor = torch.zeros(shape, dtype=dtype)
    address = tensor.data_ptr()
    start = -(-address // PAGE_BYTES) * PAGE_BYTES
    length = (address + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES - start
    call = _madvise()
    if call is not None and length > 0:
        call(start, length, _HUGEPAGE)  # a system that refuses leaves everything as it was
    return tensor
