"""Arrays in files of a memory file system.

Written by one process, mapped by others, without a copy through a pipe.

A segment is a file in a folder that only this user can enter. Whoever makes it known in the
frontend's process owns it: when the last reference to that ``SharedArrays`` is gone - the processor
cache has let go of it, and so has every request that uses it - the file is removed. Another process
(the engine's) opens it by its path and shapes, and does not own it.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import stat
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
_MAX_DIMENSIONS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(OSError):
    """A file system has no room for a segment now.

    Attributes:
        num_bytes: Size of the segment.
        total_bytes: Size of the file system: more will never fit.
    """

    def __init__(self, num_bytes: int, total_bytes: int) -> None:
        super().__init__(errno.ENOSPC, f"no room for {num_bytes} of {total_bytes} bytes")
        self.num_bytes, self.total_bytes = num_bytes, total_bytes


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a segment: numpy's name of its type, its shape, where it begins in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class SharedArrays(Mapping[str, np.ndarray]):
    """The arrays of a file by name, mapped into memory while somebody looks at one.

    What is written to an array stays in this process. ``owned``: the file goes with this object.

    Raises OSError when the file is gone, ValueError when it does not hold what ``specs`` say.
    """

    def __init__(self, path: str, specs: Mapping[str, ArraySpec], *, owned: bool) -> None:
        self.path = path
        self.specs = dict(specs)
        check(path, self.specs)
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())
        if owned:
            # A child that the caller's program forks has this object too, and must not remove what
            # is not its own.
            weakref.finalize(self, _remove_own, path, os.getpid())

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        with open(self.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = math.prod(spec.shape)
        return np.frombuffer(memory, np.dtype(spec.dtype), count, spec.offset).reshape(spec.shape)

    @property
    def is_there(self) -> bool:
        """Return whether the file still exists: somebody may have tidied up."""
        return os.path.exists(self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def write(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, ArraySpec]:
    """Write arrays into a new file.

    Raises NoRoomError, or another OSError, and leaves none behind, when it cannot be written.
    """
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
    except OSError as error:
        remove(path)
        if error.errno in _FULL:
            raise NoRoomError(offset, shutil.disk_usage(Path(path).parent).total) from None
        raise
    return specs


def remove(path: str) -> None:
    """Remove the file of a segment, if it is there."""
    Path(path).unlink(missing_ok=True)


def place_below(folder: Path) -> None:
    """Let the folders that this process makes from now on lie in another one.

    For a process that may be killed at any time, and has a folder that goes with it.
    """
    global MEMORY_FOLDER
    MEMORY_FOLDER = folder


class SharedArraysFolder:
    """Create a folder for shared arrays. Thread-safe.

    In shared memory where that is ample, else among the temporary files, which the system keeps in
    memory as far as it can. Thread-safe.
    """

    def __init__(self) -> None:
        parent = MEMORY_FOLDER if _is_ample(MEMORY_FOLDER) else None
        self.path = Path(tempfile.mkdtemp(prefix="sensorium-", dir=parent))
        self.capacity_bytes = shutil.disk_usage(self.path).total // 2
        """Most bytes that should be kept for later: half of the file system."""
        self._count = 0
        self._lock = threading.Lock()
        self._remove = weakref.finalize(self, _remove_own_folder, self.path, os.getpid())

    def new_path(self) -> str:
        """A path that no segment has had.

        The folder is made again when somebody has tidied it up, as systems do when a user logs out.
        """
        with self._lock:
            if self._remove.alive:
                self.path.mkdir(mode=0o700, exist_ok=True)
            self._count += 1
            return str(self.path / str(self._count))

    def write(self, arrays: Mapping[str, np.ndarray]) -> SharedArrays:
        """A new segment. Raises OSError, NoRoomError among them, when it cannot be written."""
        path = self.new_path()
        return SharedArrays(path, write(path, arrays), owned=True)

    def close(self) -> None:
        """Remove the folder and all that is in it; what is mapped stays readable."""
        self._remove()


def check(path: str, specs: Mapping[str, ArraySpec]) -> None:
    """Check that a file can hold these arrays, as a worker that decodes says.

    Raises ValueError or TypeError when it cannot, OSError when it is not there.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a segment must be a regular file")
    for spec in specs.values():
        kind = np.dtype(spec.dtype).kind
        if (
            kind not in "biuf"
            or len(spec.shape) > _MAX_DIMENSIONS
            or min(spec.shape, default=1) < 0
        ):
            raise ValueError("a segment must hold arrays of numbers")
        if not 0 <= spec.offset <= status.st_size - spec.num_bytes:
            raise ValueError("an array must lie within its segment")


def _remove_own(path: str, process_id: int) -> None:
    if os.getpid() == process_id:
        remove(path)


def _remove_own_folder(path: Path, process_id: int) -> None:
    if os.getpid() == process_id:
        shutil.rmtree(path, ignore_errors=True)


def _is_ample(folder: Path) -> bool:
    """Return whether the folder has room; many containers have 64 MiB of shared memory."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).total >= _AMPLE_BYTES
