"""Sizes of resized images and frames of the Qwen-VL families.

They are multiples of a merge cell within a range of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.errors import ConfigError, InvalidRequestError

MAX_ASPECT = 200


@dataclass(frozen=True, slots=True)
class PixelRange:
    """Smallest and largest number of pixels (height times width) of a resized image or frame."""

    least: int
    most: int


def read_pixel_range(options: Mapping[str, Any], default: PixelRange) -> PixelRange:
    """Read ``min_pixels`` and ``max_pixels``, or ``size`` with these or other names.

    Those are ``shortest_edge`` and ``longest_edge``, also in pixels. Raises ConfigError for values
    that are not integers from 1, or out of order.
    """
    least, most = _given(options)
    return _ordered(
        default.least if least is None else least, default.most if most is None else most
    )


def narrow(options: Mapping[str, Any], default: PixelRange) -> PixelRange:
    """Read a range for options that apply to images and videos, whose default ranges differ.

    As ``read_pixel_range``, but a value that comes alone moves the other end of ``default`` where
    it must.
    """
    least, most = _given(options)
    if least is None:
        least = default.least if most is None else min(default.least, most)
    if most is None:
        most = max(default.most, least)
    return _ordered(least, most)


def _given(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    size = options.get("size")
    if size is not None and not isinstance(size, Mapping):
        raise ConfigError(f"size must be a mapping, got {size!r:.80}.", param="size")
    edges = size or {}
    found = []
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = options.get(name)
        value = edges.get(edge, edges.get(name)) if value is None else value
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ConfigError(f"{name} must be an integer from 1, got {value!r:.80}.", param=name)
        found.append(value)
    return found[0], found[1]


def _ordered(least: int, most: int) -> PixelRange:
    if least > most:
        raise ConfigError(f"min_pixels {least} is more than max_pixels {most}.", param="min_pixels")
    return PixelRange(least, most)


def check_aspect(height: int, width: int, what: str) -> None:
    """Raise InvalidRequestError for an aspect ratio above 200."""
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise InvalidRequestError(
            f"{what} of {width} x {height} pixels has an aspect ratio of {aspect:.0f}; this model "
            f"takes at most {MAX_ASPECT}. Crop or pad it."
        )


def target_size(
    height: int, width: int, cell: int, limits: PixelRange, what: str = "An image"
) -> tuple[int, int]:
    """Return height and width, multiples of ``cell``, near the image's own.

    Their product is within ``limits``. Raises InvalidRequestError for an aspect ratio above 200.
    """
    check_aspect(height, width, what)
    tall, wide = round(height / cell) * cell, round(width / cell) * cell
    if tall * wide > limits.most:
        shrink = math.sqrt(height * width / limits.most)
        tall = max(cell, math.floor(height / shrink / cell) * cell)
        wide = max(cell, math.floor(width / shrink / cell) * cell)
    elif tall * wide < limits.least:
        grow = math.sqrt(limits.least / (height * width))
        tall = math.ceil(height * grow / cell) * cell
        wide = math.ceil(width * grow / cell) * cell
    return tall, wide
