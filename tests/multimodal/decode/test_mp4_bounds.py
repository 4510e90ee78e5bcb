"""Headers that promise more than there is are refused before they are believed."""

from __future__ import annotations

import struct

import pytest

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.decode import audio, mp4_bounds
from sensorium.multimodal.decode.video import video_file
from sensorium.multimodal.decode.video.limits import Limits
from tests.multimodal.clips import make_clip, make_sound

LIMITS = Limits(1000, 1 << 24, 1 << 24)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def changed(data: bytes, name: bytes, offset: int, *numbers: int) -> bytes:
    """With other numbers of 32 bits behind a box's name."""
    at = data.index(name) + len(name) + offset
    new = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:at] + new + data[at + len(new) :]


def test_ordinary_files_pass() -> None:
    for form in ("mp4", "mov", "hevc", "av1"):
        mp4_bounds.check_boxes(make_clip(form, 12))
    mp4_bounds.check_boxes(make_clip("mp4", 12, container_options=FRAGMENTS))
    mp4_bounds.check_boxes(b"")
    mp4_bounds.check_boxes(b"\0\0\0\x08ftyp\0\0")


def test_a_table_of_millions_of_one_size() -> None:
    data = changed(make_clip("mp4", 12), b"stsz", 4, 1, 1 << 24)
    with pytest.raises(MediaUndecodableError, match="far more samples than there are bytes"):
        video_file.decode(data, lambda facts: range(1), LIMITS)


def test_compressed_sound_is_counted_in_samples() -> None:
    data = make_clip("mp4", 12)
    mp4_bounds.check_boxes(changed(data, b"stsz", 4, 1, 11 * len(data)))


def test_a_table_that_the_file_has_bytes_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4_bounds, "MAX_SAMPLES", 100)
    data = changed(make_clip("mp4", 12), b"stsz", 4, 1, 101)
    with pytest.raises(MediaTooLargeError, match="101 samples; at most 100"):
        video_file.decode(data, lambda facts: range(1), LIMITS)


def test_runs_of_millions() -> None:
    data = changed(make_clip("mp4", 12, container_options=FRAGMENTS), b"trun", 0, 0, 1 << 24)
    with pytest.raises(MediaTooLargeError, match="in fragments"):
        video_file.decode(data, lambda facts: range(1), LIMITS)


def test_sounds_are_read_as_warily() -> None:
    data = changed(make_sound(), b"stsz", 4, 1, 1 << 24)
    with pytest.raises(MediaUndecodableError, match="far more samples than there are bytes"):
        audio.decode(data, audio.AudioOptions(), MediaConfig(), 16000)


def test_a_compressed_header() -> None:
    header = b"\0\0\0\x30moov\0\0\0\x28cmov\0\0\0\x0cdcomzlib" + bytes(20)
    with pytest.raises(MediaUndecodableError, match="compressed header"):
        video_file.decode(header, lambda facts: range(1), LIMITS)


def test_what_only_looks_like_a_table() -> None:
    """Pictures hold any bytes; and numbers of a header may spell a name, but give no length of a
    box then.
    """
    table = b"stsz\0\0\0\0" + struct.pack(">II", 1, 1 << 30)
    pictures = struct.pack(">I", 28) + b"mdat" + struct.pack(">I", 20) + table
    mp4_bounds.check_boxes(pictures + b"\0\0\0\x20free" + b"\xff\0\0\0" + table)
    with pytest.raises(MediaUndecodableError):
        mp4_bounds.check_boxes(b"\0\0\0\x20moov" + struct.pack(">I", 20) + table)


def test_many_empty_boxes_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4_bounds, "MAX_BOXES", 3)
    empty = b"\0\0\0\x08free"
    assert list(mp4_bounds._outside_of_media(empty * 5)) == [(0, 8), (8, 16), (16, 40)]
    assert list(mp4_bounds._outside_of_media(empty * 2)) == [(0, 8), (8, 16)]
