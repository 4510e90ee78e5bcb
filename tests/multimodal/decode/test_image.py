import io
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin, features

from sensorium.errors import InvalidRequestError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.cache.digest import object_digest
from sensorium.multimodal.decode import heif, image
from sensorium.multimodal.decode.image import ImageOptions, decode, decode_object
from tests.multimodal.support import encoded, picture

WHITE = ImageOptions()
PIXELS = 1_000_000


def read(data: bytes, options: ImageOptions = WHITE) -> np.ndarray:
    pixels = decode(data, options, max_pixels=PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    return pixels


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_as_they_were(form: str) -> None:
    source = picture(7, 5)
    data = encoded(source, form, **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(read(data), np.asarray(source))


@pytest.mark.parametrize("form", ["JPEG", "GIF", "AVIF", "WEBP", "MPO"])
def test_lossy_formats_equal_what_pillow_decodes(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(picture(64, 48), form)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(read(data), expected)


def test_jpeg_is_decoded_at_full_size() -> None:
    assert read(encoded(picture(640, 480), "JPEG")).shape == (480, 640, 3)


@pytest.mark.parametrize("form", ["PDF", "EPS", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(MediaUndecodableError, match="known format"):
        read(encoded(picture(32, 32), form))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg/>",
        bytes(100),
        b"SIMPLE  =                    T",
        b"RIFF\x10\0\0\0WEBPVP8X",
        b"\xff\xd8\xff",
        b"P6 4 4 255\n",
    ],
)
def test_what_is_no_image_is_refused_cleanly(data: bytes) -> None:
    with pytest.raises(MediaUndecodableError) as caught:
        read(data)
    assert "0x" not in caught.value.message
    assert "BytesIO" not in caught.value.message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_truncated_and_damaged_files_are_refused_or_read(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(picture(40, 30), form)
    random = np.random.default_rng(0)
    refusals: list[str] = []
    with pytest.raises(MediaUndecodableError):
        read(data[: len(data) // 2])
    for length in random.integers(0, len(data), 20):
        broken = bytearray(data)
        broken[length] ^= 0xFF
        for candidate in (bytes(broken), data[:length]):
            try:
                pixels = decode(candidate, WHITE, max_pixels=PIXELS)
            except (MediaUndecodableError, MediaTooLargeError) as error:
                refusals.append(error.message)
            else:
                assert pixels.size <= 3 * PIXELS
    assert not any("0x" in message for message in refusals)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def bomb(form: str, width: int, height: int) -> bytes:
    if form == "PNG":
        return png_header(width, height)
    if form == "PPM":
        return f"P6 {width} {height} 255\n".encode()
    if form == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", width, height, 0, 0, 0)
            + b"\x2c"
            + bytes(9)
            + b"\x02\0;"
        )
    if form == "BMP":
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info
    if form == "TIFF":
        small = bytearray(encoded(Image.new("RGB", (300, 300)), "TIFF", compression="tiff_deflate"))
        offset = struct.unpack_from("<I", small, 4)[0]
        entries = struct.unpack_from("<H", small, offset)[0]
        for entry in range(entries):
            at = offset + 2 + 12 * entry
            tag = struct.unpack_from("<H", small, at)[0]
            if tag in (256, 257):
                value = width if tag == 256 else height
                small[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
        return bytes(small)
    assert form == "WEBP"
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("form", ["PNG", "PPM", "GIF", "BMP", "TIFF", "WEBP"])
def test_bombs_are_refused_by_their_header(form: str) -> None:
    with pytest.raises((MediaTooLargeError, MediaUndecodableError)) as caught:
        decode(bomb(form, 50_000, 50_000), WHITE, max_pixels=178_956_970)
    if form != "WEBP":  # such a WebP has no frame and is refused for that
        assert isinstance(caught.value, MediaTooLargeError)
        assert caught.value.status == 413


def test_the_pixel_limit_is_exact_and_named() -> None:
    data = encoded(picture(30, 20))
    assert decode(data, WHITE, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(MediaTooLargeError, match=r"30 x 20 pixels.*599"):
        decode(data, WHITE, max_pixels=599)
    for source in (picture(30, 20), np.zeros((20, 30, 3), np.uint8), torch.zeros(3, 20, 30)):
        with pytest.raises(MediaTooLargeError):
            decode_object(source, WHITE, max_pixels=599)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    assert read(encoded(picture(*size))).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(form: str, turn: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # one bright corner, above left, and a grey one beside it
    upright[:8, 24:] = 128
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]  # the inverse transposition
    stored = Image.fromarray(upright)
    stored = stored if back is None else stored.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    options = {"lossless": True} if form == "WEBP" else options
    data = encoded(stored, form, exif=exif.tobytes(), **options)
    pixels = read(data)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - upright).max() <= 8
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(decode_object(opened, WHITE, max_pixels=PIXELS), pixels)


def test_broken_exif_is_ignored() -> None:
    data = encoded(picture(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    assert read(data).shape == (8, 8, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read(data)[0, 0], [255, 0, 0])


def test_16_bit_greys_are_scaled() -> None:
    values = np.array([[0, 128, 129, 256, 257, 32767, 32768, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    sixteen = Image.fromarray(values)
    assert sixteen.mode == "I;16"
    for data in (encoded(sixteen, "PNG"), encoded(sixteen, "TIFF"), encoded(sixteen, "PPM")):
        assert np.array_equal(read(data)[..., 0], expected)
    assert np.array_equal(decode_object(sixteen, WHITE, max_pixels=PIXELS)[..., 2], expected)


def test_16_bit_png_with_a_transparent_grey() -> None:
    sixteen = Image.fromarray(np.array([[1000, 40000]], np.uint16))
    data = encoded(sixteen, "PNG", transparency=1000)
    assert read(data, ImageOptions((1, 2, 3)))[0].tolist() == [[1, 2, 3], [156, 156, 156]]


def test_cmyk_grey_and_one_bit() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for form in ("TIFF", "JPEG"):
        assert np.abs(read(encoded(cmyk, form))[0, 0].astype(int) - [255, 0, 0]).max() <= 3
    assert read(encoded(Image.new("L", (2, 2), 77)))[0, 0].tolist() == [77] * 3
    assert read(encoded(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255] * 3


def transparent(mode: str) -> bytes:
    """A PNG of two pixels: black and wholly transparent, white and opaque."""
    if mode == "RGBA":
        image = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 255, 255, 255]]], np.uint8))
        return encoded(image)
    if mode == "LA":
        image = Image.fromarray(np.array([[[0, 0], [255, 255]]], np.uint8), "LA")
        return encoded(image)
    image = Image.new("P" if mode.startswith("P") else mode, (2, 1))
    if mode.startswith("P"):
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.putpixel((1, 0), {"P": 1, "P-bytes": 1, "L": 255, "RGB": (255, 255, 255)}[mode])
    key = {"P": 0, "P-bytes": b"\x00\xff", "L": 0, "RGB": (0, 0, 0)}[mode]
    return encoded(image, transparency=key)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P-bytes", "L", "RGB"])
@pytest.mark.parametrize("color", [(255, 255, 255), (10, 200, 30)])
def test_transparency_lies_over_the_background(mode: str, color: tuple[int, int, int]) -> None:
    data = transparent(mode)
    assert read(data, ImageOptions(color))[0].tolist() == [list(color), [255, 255, 255]]
    with Image.open(io.BytesIO(data)) as opened:
        pixels = decode_object(opened, ImageOptions(color), max_pixels=PIXELS)
    assert pixels[0].tolist() == [list(color), [255, 255, 255]]


def test_pa_and_half_transparency() -> None:
    pa = Image.new("P", (1, 1))
    pa.putpalette([200, 100, 0])
    pa = pa.convert("PA")
    pa.putalpha(0)
    assert decode_object(pa, ImageOptions((9, 8, 7)), max_pixels=9)[0, 0].tolist() == [9, 8, 7]
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    mixed = decode_object(half, ImageOptions((0, 0, 255)), max_pixels=9)[0, 0]
    assert np.abs(mixed.astype(int) - [100, 50, 127]).max() <= 1


def test_pictures_without_transparency_ignore_the_background() -> None:
    source = picture()
    odd = ImageOptions((1, 2, 3))
    assert np.array_equal(read(encoded(source), odd), np.asarray(source))
    opaque = source.convert("RGBA")
    assert np.array_equal(read(encoded(opaque), odd), np.asarray(source))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B", "LA", "PA"]
)
def test_pil_objects_of_many_modes(mode: str) -> None:
    assert decode_object(Image.new(mode, (3, 2)), WHITE, max_pixels=9).shape == (2, 3, 3)


def test_floating_point_pil_images_are_refused() -> None:
    with pytest.raises(MediaUndecodableError, match="8 bits"):
        decode_object(Image.new("F", (2, 2)), WHITE, max_pixels=9)


def test_all_objects_of_one_picture_give_the_same_array() -> None:
    source = picture(9, 7)
    pixels = np.asarray(source)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for same in (
        source,
        pixels,
        np.asfortranarray(pixels),
        chw,
        chw.contiguous(),
        chw.float() / 255,
        chw.double() / 255,
        (chw.float() / 255).requires_grad_(),
    ):
        found = decode_object(same, WHITE, max_pixels=PIXELS)
        assert np.array_equal(found, pixels)
        assert found.flags.c_contiguous


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 2, 3), np.int64), "uint8"),
        (np.zeros((3, 2, 2), np.uint8), "height, width, 3"),
        (np.zeros((2, 2), np.uint8), "height, width, 3"),
        (np.zeros((2, 2, 4), np.uint8), "height, width, 3"),
        (np.zeros((0, 2, 3), np.uint8), "no pixels"),
        (torch.zeros(2, 2, 3), "3, height, width"),
        (torch.zeros(3, 2, 2, dtype=torch.int32), "uint8"),
        (torch.full((3, 2, 2), 255.01), "0 to 255, or from 0 to 1"),
        (torch.full((3, 2, 2), -0.01), "0 to 255, or from 0 to 1"),
        (torch.full((3, 2, 2), float("nan")), "0 to 255, or from 0 to 1"),
        (torch.zeros(3, 2, 2).to_sparse(), "dense"),
        (torch.zeros(3, 2, 2, device="meta"), "dense"),
        ("a.png", "str"),
        (None, "NoneType"),
    ],
)
def test_objects_that_are_no_pictures(source: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        decode_object(source, WHITE, max_pixels=PIXELS)


def test_a_lazy_pil_image_is_loaded_once_and_safely(tmp_path) -> None:
    path = tmp_path / "a.png"
    picture(200, 200).save(path)
    with Image.open(path) as lazy:
        results: list[np.ndarray] = []
        threads = [
            threading.Thread(
                target=lambda: results.append(decode_object(lazy, WHITE, max_pixels=PIXELS))
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(np.array_equal(r, np.asarray(picture(200, 200))) for r in results)
    assert len(results) == 4
    with Image.open(path) as closed:
        pass
    with pytest.raises(MediaUndecodableError):
        decode_object(closed, WHITE, max_pixels=PIXELS)


@pytest.mark.parametrize("color", [[1, 2, 3], (0, 255, 7)])
def test_background_colours(color) -> None:
    parsed = ImageOptions.parse({"rgba_background_color": color})
    assert parsed.rgba_background_color == tuple(color)
    assert ImageOptions.parse({}) == WHITE


@pytest.mark.parametrize(
    "color",
    [None, 3, "white", [1, 2], [1, 2, 3, 4], [1, 2, 256], [-1, 2, 3], [1.0, 2, 3], [True, 2, 3]],
)
def test_wrong_background_colours(color) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ImageOptions.parse({"rgba_background_color": color})
    assert caught.value.param == "media_io_kwargs.image.rgba_background_color"


def test_unknown_options_get_a_suggestion() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'rgba_background_color'"):
        ImageOptions.parse({"rgba_background_colour": [0, 0, 0]})
    with pytest.raises(InvalidRequestError, match="mapping"):
        ImageOptions.parse([1])


def test_older_spellings_warn() -> None:
    for cls in (image.ImagePixelData, image.ImageFeatureData):
        with pytest.warns(DeprecationWarning, match="multi_modal_data"):
            assert cls("x").content == "x"


# --- greys of more than 8 bits, and HEIC ----------------------------------------------------------


def tiff(values: np.ndarray, **tags: Any) -> bytes:
    """A grey TIFF file of these values, with further tags by number."""
    file = io.BytesIO()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number[1:])] = value
    Image.fromarray(values).save(file, "TIFF", tiffinfo=info)
    return file.getvalue()


def greys(data: bytes) -> list[int]:
    return decode(data, WHITE, max_pixels=99)[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 128, 255], [0, 1, 128, 255]),
        ([0, 257, 32896, 65535], [0, 1, 128, 255]),
        ([0, 1 << 24, 1 << 30, (1 << 31) - 1], [0, 2, 128, 255]),
        ([-5, 0, 100, 200], [0, 0, 100, 200]),
    ],
)
def test_32_bit_values_are_taken_for_what_they_hold(values: list[int], expected: list[int]) -> None:
    """Programs write 8 and 16 bits into samples of 32, and the file does not say which."""
    array = np.array([values], np.int32)
    assert greys(tiff(array)) == expected
    picture = Image.fromarray(array)
    assert picture.mode == "I"
    assert decode_object(picture, WHITE, max_pixels=99)[0, :, 0].tolist() == expected


