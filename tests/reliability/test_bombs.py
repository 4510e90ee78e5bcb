"""Small files that claim, or unpack to, something enormous.

Refused by their headers, or while they unpack.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tests.multimodal.clips import make_clip
from tests.reliability.asking import (
    Offline,
    Service,
    audio,
    image,
    place,
    text,
    video,
)
from tests.reliability.media import data_url, encoded, gif, picture, png, png_chunk, sound

HUGE = 60_000


def bmp() -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, HUGE, HUGE, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def tiff() -> bytes:
    """A small TIFF with the numbers of its first directory changed."""
    data = bytearray(encoded(Image.new("RGB", (300, 300)), "TIFF", compression="tiff_deflate"))
    offset = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, offset)[0]):
        at = offset + 2 + 12 * entry
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, HUGE)
    return bytes(data)


def webp() -> bytes:
    """A lossless WebP with another size in its header: 14 bits each."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = struct.pack("<I", 16_383 | 16_383 << 14)
    return bytes(data)


def jpeg() -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", HUGE, HUGE)
    return bytes(data)


def avif() -> bytes:
    """An AVIF whose container tells another size; not as much as its library refuses by itself."""
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    return changed(encoded(Image.new("RGB", (8, 8)), "AVIF"), b"ispe", 4, 16_000, 16_000)


PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png(HUGE, HUGE, png_chunk(b"IDAT", zlib.compress(bytes(1000)))),
    "PNG that is whole": lambda: png(
        9000, 9000, png_chunk(b"IDAT", zlib.compress(bytes(1126 * 9000), 9)), depth=1, colours=0
    ),
    "GIF": lambda: gif(HUGE, HUGE),
    "BMP": bmp,
    "TIFF": tiff,
    "WebP": webp,
    "JPEG": jpeg,
    "AVIF": avif,
    "PPM": lambda: b"P6 60000 60000 255\n" + bytes(1000),
    "PPM of many digits": lambda: b"P6 999999999 999999999 255\n" + bytes(1000),
}


@pytest.mark.parametrize("name", PICTURES)
def test_images_are_measured_by_their_header(anywhere: Service | Offline, name: str) -> None:
    """Decompression bombs of each format.

    The pixels of the header are counted before any is decoded.
    """
    part = image(data_url(PICTURES[name]()))
    answer = anywhere.ask(part)
    answer.is_refusal(413, "media_too_large", place(part))


def fits() -> bytes:
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   = 2",
        "END",
    ]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + gzip.compress(
        bytes(10_000_000), 9
    )


OTHERS: dict[str, Callable[[], bytes]] = {
    "FITS": fits,
    "PSD": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, HUGE, HUGE, 8, 3) + bytes(40),
    "ICO": lambda: encoded(picture(32, 32), "ICO"),
    "TGA": lambda: encoded(picture(32, 32), "TGA"),
    "EPS": lambda: encoded(picture(32, 32), "EPS"),
    "PCX": lambda: encoded(picture(32, 32), "PCX"),
    "DDS": lambda: encoded(picture(32, 32), "DDS"),
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
    "gzip": lambda: gzip.compress(bytes(10_000_000)),
    "ZIP": lambda: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rare_formats_are_not_opened(served: Service, name: str) -> None:
    """CVE-2026-40192: Pillow unpacked a FITS file's gzip without a bound.

    Of its formats a short list is opened.
    """
    part = image(data_url(OTHERS[name]()))
    answer = served.ask(part)
    answer.is_refusal(400, "media_undecodable", place(part))
    assert "known format" in answer.error["message"]


# --- clips ----------------------------------------------------------------------------------------


def packed(num_frames: int) -> str:
    """``data:video/jpeg`` of one tiny frame, many times."""
    frame = data_url(encoded(Image.new("L", (1, 1)), "JPEG", quality=1), "video/jpeg")
    return frame + ("," + frame.partition(",")[2]) * (num_frames - 1)


def test_images_as_a_video_are_counted(served: Service) -> None:
    """CVE-2026-34755, CVE-2026-5497.

    A ``video/jpeg`` URL of a hundred thousand tiny frames ate all memory.
    """
    part = video("data:video/jpeg;base64," + ",".join(["/9j/"] * 100_000))
    served.ask(part).is_refusal(413, "media_too_large", place(part))
    part = video(packed(6000))
    served.ask(part, text("What happens?")).is_refusal(413, "media_too_large", place(part))
    assert served.ask(video(packed(16)), text("What happens?")).status == 200


def changed(data: bytes, name: bytes, offset: int, *numbers: int) -> bytes:
    """With other numbers of 32 bits behind a box's name."""
    at = data.index(name) + len(name) + offset
    new = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:at] + new + data[at + len(new) :]


