"""Conversion of grey images of more than 8 bits to 8 bits, by what their file says about white.

White is, in this order: what a TIFF file names as its greatest value (tags 281 and 341); what its
bits per sample hold, up to 16 of them; 65535 for the modes and formats that have 16 bits. Samples
of 32 bits say nothing by their type, for programs write values of 8 and of 16 bits so: white is
then 255, 65535 or 2**31 - 1 (2**32 - 1 without a sign), the least of these that no value exceeds.
Where a TIFF file says that 0 is white (tag 262), all is the other way round.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's, of grey with more than 8 bits."""
_BITS, _PHOTOMETRIC, _MOST, _SAMPLE_FORMAT, _SIGNED_MOST = 258, 262, 281, 339, 341
_WHITE_IS_ZERO = 0
_SIGNED = 2
_SIXTEEN_BITS = 65535
_FORMATS_OF_16_BITS = ("PNG", "PPM")
"""Whose wider greys Pillow gives as mode ``I`` in some versions, scaled to 16 bits."""


def white_of(image: Image.Image) -> int | None:
    """Return the value that the file or the mode says is white; None where the values must tell."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    for tag in (_SIGNED_MOST, _MOST):
        most = _number(tags.get(tag))
        if most is not None and most > 0:
            return most
    bits = _number(tags.get(_BITS))
    if bits is not None and 8 <= bits <= 16:
        is_signed: bool = tags.get(_SAMPLE_FORMAT) == (_SIGNED,)
        return (1 << (bits - is_signed)) - 1
    if image.mode != "I" or image.format in _FORMATS_OF_16_BITS:
        return _SIXTEEN_BITS
    return None


def facts_of(image: Image.Image) -> list[int]:
    """Return the facts beside the samples that decide how an image looks, for its identity."""
    return [white_of(image) or 0, _white_is_zero(image), _is_unsigned(image)]


def scaled(image: Image.Image) -> Image.Image:
    """Return a loaded image of one of ``MODES`` as 0…255, rounded; values outside are clipped.

    The one transparent grey of a PNG file becomes an alpha channel.
    """
    values = np.asarray(image)
    white = white_of(image)
    if white is None:
        values, white = _by_values(values, _is_unsigned(image))
    wide = np.clip(values.astype(np.int64), 0, white)
    bright = white - wide if _white_is_zero(image) else wide
    grey = Image.fromarray(((bright * 255 + white // 2) // white).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _white_is_zero(image: Image.Image) -> bool:
    """Return True if a file says that 0 is white, which Pillow obeys for at most 8 bits."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return bool(tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _by_values(values: np.ndarray, is_unsigned: bool) -> tuple[np.ndarray, int]:
    if is_unsigned:
        values = values.view(np.uint32)
    most = int(values.max(initial=0))
    widest = (1 << 32) - 1 if is_unsigned else (1 << 31) - 1
    return values, next(white for white in (255, _SIXTEEN_BITS, widest) if most <= white)


def _is_unsigned(image: Image.Image) -> bool:
    """Return True if Pillow read 32 bits without a sign as if they had one."""
    tags: Any = getattr(image, "tag_v2", None)
    return (
        image.format == "TIFF" and tags is not None and tags.get(_SAMPLE_FORMAT, (1,)) != (_SIGNED,)
    )


def _number(value: Any) -> int | None:
    """Return a tag's value, or its first, as an integer; None for what is no whole number."""
    first = value[0] if isinstance(value, tuple) and value else value
    whole = isinstance(first, int | float) and math.isfinite(first) and first == int(first)
    return int(first) if whole else None