def test_32_bits_without_a_sign() -> None:
    values = np.array([[0, 1 << 30, 1 << 31, (1 << 32) - 1]], np.uint32)
    signed = tiff(values.view(np.int32))
    tag = struct.pack("<HHIH", 339, 3, 1, 2)  # how Pillow says that there is one
    assert signed.count(tag) == 1
    data = signed.replace(tag, struct.pack("<HHIH", 339, 3, 1, 1))
    assert greys(data) == [0, 64, 128, 255]


@pytest.mark.parametrize("tag", ["_281", "_341"])
def test_white_is_what_the_file_names(tag: str) -> None:
    array = np.array([[0, 500, 1000, 4000]], np.int32)
    most = (1000,) if tag == "_281" else (1000.0,)
    assert greys(tiff(array, **{tag: most})) == [0, 128, 255, 255]


def test_sixteen_bits_stay_sixteen_bits_however_dark() -> None:
    """Their file says what white is: a dark picture is not made bright."""
    dark = np.array([[0, 128, 255, 600]], np.uint16)
    assert greys(tiff(dark)) == [0, 0, 1, 2]
    file = io.BytesIO()
    Image.fromarray(dark).save(file, "PNG")
    assert greys(file.getvalue()) == [0, 0, 1, 2]
    assert greys(b"P5 4 1 65535\n" + dark.astype(">u2").tobytes()) == [0, 0, 1, 2]


