"""Files of packed weights: their format, a reader that checks all it reads, and a writer.

A file is ``MAGIC``, then the tensors, each at a multiple of ``ALIGNMENT`` bytes, then an index as
JSON, then the index's length (8 bytes, little endian), its BLAKE3 digest and ``MAGIC`` again. The
index has the key that the file was written under and, for each weight, its class, shape and dtype
and the place, dtype, shape and BLAKE3 digest of each of its tensors. Nothing in a file is executed.

A file is written under another name and renamed when it is whole, so that one of a process that
ended early, or of two that write at once, is never seen. A writer holds a lock on its file; one
without is left behind, and the next writer removes it. Readers copy tensors into memory with huge
pages, from which products read faster than from pages of a file; a file that is replaced or
removed meanwhile stays readable for them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3

from sensorium.environment import make_private
from sensorium.kernels import ops
from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.weight import PackedWeight

MAGIC = b"sensorium-weights-1\n"
ALIGNMENT = 4096
SUFFIX = ".weights"
FREE_BYTES = 1 << 30
"""Space that a writer leaves free on the disk."""
_PART = ".part"
_MOST_INDEX_BYTES = 64 << 20
_DIGEST_BYTES = 32
END_BYTES = 8 + _DIGEST_BYTES + len(MAGIC)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.bfloat16, torch.float16, torch.float32),
    )
}


class DamagedError(Exception):
    """A file is not what a writer made of it."""


class StoredWeights:
    """Weights of an open file, by name. ``load`` may be called by several threads at once."""

    def __init__(self, descriptor: int, size: int, index: Mapping[str, Any]) -> None:
        self._descriptor, self._size, self._index = descriptor, size, index

    @classmethod
    def open(cls, path: Path, key: str) -> StoredWeights | None:
        """Open the file of a key; None when there is none.

        Raises DamagedError for one that is damaged, incomplete, of another key or another user, and
        OSError when it cannot be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise DamagedError("it is no file of this user")
            index = _read_index(descriptor, status.st_size, key)
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # the time of its last use
            return cls(descriptor, status.st_size, index)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def names(self) -> list[str]:
        """Return the names of the weights, in the order in which they were written."""
        return list(self._index)

    def nbytes(self, name: str) -> int:
        """Return how many bytes the tensors of a weight take. Raises DamagedError."""
        try:
            places = self._index[name]["tensors"].values()
            return sum(_layout(place)[2] for place in places)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from error

    def load(self, name: str) -> PackedWeight:
        """Read a weight. Raises DamagedError, or OSError when the disk fails."""
        try:
            entry = self._index[name]
            tensors = {key: self._tensor(place) for key, place in entry["tensors"].items()}
            num_outputs, num_inputs = map(int, entry["shape"])
            kind, dtype = ops.STORED_KINDS[entry["kind"]], _DTYPES[entry["dtype"]]
            return kind.from_tensors(tensors, (num_outputs, num_inputs), dtype)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _tensor(self, place: Mapping[str, Any]) -> torch.Tensor:
        dtype, shape, num_bytes = _layout(place)
        start = int(place["start"])
        if min(shape, default=0) < 0 or start < 0 or start + num_bytes > self._size:
            raise DamagedError("a tensor is not within the file")
        values = huge_pages.shared_zeros((num_bytes,), torch.uint8)
        view = values.numpy().data
        _read_into(self._descriptor, view, start)
        if blake3(view).hexdigest() != place["digest"]:
            raise DamagedError("a checksum is wrong")
        return values.view(dtype).view(shape)


