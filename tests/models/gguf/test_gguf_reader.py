"""What a GGUF file claims is checked before memory is taken for it."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sensorium.errors import ConfigError
from sensorium.models.gguf import reader
from tests.models.gguf.raw import Raw, Tensor, array, string, value

HUGE = (1 << 63) + 1


def test_a_file_is_read(tmp_path: Path) -> None:
    values = [
        ("general.architecture", value(8, string("llama"))),
        ("llama.block_count", value(4, struct.pack("<I", 2))),
        ("llama.flag", value(7, b"\1")),
        ("llama.scale", value(6, struct.pack("<f", 0.5))),
        ("some.texts", array(8, 2, string("a") + string("ü"))),
        ("some.numbers", array(5, 3, struct.pack("<3i", 1, -2, 3))),
    ]
    tensors = [Tensor(), Tensor("b.weight", (32, 3), kind=8, offset=32)]
    found = reader.read(Raw(values, tensors, data=bytes(32 + 3 * 34)).write(tmp_path))
    assert found.architecture == "llama"
    assert (found.own("block_count"), found.own("flag"), found.own("scale")) == (2, True, 0.5)
    assert found.metadata["some.texts"] == ["a", "ü"]
    assert np.array_equal(found.metadata["some.numbers"], [1, -2, 3])
    assert found.tensors["a.weight"].shape == (2, 4)
    second = found.tensors["b.weight"]
    assert (second.shape, second.kind.name, second.nbytes) == ((3, 32), "Q8_0", 102)
    assert second.start == found.tensors["a.weight"].start + 32
    assert second.start + second.nbytes == found.size


WRONG = {
    "magic": (Raw(magic=b"GGML"), "does not begin"),
    "version 1": (Raw(version=1), "version 1"),
    "another byte order": (Raw(version=3 << 24), "byte order"),
    "too many tensors": (Raw(num_tensors=HUGE), "tensors; at most"),
    "more tensors than fit": (Raw(num_tensors=60_000), "more than fit"),
    "too many values": (Raw(num_values=HUGE), "values of metadata; at most"),
    "no second value": (Raw(num_values=2), "at most 1024"),
    "a name without end": (Raw([(b"", b"")], num_values=1), "not printable"),
    "a name with a line end": (Raw([("a\nb", value(4, bytes(4)))]), "not printable"),
    "a long name": (Raw([("a" * 2000, value(4, bytes(4)))]), "at most 1024"),
    "two values of a name": (Raw([("a", value(4, bytes(4)))] * 2), "twice"),
    "an unknown type": (Raw([("a", value(99, bytes(8)))]), "unknown type 99"),
    "a huge text": (Raw([("a", value(8, struct.pack("<Q", HUGE)))]), "at most"),
    "a text past the end": (Raw([("a", value(8, struct.pack("<Q", 4000)))]), "more than fit"),
    "a text that is not UTF-8": (Raw([("a", value(8, string(b"\xff\xfe")))]), "not UTF-8"),
    "many numbers": (Raw([("a", array(0, HUGE, b""))]), "at most"),
    "numbers past the end": (Raw([("a", array(12, 1000, b""))]), "more than fit"),
    "many texts": (Raw([("a", array(8, HUGE, b""))]), "at most"),
    "arrays of arrays": (Raw([("a", array(9, 1, bytes(12)))]), "array of arrays"),
    "an array of nothing": (Raw([("a", array(77, 1, bytes(12)))]), "unknown type 77"),
    "alignment 0": (Raw([("general.alignment", value(4, bytes(4)))]), "no power of two"),
    "alignment 24": (
        Raw([("general.alignment", value(4, struct.pack("<I", 24)))]),
        "no power of two",
    ),
    "alignment as text": (Raw([("general.alignment", value(8, string("32")))]), "no power of two"),
    "no dimensions": (Raw(tensors=[Tensor(dims=())]), "0 dimensions"),
    "five dimensions": (Raw(tensors=[Tensor(dims=(1,) * 5)]), "5 dimensions"),
    "a dimension of 0": (Raw(tensors=[Tensor(dims=(4, 0))]), "more than fit"),
    "dimensions that overflow": (Raw(tensors=[Tensor(dims=(1 << 32, 1 << 32))]), "more than fit"),
    "an unread kind": (
        Raw(tensors=[Tensor(kind=16, dims=(256, 1))]),
        "IQ2_XXS; those that are read",
    ),
    "an unknown kind": (Raw(tensors=[Tensor(kind=4)]), "kind 4"),
    "half a block": (Raw(tensors=[Tensor(kind=8, dims=(24, 1))]), "no multiple of the 32"),
    "between blocks": (Raw(tensors=[Tensor(offset=4)]), "multiple of 32 bytes"),
    "an offset past the end": (Raw(tensors=[Tensor(offset=64)]), "64 bytes behind the end"),
    "an offset that overflows": (Raw(tensors=[Tensor(offset=(1 << 64) - 32)]), "behind the end"),
    "no data": (Raw(data=b""), "download is not complete"),
    "tensors that overlap": (
        Raw(tensors=[Tensor(dims=(16,)), Tensor("b", (8,), offset=32)], data=bytes(64)),
        "overlap",
    ),
    "two tensors of a name": (
        Raw(tensors=[Tensor(), Tensor(offset=32)], data=bytes(64)),
        "two tensors 'a.weight'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    raw, message = WRONG[name]
    if name == "tensors that overlap":
        raw.tensors[0].dims = (12,)
    path = raw.write(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        reader.read(path)
    assert raised.value.param == "model"
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("length", [0, 3, 4, 23, 24, 40, 60, 90])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Raw().packed()[:length])
    with pytest.raises(ConfigError):
        reader.read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        reader.read(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        reader.read(tmp_path / "absent.gguf")


def test_many_small_texts_take_bounded_memory(tmp_path: Path) -> None:
    """Strings and tensors cost far more in memory than in a file: their number is bounded."""
    many = reader.MOST_STRINGS + 1
    path = Raw([("a", array(8, many, bytes(8 * many)))]).write(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="at most"):
            reader.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


LONG = [("a", value(8, string("x" * (3 * reader.CHUNK_BYTES)))), ("b", value(4, bytes(4)))]


def test_long_texts_are_read_in_pieces(tmp_path: Path) -> None:
    many = ("c", array(8, 60_000, string("token") * 60_000))
    found = reader.read(Raw([*LONG, many]).write(tmp_path))
    assert found.metadata["a"] == "x" * (3 * reader.CHUNK_BYTES)
    assert (found.metadata["b"], found.metadata["c"]) == (0, ["token"] * 60_000)


def test_a_file_that_is_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading what was mapped would end the process."""
    path = Raw(LONG).write(tmp_path)
    whole = os.pread

    def cut(descriptor: int, count: int, place: int) -> bytes:
        found = whole(descriptor, count, place)
        os.truncate(path, 1000)
        return found

    monkeypatch.setattr(os, "pread", cut)
    with pytest.raises(ConfigError, match="download is not complete"):
        reader.read(path)


def test_a_beginning_that_is_too_short(tmp_path: Path) -> None:
    path = Raw(LONG).write(tmp_path)
    size = path.stat().st_size
    os.truncate(path, 5000)
    with pytest.raises(ConfigError, match="does not end within its first 5000 bytes"):
        reader.read(path, size)
