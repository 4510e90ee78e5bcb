import gzip
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import MediaFetchError, MediaTooLargeError
from sensorium.multimodal.fetch import inflate
from sensorium.multimodal.fetch.inflate import unzip


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


FORMS = [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)]
FORMS += [("deflate", raw_deflate), ("gzip", zlib.compress), ("deflate", gzip.compress)]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """``data`` in pieces of these sizes, over and over."""
    pieces = []
    while data:
        for size in sizes:
            pieces.append(data[:size])
            data = data[size:]
    return pieces


@pytest.mark.parametrize(("encoding", "pack"), FORMS)
@pytest.mark.parametrize("data", [b"", b"x", bytes(3_000_000), random.Random(0).randbytes(300_000)])
def test_every_form(encoding: str, pack, data: bytes) -> None:
    assert unzip([pack(data)], encoding, len(data)) == data
    assert unzip([*cut(pack(data), [70_000, 5]), b""], encoding, len(data)) == data
    if data:
        with pytest.raises(MediaTooLargeError):
            unzip([pack(data)], encoding, len(data) - 1)
        with pytest.raises(MediaFetchError):
            unzip([pack(data)[:-1]], encoding, len(data))
    assert unzip([pack(data) + b"\0\0padding"], encoding, len(data)) == data


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.integers(1, 9))
def test_members_of_gzip_follow_each_other(parts: list[bytes], size: int) -> None:
    whole = b"".join(parts)
    body = b"".join(map(gzip.compress, parts))
    assert unzip(cut(body, [size]), "gzip", len(whole)) == whole
    with pytest.raises(MediaFetchError):
        unzip(cut(body[:-1], [size]), "gzip", len(whole))


def test_members_are_bounded() -> None:
    members = gzip.compress(b"") * inflate.MAX_MEMBERS
    assert unzip([members], "gzip", 10) == b""
    with pytest.raises(MediaFetchError, match="parts"):
        unzip([members + gzip.compress(b"")], "gzip", 10)


def test_a_bomb_is_left_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB in 64 KiB: no more than the limit and a step are unpacked."""
    made: list[int] = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, **options) -> None:
            self._inflater = real(**options)

        def decompress(self, data: bytes, most: int) -> bytes:
            plain = self._inflater.decompress(data, most)
            made.append(len(plain))
            return plain

        def __getattr__(self, name: str) -> object:
            return getattr(self._inflater, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    with pytest.raises(MediaTooLargeError):
        unzip([gzip.compress(bytes(64 << 20), 9)], "gzip", 3_000_000)
    assert 3_000_000 < sum(made) <= 3_000_000 + (1 << 20)
    assert max(made) <= 1 << 20


@pytest.mark.parametrize("encoding", sorted(inflate.ENCODINGS))
@pytest.mark.parametrize(
    "body", [b"", b"x", b"\x1f", b"\x1f\x8b", b"no such thing", b"\x78\x9c\xff\xff"]
)
def test_damaged_bodies(encoding: str, body: bytes) -> None:
    with pytest.raises(MediaFetchError):
        unzip([body], encoding, 100)


@pytest.mark.parametrize(("encoding", "pack"), FORMS)
def test_nothing_is_lost_between_two_steps(encoding: str, pack) -> None:
    """The input has been taken in, but what it stands for does not fit into the step."""
    for excess in (1, 2, 100, 256, 257, 258):
        data = bytes((1 << 20) + excess)
        assert unzip([pack(data)], encoding, 2 << 20) == data
