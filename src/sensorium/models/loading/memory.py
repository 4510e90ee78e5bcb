"""Memory of weights while they are loaded: mapped files, a scratch buffer, and copies of these."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import sys
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch

from sensorium.kernels.cpu import huge_pages

_LIBC = ctypes.CDLL(None)
_ALIGNMENT = 64

Range = tuple[int, int]
"""Addresses of the first byte and of the first behind the last."""

_LENT: ContextVar[tuple[Range, ...] | None] = ContextVar("_LENT", default=None)


@contextlib.contextmanager
def lent(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Mark the memory of these tensors, and no other, as lent in this context: see ``owned``."""
    token = _LENT.set(tuple(extent(tensor) for tensor in tensors))
    try:
        yield
    finally:
        _LENT.reset(token)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy where the tensor is in memory that is lent, such as a mapped file.

    A file that changes must not change a running model. Outside ``lent`` any memory of the CPU may
    be lent.
    """
    if tensor.device.type != "cpu":
        return tensor
    ranges, start = _LENT.get(), tensor.data_ptr()
    if ranges is not None and not any(first <= start < end for first, end in ranges):
        return tensor
    return tensor.clone()


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all tensors; without a copy where they lie one behind the other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        beside = tensor.is_contiguous() and tensor.data_ptr() == place
        if not beside or tensor.untyped_storage().data_ptr() != storage:
            return torch.cat(list(tensors))
        place += tensor.nbytes
    num_rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((num_rows, *first.shape[1:]), first.stride())


class Scratch:
    """Buffer that is used again for each slot.

    New memory would have to be cleared by the system each time.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def filled(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Copy tensors, converted, one behind the other; valid until the next call."""
        num_values = sum(tensor.numel() for tensor in tensors)
        num_bytes = num_values * dtype.itemsize
        if num_bytes > self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = huge_pages.zeros((num_bytes + _ALIGNMENT,), torch.uint8)
        values = self._buffer[:num_bytes].view(dtype)
        parts = values.split([tensor.numel() for tensor in tensors])
        copies = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        return copies


class MappedFiles:
    """The parts of this process's memory that are mappings of some files.

    Only their pages are given back: those of other memory would lose what they hold.
    """

    def __init__(self, paths: Collection[Path]) -> None:
        self.ranges = sorted(_mappings({str(path.resolve()) for path in paths}))

    def read_ahead(self, tensor: torch.Tensor) -> None:
        """Let the system read what a tensor holds, without waiting for it."""
        self._advise(tensor, getattr(mmap, "MADV_WILLNEED", 3), whole=False)

    def give_back(self, tensor: torch.Tensor) -> None:
        """Take a tensor's pages out of this process; they are read again when they are used."""
        self._advise(tensor, getattr(mmap, "MADV_DONTNEED", 4), whole=True)

    def _advise(self, tensor: torch.Tensor, advice: int, *, whole: bool) -> None:
        """Give advice on a tensor's pages; only on those that it fills, with ``whole``."""
        first, end = extent(tensor)
        index = bisect.bisect_right(self.ranges, (first, sys.maxsize)) - 1
        if index < 0 or end > self.ranges[index][1]:
            return
        size = mmap.PAGESIZE
        first = -(-first // size) * size if whole else first // size * size
        if whole:
            end = end // size * size
        if end > first:
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


def extent(tensor: torch.Tensor) -> Range:
    """Return the addresses between which a tensor lies, also one with gaps between its rows."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return start, start + (last + 1) * tensor.itemsize


def _mappings(paths: Collection[str]) -> Iterator[Range]:
    """Addresses at which files are mapped; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths:
            first, _, end = fields[0].partition("-")
            yield int(first, 16), int(end, 16)
