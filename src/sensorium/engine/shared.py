"""Features in shared memory: written once by the frontend's process, opened by the engine's when an item is encoded.

A segment is a file in a memory file system, of a folder that only this user can enter; what crosses the socket is its
name and the shapes in it. The frontend counts who needs a segment and keeps some for repeats; the engine only reads.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sensorium.multimodal.items import Features, MediaItem

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class SharedArray:
    """One array in a segment: numpy's name of its type, its shape, where it begins in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class SharedFeatures:
    """A handle to features in a segment; small, and serialisable as plain values."""

    path: str
    modality: str
    num_embeds: int
    arrays: dict[str, SharedArray]
    meta: dict[str, Any]
    precomputed: bool

    def open(self) -> Features:
        """Copy the features out of the segment. Raises OSError when it is gone."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
                arrays = {name: _read(memory, spec) for name, spec in self.arrays.items()}
        return Features(
            modality=self.modality,  # type: ignore[arg-type]
            arrays=arrays,
            num_embeds=self.num_embeds,
            meta=self.meta,
            precomputed=self.precomputed,
        )


def _read(memory: mmap.mmap, spec: SharedArray) -> np.ndarray:
    count = int(np.prod(spec.shape, dtype=np.int64))
    view = np.frombuffer(memory, np.dtype(spec.dtype), count, spec.offset)
    return view.reshape(spec.shape).copy()


@dataclass(slots=True)
class _Segment:
    handle: SharedFeatures
    num_bytes: int
    num_users: int = 0


class SegmentStore:
    """The frontend's segments by item digest: counted while requests use them, then kept while there is room.

    ``keep_bytes`` bounds what is kept without a user, and so does half of the memory file system, which is small in
    many containers. One writer: the frontend's event loop.
    """

    def __init__(self, keep_bytes: int) -> None:
        memory_folder = Path("/dev/shm")
        parent = str(memory_folder) if os.access(memory_folder, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="sensorium-", dir=parent))
        self._keep_bytes = min(keep_bytes, shutil.disk_usage(self._folder).total // 2)
        self._kept_bytes = 0
        self._segments: OrderedDict[bytes, _Segment] = OrderedDict()
        self._count = 0

    def acquire(self, item: MediaItem) -> SharedFeatures:
        """A handle to the item's features, written now unless a segment is there. Pair with ``release``.

        Raises OSError when they do not fit in the memory file system, even with nothing kept that nobody uses.
        """
        segment = self._segments.get(item.digest)
        if segment is None:
            try:
                segment = self._write(item.features)
            except OSError:
                self._evict(0)
                segment = self._write(item.features)
            self._segments[item.digest] = segment
        elif segment.num_users == 0:
            self._kept_bytes -= segment.num_bytes
        segment.num_users += 1
        self._segments.move_to_end(item.digest)
        return segment.handle

    def release(self, digest: bytes) -> None:
        """A user of the segment is done."""
        segment = self._segments[digest]
        segment.num_users -= 1
        if segment.num_users == 0:
            self._kept_bytes += segment.num_bytes
            self._evict(self._keep_bytes)

    @property
    def folder(self) -> Path:
        """Where the segments lie."""
        return self._folder

    def close(self) -> None:
        """Remove every segment."""
        self._segments.clear()
        self._kept_bytes = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def num_in_use(self) -> int:
        """Segments that requests use now."""
        return sum(segment.num_users > 0 for segment in self._segments.values())

    def _evict(self, keep_bytes: int) -> None:
        """Remove segments without a user, least recently used first, until ``keep_bytes`` are kept."""
        for digest in list(self._segments):
            if self._kept_bytes <= keep_bytes:
                return
            segment = self._segments[digest]
            if segment.num_users == 0:
                self._kept_bytes -= segment.num_bytes
                Path(segment.handle.path).unlink(missing_ok=True)
                del self._segments[digest]

    def _write(self, features: Features) -> _Segment:
        specs, size = _layout(features.arrays)
        self._count += 1
        path = self._folder / str(self._count)
        try:
            with open(path, "xb") as file:
                for name, spec in specs.items():
                    file.seek(spec.offset)
                    file.write(np.ascontiguousarray(features.arrays[name]).data)
                file.truncate(max(size, 1))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        handle = SharedFeatures(
            path=str(path),
            modality=features.modality,
            num_embeds=features.num_embeds,
            arrays=specs,
            meta=dict(features.meta),
            precomputed=features.precomputed,
        )
        return _Segment(handle, size)


def _layout(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, SharedArray], int]:
    specs, offset = {}, 0
    for name, array in arrays.items():
        specs[name] = SharedArray(array.dtype.str, tuple(array.shape), offset)
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return specs, offset
