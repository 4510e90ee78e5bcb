"""Segments of shared memory: what is written is read, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sensorium.multimodal import segments as module
from sensorium.multimodal.segments import Segment, SegmentFolder

ARRAYS = {
    "pixels": np.arange(30, dtype=np.uint8).reshape(2, 5, 3),
    "none": np.zeros((0, 4), np.float32),
    "scale": np.array(0.5, np.float64),
    "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
}


@pytest.fixture
def folder() -> Iterator[SegmentFolder]:
    folder = SegmentFolder()
    yield folder
    folder.close()
    assert not folder.path.exists()


def test_what_is_written_is_read(folder: SegmentFolder) -> None:
    owned = folder.write(ARRAYS)
    opened = Segment(owned.path, owned.specs, owned=False)
    for segment in (owned, opened):
        assert list(segment) == list(ARRAYS)
        assert len(segment) == 4
        assert segment.num_bytes == sum(array.nbytes for array in ARRAYS.values())
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(segment[name], array)
            assert segment[name].dtype == array.dtype
    with pytest.raises(KeyError):
        owned["other"]


def test_nobody_else_sees_what_one_writes_into_an_array(folder: SegmentFolder) -> None:
    owned = folder.write(ARRAYS)
    opened = Segment(owned.path, owned.specs, owned=False)
    opened["pixels"][:] = 9
    np.testing.assert_array_equal(owned["pixels"], ARRAYS["pixels"])


def test_the_file_goes_with_its_owner_and_what_is_mapped_stays(folder: SegmentFolder) -> None:
    owned = folder.write(ARRAYS)
    path, specs = owned.path, owned.specs
    other = Segment(path, specs, owned=False)
    pixels = owned["pixels"]
    del owned
    gc.collect()
    assert not os.path.exists(path)
    np.testing.assert_array_equal(pixels, ARRAYS["pixels"])
    np.testing.assert_array_equal(other["pixels"], ARRAYS["pixels"])
    with pytest.raises(FileNotFoundError):
        Segment(path, specs, owned=False)


def test_two_owners_do_not_meet(folder: SegmentFolder) -> None:
    first, second = folder.write(ARRAYS), folder.write(ARRAYS)
    assert first.path != second.path
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700


def test_a_write_that_fails_leaves_no_file(folder: SegmentFolder) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as error:
            folder.write({"large": np.zeros(1 << 20, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert not os.listdir(folder.path)


def test_little_shared_memory_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AMPLE_BYTES", 1 << 62)
    folder = SegmentFolder()
    assert folder.path.parent != module.MEMORY_FOLDER
    folder.close()


def test_a_folder_that_is_forgotten_is_removed() -> None:
    folder = SegmentFolder()
    path = Path(folder.path)
    del folder
    gc.collect()
    assert not path.exists()