def test_one_value_of_two_whites_has_two_digests() -> None:
    array = np.array([[0, 500, 1000, 1000]], np.int32)
    plain = Image.open(io.BytesIO(tiff(array)))
    named = Image.open(io.BytesIO(tiff(array, _281=(1000,))))
    assert plain.tobytes() == named.tobytes()
    assert object_digest(plain) != object_digest(named)


def with_white_zero(data: bytes) -> bytes:
    """The TIFF file with tag 262 saying that 0 is white."""
    tag = struct.pack("<HHIH", 262, 3, 1, 1)
    assert data.count(tag) == 1
    return data.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0))


@pytest.mark.parametrize("values", [np.uint8([0, 1, 128, 255]), np.uint16([0, 257, 32896, 65535])])
def test_where_zero_is_white_black_and_white_change_places(values: np.ndarray) -> None:
    assert greys(with_white_zero(tiff(values[None]))) == [255, 254, 127, 0]


def test_one_content_of_two_readings_has_two_digests() -> None:
    wide = np.array([[0, 500, 1000, 1 << 15]], np.uint16)
    plain = Image.open(io.BytesIO(tiff(wide)))
    turned = Image.open(io.BytesIO(with_white_zero(tiff(wide))))
    assert plain.tobytes() == turned.tobytes()
    assert object_digest(plain) != object_digest(turned)
    signed = tiff(np.array([[0, 1 << 30, -(1 << 31), -1]], np.int32))
    unsigned = signed.replace(
        struct.pack("<HHIH", 339, 3, 1, 2), struct.pack("<HHIH", 339, 3, 1, 1)
    )
    first, second = (Image.open(io.BytesIO(data)) for data in (signed, unsigned))
    assert first.tobytes() == second.tobytes()
    assert object_digest(first) != object_digest(second)