@dataclass(slots=True)
class StoredWriter:
    """A file that grows by weights, and gets its name at the end.

    Files that were used least recently make room for it: then, or earlier where the disk is full.
    """

    target: Path
    key: str
    most_bytes: int
    part: Path
    file: BinaryIO
    index: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, target: Path, key: str, most_bytes: int) -> StoredWriter:
        """Begin the file of a key, in its private folder. Raises OSError."""
        make_private(target.parent)
        _remove_left_behind(target.parent)
        part, file = _locked_part(target)
        file.write(MAGIC)
        return cls(target, key, most_bytes, part, file)

    def write(self, name: str, weight: PackedWeight) -> None:
        """Append a weight. Raises OSError when the disk or the limit refuses it."""
        tensors = weight.tensors()
        size = sum(tensor.nbytes + ALIGNMENT for tensor in tensors.values())
        self._check_limit(self.file.tell() + size)
        self._free_disk(size)
        self.index[name] = {
            "kind": type(weight).__name__,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "tensors": {key: self._append(tensor) for key, tensor in tensors.items()},
        }

    def end(self) -> None:
        """Write the index, make room and give the file its name. Raises OSError."""
        index = json.dumps({"key": self.key, "weights": self.index}).encode()
        self.file.write(index + len(index).to_bytes(8, "little") + blake3(index).digest() + MAGIC)
        self.file.flush()
        size = self.file.tell()
        self._check_limit(size)
        others = [own for own in _by_last_use(self.target.parent) if own[0] != self.target]
        excess = size + sum(num_bytes for _, num_bytes in others) - self.most_bytes
        for path in _first_of(others, excess):
            path.unlink(missing_ok=True)
        os.replace(self.part, self.target)
        self.file.close()  # not before: with the lock it would lose its name to another writer

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.part.unlink()

    def _append(self, tensor: torch.Tensor) -> dict[str, Any]:
        self.file.write(bytes(-self.file.tell() % ALIGNMENT))
        start = self.file.tell()
        view = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self.file.write(view)
        return {
            "start": start,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "digest": blake3(view).hexdigest(),
        }

    def _check_limit(self, size: int) -> None:
        if size > self.most_bytes:
            raise OSError(errno.EFBIG, "they are larger than --weights-cache-gb allows")

    def _free_disk(self, size: int) -> None:
        """Remove other files as far as the disk has no room for so many bytes."""
        folder = self.target.parent
        missing = FREE_BYTES + size - free_bytes(folder)
        others = list(_by_last_use(folder)) if missing > 0 else []
        if missing > sum(num_bytes for _, num_bytes in others):
            raise OSError(errno.ENOSPC, f"less than {FREE_BYTES >> 30} GiB would stay free")
        for path in _first_of(others, missing):
            path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Return how many bytes the disk of a folder has left for this user. Raises OSError."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _locked_part(target: Path) -> tuple[Path, BinaryIO]:
    """Make an unfinished file and lock it, so that others know that it is in use."""
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=_PART)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return Path(name), os.fdopen(handle, "wb")
        os.close(handle)  # another writer has locked it first, and removed it


def _remove_left_behind(folder: Path) -> None:
    """Remove the unfinished files that no process holds a lock on."""
    for path in folder.glob(f"*{_PART}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _by_last_use(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the whole files in a folder and their sizes, the least recently used first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found.append((status.st_mtime_ns, path, status.st_size))
    for _, path, size in sorted(found):
        yield path, size


def _first_of(files: list[tuple[Path, int]], num_bytes: int) -> list[Path]:
    """Return as many of the first files as have at least so many bytes together."""
    chosen = []
    for path, size in files:
        if num_bytes <= 0:
            break
        chosen.append(path)
        num_bytes -= size
    return chosen


def _layout(place: Mapping[str, Any]) -> tuple[torch.dtype, torch.Size, int]:
    """Return dtype, shape and number of bytes of a tensor in an index."""
    dtype, shape = _DTYPES[place["dtype"]], torch.Size(map(int, place["shape"]))
    return dtype, shape, shape.numel() * dtype.itemsize


def _read_index(descriptor: int, size: int, key: str) -> dict[str, Any]:
    """Return the entries of a file's index. Raises DamagedError and OSError."""
    if size < len(MAGIC) + END_BYTES:
        raise DamagedError("it is too short")
    end = bytearray(END_BYTES)
    _read_into(descriptor, memoryview(end), size - END_BYTES)
    length = int.from_bytes(end[:8], "little")
    if end[8 + _DIGEST_BYTES :] != MAGIC:
        raise DamagedError("its end is missing")
    if length > min(size - END_BYTES, _MOST_INDEX_BYTES):
        raise DamagedError("its index is not within the file")
    text = bytearray(length)
    _read_into(descriptor, memoryview(text), size - END_BYTES - length)
    if blake3(text).digest() != end[8 : 8 + _DIGEST_BYTES]:
        raise DamagedError("the checksum of its index is wrong")
    try:
        index = json.loads(text)
        if index["key"] != key:
            raise DamagedError("it was written for other weights")
        entries: dict[str, Any] = dict(index["weights"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError("its index cannot be read") from error
    return entries


def _read_into(descriptor: int, view: memoryview, start: int) -> None:
    """Fill ``view`` from a place in a file. Raises DamagedError when the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if count == 0:
            raise DamagedError("it is too short")
        done += count
