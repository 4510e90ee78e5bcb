"""Segments of shared memory: what is written is read, and nothing stays behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from sensorium.engine import wire
from sensorium.engine.shared import SegmentStore
from sensorium.multimodal.items import Features, MediaItem


def item(name: bytes, size: int = 100) -> MediaItem:
    pixels = np.frombuffer(name * size, np.uint8)[:size].reshape(1, size)
    arrays = {"pixels": pixels, "scale": np.array([0.5], np.float32)}
    return MediaItem("image", name, Features("image", arrays, 4, {"grid": (1, 2, 2)}))


@pytest.fixture
def store() -> Iterator[SegmentStore]:
    store = SegmentStore(keep_bytes=300)
    yield store
    store.close()
    assert not store._folder.exists()


def files(store: SegmentStore) -> int:
    return len(os.listdir(store._folder))


def test_features_cross_the_wire_and_come_out_equal(store: SegmentStore) -> None:
    source = item(b"a")
    handle = store.acquire(source)
    message = wire.encode(wire.Stats(0, wire.EngineStats()))
    assert isinstance(wire.decode_from_engine(message), wire.Stats)
    opened = handle.open()
    assert opened.num_embeds == 4
    for name, array in source.features.arrays.items():
        np.testing.assert_array_equal(opened.arrays[name], array)


def test_a_repeated_item_is_written_once(store: SegmentStore) -> None:
    first, second = store.acquire(item(b"a")), store.acquire(item(b"a"))
    assert first == second
    assert files(store) == 1
    store.release(b"a")
    assert store.num_in_use == 1
    store.release(b"a")
    assert store.num_in_use == 0


def test_unused_segments_are_kept_within_the_budget_oldest_leave_first(store: SegmentStore) -> None:
    for name in (b"a", b"b", b"c"):
        store.acquire(item(name))
    assert files(store) == 3, "what is used is never removed"
    for name in (b"a", b"b", b"c"):
        store.release(name)
    assert files(store) == 1
    kept = store.acquire(item(b"c"))
    assert files(store) == 1, "the latest was kept"
    assert kept.open().num_embeds == 4


def test_a_segment_that_is_gone_raises(store: SegmentStore) -> None:
    handle = store.acquire(item(b"a"))
    store.close()
    with pytest.raises(OSError):
        handle.open()


def test_a_full_file_system_costs_what_is_kept_and_nothing_half_written_stays(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is limited to one segment by the number of files, in place of a small file system."""
    write = store._write

    def write_one(features: Features) -> object:
        if files(store):
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(features)

    monkeypatch.setattr(store, "_write", write_one)
    store.acquire(item(b"a"))
    store.release(b"a")
    store.acquire(item(b"b"))
    assert files(store) == 1
    with pytest.raises(OSError, match="no space"):
        store.acquire(item(b"c"))
    assert store.num_in_use == 1
    store.release(b"b")
    assert store.acquire(item(b"c")).open().num_embeds == 4


def test_a_write_that_fails_leaves_no_file(store: SegmentStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError):
            store.acquire(item(b"a", 1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(store) == 0
    assert store.num_in_use == 0


def test_what_somebody_else_removed_is_no_error(store: SegmentStore) -> None:
    for name in (b"a", b"b", b"c"):
        os.unlink(store.acquire(item(name)).path)
    for name in (b"a", b"b", b"c"):
        store.release(name)
    assert store.num_in_use == 0


def test_what_is_kept_leaves_half_of_the_file_system() -> None:
    store = SegmentStore(keep_bytes=1 << 60)
    try:
        assert store._keep_bytes == shutil.disk_usage(store.folder).total // 2
    finally:
        store.close()