@pytest.fixture
def heic() -> bytes:
    """A HEIC photo, red above and blue below, that is to be turned by a quarter."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra 'heif' is not installed")
    upper = np.zeros((64, 96, 3), np.uint8)
    upper[:32, :, 0] = upper[32:, :, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    made = pillow_heif.from_pillow(Image.fromarray(upper))
    made.save(file, quality=95, exif=exif.tobytes())
    return file.getvalue()


def test_heic_photos(heic: bytes) -> None:
    pixels = decode(heic, WHITE, max_pixels=96 * 64).astype(int)
    assert pixels.shape == (96, 64, 3)
    right, left = pixels[8:-8, 40:], pixels[8:-8, :24]
    assert right[..., 0].min() > 200 > 60 > right[..., 2].max()
    assert left[..., 2].min() > 200 > 60 > left[..., 0].max()
    with pytest.raises(MediaTooLargeError, match="--max-image-pixels"):
        decode(heic, WHITE, max_pixels=96 * 64 - 1)
    with pytest.raises(MediaUndecodableError, match="damaged"):
        decode(heic[: len(heic) // 2], WHITE, max_pixels=96 * 64)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch, brand: bytes) -> None:
    monkeypatch.setattr(heif, "register", lambda: False)
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64)
    with pytest.raises(MediaUndecodableError, match=r"pip install 'sensorium\[heif\]'"):
        decode(data, WHITE, max_pixels=99)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((40, 30), None, (40, 30)),
        ((40, 30), 1200, (40, 30)),
        ((40, 30), 300, (20, 15)),
        ((1000, 1), 100, (100, 1)),
        ((1, 1000), 1, (1, 1)),
    ],
)
def test_a_bound_reduces_larger_images(
    size: tuple[int, int], most: int | None, expected: tuple[int, int]
) -> None:
    options = ImageOptions(max_pixels=most)
    image = Image.new("RGB", size, (10, 200, 30))
    array = np.array(image)
    for pixels in (
        decode(encoded(image), options, max_pixels=PIXELS),
        decode_object(image, options, max_pixels=PIXELS),
        decode_object(array, options, max_pixels=PIXELS),
    ):
        assert pixels.shape == (expected[1], expected[0], 3)
        assert (pixels == (10, 200, 30)).all()


def test_bounds_are_positive_integers() -> None:
    assert ImageOptions.parse({"max_pixels": 5}) == ImageOptions(max_pixels=5)
    assert ImageOptions.parse({"max_pixels": None}) == ImageOptions()
    for bad in (0, -1, 1.5, "5", True):
        with pytest.raises(InvalidRequestError, match="max_pixels must be a positive integer"):
            ImageOptions.parse({"max_pixels": bad})
    colored = ImageOptions((1, 2, 3), 50)
    assert colored.bounded_by(9) == ImageOptions((1, 2, 3), 9)
    assert colored.bounded_by(None) == colored.bounded_by(99) == colored
