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

    ``keep_bytes`` bounds what is kept without a user. One writer: the frontend's event loop.
    """

    def __init__(self, keep_bytes: int) -> None:
        memory_folder = Path("/dev/shm")
        parent = str(memory_folder) if os.access(memory_folder, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="sensorium-", dir=parent))
        self._keep_bytes = keep_bytes
        self._kept_bytes = 0
        self._segments: OrderedDict[bytes, _Segment] = OrderedDict()
        self._count = 0

    def acquire(self, item: MediaItem) -> SharedFeatures:
        """A handle to the item's features, written now unless a segment is there. Pair with ``release``."""
        segment = self._segments.get(item.digest)
        if segment is None:
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
            self._evict()

    def close(self) -> None:
        """Remove every segment."""
        self._segments.clear()
        self._kept_bytes = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def num_in_use(self) -> int:
        """Segments that requests use now."""
        return sum(segment.num_users > 0 for segment in self._segments.values())

    def _evict(self) -> None:
        for digest in list(self._segments):
            if self._kept_bytes <= self._keep_bytes:
                return
            segment = self._segments[digest]
            if segment.num_users == 0:
                self._kept_bytes -= segment.num_bytes
                os.unlink(segment.handle.path)
                del self._segments[digest]

    def _write(self, features: Features) -> _Segment:
        specs, size = _layout(features.arrays)
        self._count += 1
        path = self._folder / str(self._count)
        with open(path, "xb") as file:
            for name, spec in specs.items():
                file.seek(spec.offset)
                file.write(np.ascontiguousarray(features.arrays[name]).data)
            file.truncate(max(size, 1))
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
