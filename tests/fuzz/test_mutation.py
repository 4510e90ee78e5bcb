"""Mutation is a function of its seed, knows the structure of each format, and mends checksums."""

from __future__ import annotations

import random
import zlib

import pytest

from sensorium.multimodal.items import MODALITIES
from tests.fuzz.corpus import corpus
from tests.fuzz.mutation import MOST_BYTES, change_number, move_piece, mutate
from tests.fuzz.structures import Number, structure_of

WITHOUT_PIECES = (
    "ppm",
    "pgm",
    "pbm",
    "jpegs",
    "mp3",
    "aac",
    "au",
    "voc",
    "caf",
    "w64",
    "transport",
)
FILES = {f"{m}: {name}": data for m in MODALITIES for name, data in corpus(m).items()}


@pytest.mark.parametrize("name", sorted(FILES))
def test_structure(name: str) -> None:
    data = FILES[name]
    found = structure_of(data)
    assert found.numbers
    for number in found.numbers:
        assert number.write(data, number.read(data)) == data
    for start, end in found.pieces:
        assert 0 <= start <= end <= len(data)
    if name.partition(": ")[2].split()[0] not in WITHOUT_PIECES:
        assert found.pieces
    if found.seal is not None:
        assert found.seal(data) == data


def test_numbers() -> None:
    big, little = Number(1, 2), Number(1, 2, little=True)
    assert (big.read(b"\0\1\2\3"), little.read(b"\0\1\2\3")) == (0x102, 0x201)
    assert big.write(b"abcd", 0x4142) == b"aABd"
    assert little.write(b"abcd", -1) == b"a\xff\xffd"


def test_same_seed_same_damage() -> None:
    others = list(corpus("image").values())
    for name, data in corpus("image").items():
        first, second, third = (mutate(data, random.Random(seed), others) for seed in (1, 1, 2))
        assert first == second, name
        assert len(first) <= MOST_BYTES
        assert third != data or first != data


def test_checksums_are_mended() -> None:
    """Otherwise a decoder would refuse nearly every damaged PNG for its checksum alone."""
    data = corpus("image")["png rgb"]
    broken = data[:18] + b"\1\2" + data[20:]
    sealed = structure_of(broken).seal(broken)  # type: ignore[misc]
    assert sealed[18:20] == b"\1\2"
    assert int.from_bytes(sealed[29:33], "big") == zlib.crc32(sealed[12:29])


def test_damage_within_the_structure_changes_little() -> None:
    data, rng = corpus("video")["mp4"], random.Random(0)
    for _ in range(50):
        assert len(change_number(data, rng, ())) == len(data)
    kinds = {len(move_piece(data, rng, ())) - len(data) for _ in range(50)}
    assert min(kinds) < 0 < max(kinds)


def test_nothing_is_too_damaged_to_be_damaged() -> None:
    rng = random.Random(0)
    for data in (
        b"",
        b"\0",
        b"\x89PNG\r\n\x1a\n",
        b"II*\0\xff\xff\xff\xff",
        b"RIFF",
        b"\x1aE\xdf\xa3",
    ):
        for _ in range(200):
            mutate(data, rng, [b"", data])
