"""Writers of stored weights: what they remove, when, and what they leave alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight
from sensorium.models.loading import stored
from sensorium.models.loading.quantize import QUANTIZERS
from sensorium.models.loading.stored import ALIGNMENT, SUFFIX, StoredWeights, StoredWriter

pytestmark = pytest.mark.skipif(
    not ops.has_integer_products(), reason="this CPU has no products of quantized weights"
)
MOST = 1 << 30


@pytest.fixture(scope="module")
def weight() -> PackedWeight:
    return ops.quantize_and_pack(torch.randn(64, 128), QUANTIZERS["int8"], torch.float32)


def size_of(weight: PackedWeight) -> int:
    """Room that a writer keeps for a weight."""
    return sum(tensor.nbytes + ALIGNMENT for tensor in weight.tensors().values())


def others_in(folder: Path, size: int) -> list[Path]:
    """Three whole files, the least recently used first."""
    paths = [folder / f"{letter * 40}{SUFFIX}" for letter in "abc"]
    for age, path in enumerate(paths):
        path.write_bytes(bytes(size))
        os.utime(path, (1000 + age, 1000 + age))
    return paths


def present(paths: list[Path]) -> list[bool]:
    return [path.exists() for path in paths]


def begin(folder: Path, key: str = "new", most: int = MOST) -> StoredWriter:
    return StoredWriter.begin(folder / f"{key}{SUFFIX}", key, most)


def test_what_is_left_behind_is_removed_but_not_what_is_written(
    tmp_path: Path, weight: PackedWeight
) -> None:
    left = tmp_path / "x.part"
    left.write_bytes(bytes(1000))
    first = begin(tmp_path, "first")
    assert not left.exists(), "however new it is"
    second = begin(tmp_path, "second")
    for writer in (first, second):
        writer.write("a", weight)
        writer.end()
    for key in ("first", "second"):
        opened = StoredWeights.open(tmp_path / f"{key}{SUFFIX}", key)
        assert opened is not None
        assert opened.names == ["a"]
        assert opened.nbytes("a") == sum(each.nbytes for each in weight.tensors().values())
        opened.close()
    assert not list(tmp_path.glob("*.part"))


def test_files_make_room_when_the_new_one_is_whole(tmp_path: Path, weight: PackedWeight) -> None:
    size = size_of(weight)
    others = others_in(tmp_path, size)
    given_up, writer = (begin(tmp_path, most=4 * size) for _ in range(2))
    for each in (given_up, writer):
        each.write("a", weight)
        each.write("b", weight)
    given_up.abandon()
    assert present(others) == [True, True, True]
    writer.end()
    assert present(others) == [False, True, True]
    again = begin(tmp_path, most=4 * size)
    again.write("a", weight)
    again.write("b", weight)
    again.end()
    assert present(others) == [False, True, True], "the one of this name needs no room of its own"


def test_one_that_is_larger_than_the_limit_removes_nothing(
    tmp_path: Path, weight: PackedWeight
) -> None:
    others = others_in(tmp_path, size_of(weight))
    writer = begin(tmp_path, most=int(1.5 * size_of(weight)))
    writer.write("a", weight)
    with pytest.raises(OSError, match="weights-cache-gb") as caught:
        writer.write("b", weight)
    assert caught.value.errno == errno.EFBIG
    writer.abandon()
    assert present(others) == [True, True, True]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_costs_the_files_that_were_used_least_recently(
    tmp_path: Path, weight: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = size_of(weight)
    others = others_in(tmp_path, size)
    capacity = int(3.5 * size)

    def free(folder: Path) -> int:
        return capacity - sum(path.stat().st_size for path in others if path.exists())

    monkeypatch.setattr(stored, "free_bytes", free)
    monkeypatch.setattr(stored, "FREE_BYTES", 0)
    writer = begin(tmp_path)
    writer.write("a", weight)
    assert present(others) == [False, True, True]
    writer.end()
    monkeypatch.setattr(stored, "FREE_BYTES", 4 * size)
    writer = begin(tmp_path, "more")
    with pytest.raises(OSError, match="stay free"):
        writer.write("a", weight)
    writer.abandon()
    assert present(others) == [False, True, True], "all of them would not be enough"
