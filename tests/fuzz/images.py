"""Small images of every accepted format, made when they are needed."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

WIDTH, HEIGHT = 27, 18


def images() -> dict[str, bytes]:
    """Encoded images by name: ``png grey``, ``jpeg cmyk`` …"""
    return {**_png(), **_jpeg(), **_webp(), **_gif(), **_tiff(), **_others()}


def drawing(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Any:
    """A picture of smooth colours with a little noise, so that every coder has something to do."""
    width, height = size
    rows, columns = np.indices((height, width))
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    waves = np.stack([8 * rows, 6 * columns, 5 * (rows + columns) + 40 * seed], axis=2)
    image = Image.fromarray(((waves + noise) % 256).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray((rows * 255 // max(height - 1, 1)).astype(np.uint8)))
        return image
    return image.convert(mode)


def saved(image: Any, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _several() -> dict[str, Any]:
    return {"save_all": True, "append_images": [drawing(seed=s) for s in (1, 2)]}


def _png() -> dict[str, bytes]:
    wide = drawing("L").convert("I").point(lambda grey: grey * 257)
    palette = drawing("P")
    return {
        "png rgb": saved(drawing(), "PNG"),
        "png rgba": saved(drawing("RGBA"), "PNG"),
        "png grey": saved(drawing("L"), "PNG"),
        "png grey alpha": saved(drawing("LA"), "PNG"),
        "png 1 bit": saved(drawing("1"), "PNG"),
        "png 16 bit": saved(wide.convert("I;16"), "PNG"),
        "png 16 bit rgb": interlaced(16, 2, adam7=False),
        "png palette": saved(palette, "PNG", transparency=bytes(range(0, 256, 3))),
        "png one transparent colour": saved(drawing(), "PNG", transparency=(8, 9, 10)),
        "png interlaced": interlaced(8, 2),
        "png texts": saved(drawing(), "PNG", pnginfo=_texts(), exif=_exif(6)),
        "png 1x1": saved(drawing(size=(1, 1)), "PNG"),
        "png 1xN": saved(drawing(size=(1, 300)), "PNG"),
        "apng": saved(drawing(), "PNG", duration=50, **_several()),
    }


def _texts() -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "a text " * 20, zip=True)
    info.add_itxt("Title", "<|image_pad|>", zip=False)
    return info


def interlaced(depth: int, kind: int, *, adam7: bool = True) -> bytes:
    """An RGB PNG with the scan lines of Adam7's seven passes (or of one); Pillow writes none such."""
    sample = depth // 8
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
    passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    pixels = np.asarray(drawing()).astype(f">u{sample}") * (1 if sample == 1 else 257)
    lines = []
    for left, top, across, down in passes if adam7 else [(0, 0, 1, 1)]:
        part = pixels[top::down, left::across]
        if part.size:
            lines += [b"\0" + row.astype(f">u{sample}").tobytes() for row in part]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, int(adam7))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk with its length and its checksum."""
    check = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def _exif(orientation: int) -> Any:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return exif


def _jpeg() -> dict[str, bytes]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = {
        f"jpeg exif {number}": saved(drawing(seed=number), "JPEG", exif=_exif(number))
        for number in range(1, 9)
    }
    return {
        "jpeg baseline": saved(drawing(), "JPEG"),
        "jpeg 4:4:4": saved(drawing(), "JPEG", subsampling=0, quality=95),
        "jpeg restarts": saved(drawing(size=(64, 40)), "JPEG", restart_marker_blocks=2),
        "jpeg progressive": saved(drawing(), "JPEG", progressive=True),
        "jpeg grey": saved(drawing("L"), "JPEG"),
        "jpeg cmyk": saved(drawing("CMYK"), "JPEG"),
        "jpeg icc": saved(drawing(), "JPEG", icc_profile=profile),
        **turned,
    }


def _webp() -> dict[str, bytes]:
    return {
        "webp lossy": saved(drawing(), "WEBP"),
        "webp lossy alpha": saved(drawing("RGBA"), "WEBP"),
        "webp lossless": saved(drawing("RGBA"), "WEBP", lossless=True),
        "webp animated": saved(drawing(), "WEBP", duration=50, **_several()),
    }


def _gif() -> dict[str, bytes]:
    return {
        "gif": saved(drawing("P"), "GIF"),
        "gif interlaced transparent": saved(drawing("P"), "GIF", interlace=1, transparency=3),
        "gif animated": saved(drawing(), "GIF", duration=50, loop=0, **_several()),
    }


def _tiff() -> dict[str, bytes]:
    coders = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    made = {f"tiff {coder}": saved(drawing(), "TIFF", compression=coder) for coder in coders}
    return {
        **made,
        "tiff group4": saved(drawing("1"), "TIFF", compression="group4"),
        "tiff 16 bit": saved(drawing("I;16"), "TIFF"),
        "tiff float": saved(drawing("F"), "TIFF"),
        "tiff cmyk": saved(drawing("CMYK"), "TIFF"),
        "tiff rgba": saved(drawing("RGBA"), "TIFF", compression="tiff_lzw"),
        "tiff pages": saved(drawing(), "TIFF", compression="packbits", **_several()),
        "tiff turned": saved(drawing(), "TIFF", tiffinfo={0x0112: 6}),
        "tiff tiled": tiled(),
    }


def tiled() -> bytes:
    """A grey TIFF of four tiles of 16 x 16; Pillow writes strips only."""
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:HEIGHT, :WIDTH] = np.asarray(drawing("L"))
    tiles = [pixels[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16)]
    entries = 10
    lists = 8 + 2 + entries * 12 + 4
    start = lists + 32
    rows = [
        *((256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, 16)),
        *((324, 4, 4, lists), (325, 4, 4, lists + 16)),
    ]
    directory = struct.pack("<H", entries) + b"".join(struct.pack("<HHII", *r) for r in rows)
    offsets = struct.pack("<4I", *(start + 256 * i for i in range(4)))
    sizes = struct.pack("<4I", *(256,) * 4)
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    return head + offsets + sizes + b"".join(tiles)


def _others() -> dict[str, bytes]:
    made = {
        "bmp": saved(drawing(), "BMP"),
        "bmp palette": saved(drawing("P"), "BMP"),
        "bmp 1 bit": saved(drawing("1"), "BMP"),
        "bmp run length": run_length_bmp(),
        "ppm": saved(drawing(), "PPM"),
        "pgm": saved(drawing("L"), "PPM"),
        "pbm": saved(drawing("1"), "PPM"),
        "pgm 16 bit": b"P5 4 3 65535\n" + bytes(range(24)),
        "ppm of words": b"P3\n# a comment\n2 2 255\n255 0 0 0 255 0\n0 0 255 9 9 9\n",
    }
    if features.check("avif"):
        made["avif"] = saved(drawing(), "AVIF", speed=10)
        made["avif alpha"] = saved(drawing("RGBA"), "AVIF", speed=10)
    return made


def run_length_bmp() -> bytes:
    """A BMP of 8 x 4 pixels with runs (RLE8); Pillow writes none such."""
    runs = b"".join(bytes([5, row, 3, 9 - row, 0, 0]) for row in range(4)) + b"\0\1"
    palette = b"".join(bytes([i * 20, 255 - i * 20, i, 0]) for i in range(10))
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 8, 1, len(runs), 0, 0, 10, 0)
    size = start + len(runs)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, start) + info + palette + runs