def large_frames() -> bytes:
    """A clip whose track, and whose codec's header, are of a size beyond the limit on pixels."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 8000, 2100, "yuv420p"
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame.from_ndarray(np.zeros((3150, 8000), np.uint8), format="yuv420p")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


CLIPS: dict[str, tuple[Callable[[], bytes], int]] = {
    "a GIF of huge frames": (lambda: gif(65535, 65535, 2), 413),
    "a GIF of many frames": (lambda: gif(64, 64, 9000), 413),
    "large frames": (large_frames, 413),
    "a table of millions of samples": (
        lambda: changed(make_clip("mp4", 6), b"stsz", 4, 1, 1 << 24),
        400,
    ),
    "fragments of millions of samples": (
        lambda: changed(
            make_clip("mp4", 6, container_options={"movflags": "frag_keyframe+empty_moov"}),
            b"trun",
            0,
            0,
            1 << 24,
        ),
        413,
    ),
    "a compressed header": (
        lambda: b"\0\0\0\x30moov\0\0\0\x28cmov\0\0\0\x0cdcomzlib" + bytes(20),
        400,
    ),
}


@pytest.mark.parametrize("name", CLIPS)
def test_videos_are_measured_before_they_are_decoded(served: Service, name: str) -> None:
    """Clips that grow: frames of a size, numbers of frames, and tables that promise millions of
    samples.
    """
    make, status = CLIPS[name]
    part = video(data_url(make(), "video/mp4"))
    code = "media_too_large" if status == 413 else "media_undecodable"
    served.ask(part, text("What happens?")).is_refusal(status, code, place(part))


GREEDY = (
    {"media_io_kwargs": {"video": {"num_frames": 10**9}}},
    {"media_io_kwargs": {"video": {"num_frames": -1}}},
    {"media_io_kwargs": {"video": {"fps": 1e9}}},
    {"media_io_kwargs": {"video": {"fps": 1e300}}},
    {"mm_processor_kwargs": {"num_frames": 10**9}},
    {"mm_processor_kwargs": {"fps": 1e9}},
    {"mm_processor_kwargs": {"max_frames": 10**9, "min_frames": 10**9}},
    {"mm_processor_kwargs": {"min_pixels": 10**15, "max_pixels": 10**15}},
    {"mm_processor_kwargs": {"max_pixels": 10**15}},
    {"mm_processor_kwargs": {"size": {"shortest_edge": 10**15, "longest_edge": 10**15}}},
)


@pytest.mark.parametrize("fields", GREEDY, ids=str)
def test_requests_do_not_set_how_much_is_allocated(served: Service, fields: dict[str, Any]) -> None:
    """GHSA-58v5-2m8f-94pr (CVE-2026-105760).

    Fps and frames of a request decided how much memory was taken. The server's limits stand above
    what a request asks.
    """
    clip = data_url(make_clip("mp4", 20), "video/mp4")
    for content in ((video(clip), text("What?")), (image(data_url(encoded(picture()))),)):
        answer = served.ask(*content, **fields)
        answer.is_discreet()
        if answer.status == 200:
            assert answer.body["usage"]["prompt_tokens"] < 2048
        else:
            allowed = {
                "invalid_request",
                "media_too_large",
                "context_length_exceeded",
                "media_undecodable",
            }
            assert answer.error["code"] in allowed, answer.body


# --- sounds ---------------------------------------------------------------------------------------


def opus(seconds: int) -> bytes:
    """Silence, of which a minute takes a few kilobytes."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as out:
        stream: Any = out.add_stream("libopus", rate=48000, layout="mono")
        stream.bit_rate = 6000
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        for second in range(seconds):
            frame.pts = second * 48000
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def endless_wav() -> bytes:
    """A WAV whose header promises four gigabytes."""
    data = bytearray(sound())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    return bytes(data)


SOUNDS: dict[str, Callable[[], bytes]] = {
    "Opus": lambda: opus(40),
    "FLAC": lambda: sound(np.zeros(16000 * 60, np.float32), form="FLAC"),
    "OGG": lambda: sound(np.zeros(16000 * 40, np.float32), form="OGG"),
    "MP3": lambda: sound(np.zeros(16000 * 40, np.float32), form="MP3"),
    "a low rate": lambda: sound(np.zeros(1000 * 21, np.float32), rate=1000),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_audio_is_counted_while_it_is_decoded(listening: Service | Offline, name: str) -> None:
    """CVE-2026-54233: 25 MB of Opus became 15 GB of samples.

    Seconds are counted by the header and while decoding.
    """
    data = SOUNDS[name]()
    assert len(data) < 300_000
    part = audio(data_url(data, "audio/ogg"))
    answer = listening.ask(part, text("What do you hear?"))
    answer.is_refusal(413, "media_too_large", place(part))
    assert "--max-audio-seconds" in answer.error["message"]


def test_a_header_of_audio_is_not_believed(listening: Service | Offline) -> None:
    """A header that promises gigabytes is refused or read as far as there is something."""
    part = audio(data_url(endless_wav(), "audio/wav"))
    answer = listening.ask(part, text("What do you hear?"))
    answer.is_discreet()
    assert answer.status in (200, 400, 413)
