"""Segments of shared memory: what is written is read, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sensorium.multimodal import shared_memory as module
from sensorium.multimodal.shared_memory import ArraySpec, SharedArrays, SharedArraysFolder

ARRAYS: dict[str, np.ndarray] = {
    "pixels": np.arange(30, dtype=np.uint8).reshape(2, 5, 3),
    "none": np.zeros((0, 4), np.float32),
    "scale": np.array(0.5, np.float64),
    "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
}


@pytest.fixture
def folder() -> Iterator[SharedArraysFolder]:
    folder = SharedArraysFolder()
    yield folder
    folder.close()
    assert not folder.path.exists()


def test_what_is_written_is_read(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    opened = SharedArrays(owned.path, owned.specs, owned=False)
    for segment in (owned, opened):
        assert list(segment) == list(ARRAYS)
        assert len(segment) == 4
        assert segment.num_bytes == sum(array.nbytes for array in ARRAYS.values())
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(segment[name], array)
            assert segment[name].dtype == array.dtype
    with pytest.raises(KeyError):
        owned["other"]


def test_nobody_else_sees_what_one_writes_into_an_array(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    opened = SharedArrays(owned.path, owned.specs, owned=False)
    opened["pixels"][:] = 9
    np.testing.assert_array_equal(owned["pixels"], ARRAYS["pixels"])


def test_the_file_goes_with_its_owner_and_what_is_mapped_stays(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    path, specs = owned.path, owned.specs
    other = SharedArrays(path, specs, owned=False)
    pixels = owned["pixels"]
    del owned
    gc.collect()
    assert not os.path.exists(path)
    assert not other.is_there
    np.testing.assert_array_equal(pixels, ARRAYS["pixels"])
    for gone in (lambda: other["pixels"], lambda: SharedArrays(path, specs, owned=False)):
        with pytest.raises(FileNotFoundError):
            gone()


def test_a_segment_that_nobody_looks_at_holds_no_descriptor(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    before = len(os.listdir("/proc/self/fd"))
    opened = [SharedArrays(owned.path, owned.specs, owned=False) for _ in range(100)]
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(opened[99]["pixels"], ARRAYS["pixels"])


@pytest.mark.parametrize(
    "spec",
    [
        ArraySpec("|u1", (-5,), 0),
        ArraySpec("|u1", (1 << 62, 8), 0),
        ArraySpec("|u1", (99,), 0),
        ArraySpec("|u1", (1,), 1 << 40),
        ArraySpec("|u1", (1,), -1),
        ArraySpec("|O", (1,), 0),
        ArraySpec("<U4", (1,), 0),
        ArraySpec("garbage", (1,), 0),
        ArraySpec("|u1", (1,) * 9, 0),
    ],
)
def test_specs_that_cannot_be_true(folder: SharedArraysFolder, spec: ArraySpec) -> None:
    owned = folder.write({"pixels": np.zeros(29, np.uint8)})
    with pytest.raises((ValueError, TypeError)):
        SharedArrays(owned.path, {"pixels": spec}, owned=False)


def test_links_are_no_segments(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    link = folder.new_path()
    os.symlink(owned.path, link)
    with pytest.raises(ValueError, match="regular"):
        SharedArrays(link, owned.specs, owned=False)


def test_a_folder_that_was_tidied_up_is_made_again(folder: SharedArraysFolder) -> None:
    shutil.rmtree(folder.path)
    np.testing.assert_array_equal(folder.write(ARRAYS)["pixels"], ARRAYS["pixels"])


def test_a_child_that_the_caller_forks_removes_nothing(folder: SharedArraysFolder) -> None:
    owned = folder.write(ARRAYS)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
                found = finalizer.peek()
                if found is not None and (found[0] is owned or found[0] is folder):
                    finalizer()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(owned["pixels"], ARRAYS["pixels"])


def test_two_owners_do_not_meet(folder: SharedArraysFolder) -> None:
    first, second = folder.write(ARRAYS), folder.write(ARRAYS)
    assert first.path != second.path
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700


def test_a_write_that_fails_leaves_no_file(folder: SharedArraysFolder) -> None:
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
    folder = SharedArraysFolder()
    assert folder.path.parent != module.MEMORY_FOLDER
    folder.close()


def test_a_folder_that_is_forgotten_is_removed() -> None:
    folder = SharedArraysFolder()
    path = Path(folder.path)
    del folder
    gc.collect()
    assert not path.exists()
