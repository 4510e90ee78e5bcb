"""Files of packed weights: their format, a reader that checks all it reads, and a writer.

A file is ``MAGIC``, then the tensors, each at a multiple of ``ALIGNMENT`` bytes, then an index as
JSON, then the index's length (8 bytes, little endian), its BLAKE3 digest and ``MAGIC`` again. The
index has the key that the file was written under and, for each weight, its class, shape and dtype
and the place, dtype, shape and BLAKE3 digest of each of its tensors. Nothing in a file is executed.

A file is written under another name and renamed when it is whole, so that one of a process that
ended early, or of two that write at once, is never seen. Readers copy tensors into memory with huge
pages, from which products read faster than from pages of a file; a file that is replaced or removed
meanwhile stays readable for them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3

from sensorium.kernels import ops
from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.weight import PackedWeight

MAGIC = b"sensorium-weights-1\n"
ALIGNMENT = 4096
SUFFIX = ".weights"
FREE_BYTES = 1 << 30
"""Space that a writer leaves free on the disk."""
ABANDONED_SECONDS = 3600.0
"""Age from which an unfinished file that nobody has written to counts as left behind."""
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
        dtype, shape = _DTYPES[place["dtype"]], torch.Size(map(int, place["shape"]))
        start, num_bytes = int(place["start"]), shape.numel() * dtype.itemsize
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

    Files that were used least recently make room for it.
    """

    target: Path
    key: str
    most_bytes: int
    part: Path
    file: BinaryIO
    others: list[tuple[Path, int]]
    """The other files with their sizes, the least recently used first."""
    index: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, target: Path, key: str, most_bytes: int) -> StoredWriter:
        """Begin the file of a key, in its private folder. Raises OSError."""
        make_private(target.parent)
        others = list(_by_last_use(target.parent))
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=_PART)
        file = os.fdopen(handle, "wb")
        file.write(MAGIC)
        return cls(target, key, most_bytes, Path(name), file, others)

    def write(self, name: str, weight: PackedWeight) -> None:
        """Append a weight. Raises OSError when the disk or the limit refuses it."""
        tensors = weight.tensors()
        self._make_room(sum(tensor.nbytes + ALIGNMENT for tensor in tensors.values()))
        self.index[name] = {
            "kind": type(weight).__name__,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "tensors": {key: self._append(tensor) for key, tensor in tensors.items()},
        }

    def end(self) -> None:
        """Write the index and give the file its name. Raises OSError."""
        index = json.dumps({"key": self.key, "weights": self.index}).encode()
        self.file.write(index + len(index).to_bytes(8, "little") + blake3(index).digest() + MAGIC)
        self.file.close()
        os.replace(self.part, self.target)

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

    def _make_room(self, size: int) -> None:
        space = os.statvfs(self.part)
        if space.f_bavail * space.f_frsize < FREE_BYTES + size:
            raise OSError(errno.ENOSPC, f"less than {FREE_BYTES >> 30} GiB would stay free")
        own = self.file.tell() + size
        while own + sum(num_bytes for _, num_bytes in self.others) > self.most_bytes:
            if not self.others:
                raise OSError(errno.EFBIG, "they are larger than --weights-cache-gb allows")
            path, _ = self.others.pop(0)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter. Raises OSError for one of another user."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user or is a link")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)


def _by_last_use(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files in a folder and their sizes, the least recently used first.

    What a writer left behind unfinished is removed.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path.suffix == _PART and status.st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
            elif path.suffix == SUFFIX:
                found.append((status.st_mtime_ns, path, status.st_size))
    for _, path, size in sorted(found):
        yield path, size


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
