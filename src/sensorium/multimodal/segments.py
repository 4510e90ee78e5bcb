"""Arrays in files of a memory file system: written by one process, mapped by others, without a copy through a pipe.

A segment is a file in a folder that only this user can enter. Whoever makes it known in the frontend's process owns it:
when the last reference to that ``Segment`` is gone - the processor cache has let go of it, and so has every request
that uses it - the file is removed. Another process (the engine's) opens it by its path and shapes, and does not own it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ALIGNMENT = 64
MEMORY_FOLDER = Path("/dev/shm")
_AMPLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a segment: numpy's name of its type, its shape, where it begins in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Segment(Mapping[str, np.ndarray]):
    """The arrays of a file by name, mapped into memory; writable, but what is written stays in this process.

    The owner's (``owned``) removes the file with itself, and maps it only while somebody looks at an array. Another
    process's maps it at once, and keeps what it has even when the file goes: raises OSError when it is gone already.
    """

    def __init__(self, path: str, specs: Mapping[str, ArraySpec], *, owned: bool) -> None:
        self.path = path
        self.specs = dict(specs)
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())
        self._memory = None if owned else self._map()
        if owned:
            weakref.finalize(self, remove, path)

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        memory = self._memory or self._map()
        count = int(np.prod(spec.shape, dtype=np.int64))
        return np.frombuffer(memory, np.dtype(spec.dtype), count, spec.offset).reshape(spec.shape)

    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def write(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, ArraySpec]:
    """Write arrays into a new file. Raises OSError, and leaves none behind, when there is no room for them."""
    specs: dict[str, ArraySpec] = {}
    offset = 0
    for name, array in arrays.items():
        specs[name] = ArraySpec(array.dtype.str, tuple(array.shape), offset)
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        with open(path, "xb") as file:
            for name, spec in specs.items():
                file.seek(spec.offset)
                file.write(np.ascontiguousarray(arrays[name]).data)
            file.truncate(offset + 1)  # an empty array may begin at the end
    except OSError:
        remove(path)
        raise
    return specs


def remove(path: str) -> None:
    """Remove the file of a segment, if it is there."""
    Path(path).unlink(missing_ok=True)


class SegmentFolder:
    """A new folder for segments, in shared memory where that is ample, else among the temporary files (which the system
    keeps in memory as far as it can). Thread-safe."""

    def __init__(self) -> None:
        parent = MEMORY_FOLDER if _is_ample(MEMORY_FOLDER) else None
        self.path = Path(tempfile.mkdtemp(prefix="sensorium-", dir=parent))
        self.capacity_bytes = shutil.disk_usage(self.path).total // 2
        """Most bytes that should be kept for later: half of the file system."""
        self._count = 0
        self._lock = threading.Lock()
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def new_path(self) -> str:
        """A path that no segment has had."""
        with self._lock:
            self._count += 1
            return str(self.path / str(self._count))

    def write(self, arrays: Mapping[str, np.ndarray]) -> Segment:
        """A new segment. Raises OSError when there is no room for it."""
        path = self.new_path()
        return Segment(path, write(path, arrays), owned=True)

    def close(self) -> None:
        """Remove the folder and all that is in it; what is mapped stays readable."""
        self._remove()


def _is_ample(folder: Path) -> bool:
    """Many containers have 64 MiB of shared memory, less than a few pictures of a large model take."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).total >= _AMPLE_BYTES
