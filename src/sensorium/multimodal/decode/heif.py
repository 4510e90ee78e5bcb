"""HEIC and HEIF photos, as iPhones take them, through pillow-heif.

pillow-heif is an extra because its decoder has another licence.
"""

from __future__ import annotations

import functools
import importlib

FORMAT = "HEIF"
MISSING = (
    "The image is a HEIC photo (HEIF), for which pillow-heif is needed where this runs: pip "
    "install 'sensorium[heif]'. Or send it as JPEG, PNG or WebP."
)
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
"""Brands of HEIF files (ISO/IEC 23008-12).

The last two say nothing about the codec; Pillow itself reads those with AV1.
"""
_AVIF = (b"avif", b"avis")


def is_heif(data: bytes) -> bool:
    """Return True for a HEIF image, unless it is one that Pillow reads by itself."""
    if data[4:8] != b"ftyp":
        return False
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, length, 4))]
    return brands[0] in _BRANDS and not any(brand in _AVIF for brand in brands)


@functools.cache
def register() -> bool:
    """Make Pillow read HEIF with one thread and without thumbnails.

    False where pillow-heif is not installed.
    """
    try:
        module = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    module.register_heif_opener(
        thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
    )
    return True
