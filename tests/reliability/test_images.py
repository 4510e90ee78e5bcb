"""Pictures of every odd kind.

An answer or a clear refusal, never a crash, and what the model sees is what was sent.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from tests.reliability.asking import Offline, Service, image, place, text, video
from tests.reliability.media import data_url, encoded, picture, png, png_chunk

QUESTION = text("What is shown?")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def skip_avif(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")


SIZES = [
    *((1, 1), (1, 2), (2, 1), (1, 200), (200, 1), (1, 10_000), (10_000, 1), (3, 1), (1, 3)),
    *((199, 1), (201, 1), (28, 28), (27, 29), (400, 800), (800, 400), (5000, 20), (1000, 3)),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["image", "clip"])
def test_every_shape_has_an_answer(
    anywhere: Service | Offline, size: tuple[int, int], kind: str
) -> None:
    """CVE-2026-22773: a picture of one pixel, of ambiguous axes, ended the worker of vLLM.

    llama.cpp issue 13827: others of a certain aspect ended its server. Here: an answer, or 400 with
    the place.
    """
    if kind == "image":
        part = image(data_url(encoded(picture(*size))))
    else:
        part = video(data_url(encoded(picture(*size), "JPEG"), "video/jpeg"))
    answer = anywhere.ask(part, QUESTION)
    if answer.status != 200:
        answer.is_refusal(400, answer.error["code"], place(part))
        assert answer.error["code"] in ("media_undecodable", "invalid_request")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "HSV"])
def test_every_mode_has_an_answer(offline: Offline, mode: str) -> None:
    """Palettes, grey, alpha, 16 bits, CMYK as PIL objects."""
    part = {"type": "image_pil", "image_pil": Image.new(mode, (40, 30))}
    assert offline.ask(part, QUESTION).status == 200


def animation(form: str) -> bytes:
    frames = [picture(40, 30, seed) for seed in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)


def sixteen_bits() -> bytes:
    values = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    return encoded(Image.fromarray(values))


def keyed_palette() -> bytes:
    return encoded(picture(40, 30).quantize(16), transparency=bytes(range(0, 256, 16)))


def profiled(form: str) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(picture(40, 30), form, icc_profile=profile)


KINDS: dict[str, Callable[[], bytes]] = {
    "CMYK JPEG": lambda: encoded(picture(40, 30).convert("CMYK"), "JPEG"),
    "16-bit PNG": sixteen_bits,
    "palette and tRNS": keyed_palette,
    "animated GIF": lambda: animation("GIF"),
    "APNG": lambda: animation("PNG"),
    "animated WebP": lambda: animation("WEBP"),
    "pages of a TIFF": lambda: animation("TIFF"),
    "ICC in a JPEG": lambda: profiled("JPEG"),
    "ICC in a PNG": lambda: profiled("PNG"),
    "broken ICC": lambda: encoded(picture(40, 30), icc_profile=b"\xff" * 500),
    "broken EXIF": lambda: encoded(picture(40, 30), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "progressive JPEG": lambda: encoded(picture(40, 30), "JPEG", progressive=True),
    "one bit": lambda: encoded(picture(40, 30).convert("1")),
    "grey and alpha": lambda: encoded(picture(40, 30).convert("LA")),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_an_answer(served: Service, name: str) -> None:
    """CMYK, 16 bits, palettes with transparency, animations, colour profiles good and bad."""
    assert served.ask(image(data_url(KINDS[name]())), QUESTION).status == 200


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_are_answered_or_refused(anywhere: Service | Offline, form: str) -> None:
    """Cut at many places, with bytes turned, with another format's head.

    An answer or 400 at the part.
    """
    skip_avif(form)
    data = encoded(picture(40, 30), form)
    random = np.random.default_rng(0)
    damaged = [data[: len(data) * part // 8] for part in range(8)]
    damaged += [b"\x89PNG\r\n\x1a\n" + data, data[::-1], b"GIF89a" + data[6:]]
    for _ in range(6):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 4):
            broken[at] ^= int(random.integers(1, 256))
        damaged.append(bytes(broken))
    codes = set()
    for number, candidate in enumerate(damaged):
        part = image(data_url(candidate))
        answer = anywhere.ask(QUESTION, part)
        answer.is_discreet()
        if answer.status != 200:
            codes.add(answer.error["code"])
            assert answer.error["param"] == place(part, 1), (number, answer.body)
    assert codes <= {"media_undecodable", "media_too_large", "invalid_request", "media_refused"}
    assert "media_undecodable" in codes


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"<svg/>", b"%PDF-1.4", b"%!PS-Adobe-3.0", b"P7\n", bytes(4096)]
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
def test_messages_hold_no_addresses_of_memory(served: Service, data: bytes, route: str) -> None:
    """CVE-2026-22778, CVE-2026-54236.

    Pillow's text for bytes that are no picture names the object that they lie in, and with it an
    address in the server's memory; on some routes it was passed on.
    """
    part = image(data_url(data))
    body = {"messages": [{"role": "user", "content": [part]}]}
    if route == "/v1/chat/completions":
        body["max_tokens"] = 1  # type: ignore[assignment]
    served.post(route, body).is_refusal(400, "media_undecodable", place(part))


def jpeg2000_clip() -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as out:
        stream: Any = out.add_stream("jpeg2000", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for seed in range(3):
            out.mux(stream.encode(av.VideoFrame.from_image(picture(seed=seed))))
        out.mux(stream.encode(None))
    return file.getvalue()


def test_jpeg_2000_is_not_decoded(served: Service) -> None:
    """CVE-2026-22778: a clip of JPEG 2000 frames overflowed a decoder that nobody needs.

    It is not among those that are used, for pictures or clips.
    """
    part = video(data_url(jpeg2000_clip(), "video/quicktime"))
    answer = served.ask(part, QUESTION)
    answer.is_refusal(400, "media_undecodable", place(part))
    assert "codec" in answer.error["message"]
    picture_part = image(data_url(encoded(picture(), "JPEG2000"), "image/jp2"))
    served.ask(picture_part).is_refusal(400, "media_undecodable", place(picture_part))


def turned(upright: Image.Image, turn: int) -> bytes:
    """The picture stored turned, with the orientation that turns it back."""
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(stored, exif=exif.tobytes())


def test_orientation_is_applied_before_the_model_sees(offline: Offline) -> None:
    """CVE-2026-12491 (GHSA-8jr5-v98p-w75m): the model saw other pixels than people do.

    All eight orientations of one picture give the answer, to the last bit of its probabilities, of
    the upright one. Each file is asked about once, so that no cache answers; what is stored turned
    without saying so gives another.
    """
    upright = picture(112, 56, seed=5)

    def seen(data: bytes) -> object:
        return offline.ask(image(data_url(data)), QUESTION, logprobs=1).body

    offline.ask(image(data_url(encoded(picture(112, 56, seed=6)))), QUESTION)
    expected = seen(encoded(upright))
    for turn in range(1, 9):
        assert seen(turned(upright, turn)) == expected, turn
    assert seen(encoded(upright.transpose(Image.Transpose.ROTATE_180))) != expected


def test_transparent_pixels_are_what_is_shown(served: Service) -> None:
    """The same fault with transparency: colours under transparent pixels are hidden from people.

    Whatever they are, the answer is that of the background, and each file still has an identity of
    its own.
    """
    hidden, plain = [], Image.new("RGB", (64, 48), "white")
    for colour in ("red", "blue", "black"):
        clear = Image.new("RGBA", (64, 48), colour)
        clear.putalpha(0)
        hidden.append(encoded(clear))
    one_palette = Image.new("P", (64, 48), 0)
    one_palette.putpalette([255, 0, 0])
    hidden.append(encoded(one_palette, transparency=0))
    answers = {
        served.ask(image(data_url(data)), text("Which colour is it?"), max_tokens=8).text
        for data in (encoded(plain), *hidden)
    }
    assert len(answers) == 1
    own = {"image": {"rgba_background_color": [255, 0, 0]}}
    red = served.ask(
        image(data_url(encoded(Image.new("RGB", (64, 48), (255, 0, 0))))),
        text("Which colour is it?"),
        max_tokens=8,
    )
    over_red = served.ask(
        image(data_url(hidden[1])),
        text("Which colour is it?"),
        max_tokens=8,
        media_io_kwargs=own,
    )
    assert over_red.text == red.text


def test_texts_within_images_are_bounded(served: Service) -> None:
    """Compressed comments of a PNG unpack to any size.

    Pillow's bound on them ends in a refusal, not in memory.
    """
    import zlib

    bomb = zlib.compress(bytes(20_000_000), 9)
    chunks = (
        png_chunk(b"zTXt", b"Comment\0\0" + bomb),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        png_chunk(b"iCCP", b"profile\0\0" + bomb),
    )
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(31 * 10)))
    for chunk in chunks:
        part = image(data_url(png(10, 10, chunk, pixels)))
        served.ask(part, QUESTION).is_refusal(400, "media_undecodable", place(part))
