"""Steps that image processors share: resizing as in Pillow and normalisation, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sensorium.errors import ConfigError, InvalidRequestError, MediaTooLargeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
MAX_VIDEO_PIXELS = 1 << 29
"""Largest number of pixels of a video's resized frames together: a multiple of what any context
can hold."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Normalization:
    """Normalisation ``(pixel * scale - mean) / std`` of pixels 0 to 255, per channel."""

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def check_video(num_frames: int, pixels_each: int) -> None:
    """Raise MediaTooLargeError for frames that resizing would turn into gigabytes.

    Small frames count, too: some models enlarge every frame to a fixed size.
    """
    if num_frames * pixels_each > MAX_VIDEO_PIXELS:
        raise MediaTooLargeError(
            f"This model makes {pixels_each} pixels of each of the video's {num_frames} frames; at "
            f"most {MAX_VIDEO_PIXELS} together are possible. Ask for fewer frames."
        )


def read_normalization(preprocessor: Mapping[str, Any]) -> Normalization:
    """Read the normalisation from preprocessor_config.json, with CLIP's values as defaults.

    Raises ConfigError for impossible values.
    """
    factor = preprocessor.get("rescale_factor")
    scale = (1 / 255 if factor is None else factor) if _flag(preprocessor, "do_rescale") else 1
    mean: Any = (0.0, 0.0, 0.0)
    std: Any = (1.0, 1.0, 1.0)
    if _flag(preprocessor, "do_normalize"):
        mean = preprocessor.get("image_mean") or CLIP_MEAN
        std = preprocessor.get("image_std") or CLIP_STD
    try:
        red, green, blue = (float(value) for value in mean)
        deviations = [float(value) for value in std]
        if len(deviations) != 3 or not all(value > 0 for value in (*deviations, float(scale))):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "preprocessor_config.json: rescale_factor, image_mean and image_std must be a number "
            f"and two lists of three, with positive deviations; got {scale!r}, {mean!r}, {std!r}.",
            param="model",
        ) from error
    return Normalization(
        float(scale), (red, green, blue), (deviations[0], deviations[1], deviations[2])
    )


def read_resample(preprocessor: Mapping[str, Any]) -> int:
    """Return Pillow's number of the resampling filter; bicubic when the file does not name one."""
    value = preprocessor.get("resample")
    value = BICUBIC if value is None else value
    try:
        return int(Image.Resampling(value))
    except ValueError as error:
        raise ConfigError(
            f"preprocessor_config.json: resample {value!r} is no filter.", param="model"
        ) from error


def resize(
    image: np.ndarray, height: int, width: int, resample: int, box: Box | None = None
) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8.

    ``box``: the part (left, top, right, bottom) that is kept.
    """
    if box is None and image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    source = Image.fromarray(np.ascontiguousarray(image))
    small = source.resize((width, height), resample=Image.Resampling(resample), box=box)
    return np.array(small)


def check_image(image: Any) -> np.ndarray:
    """Return the (H, W, 3) uint8 image. Raises InvalidRequestError for an empty or mistyped one."""
    if not isinstance(image, np.ndarray):
        raise InvalidRequestError(f"An image must be an array, got {type(image).__name__}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise InvalidRequestError(
            f"An image must be (height, width, 3) of 8-bit values and not empty, got {image.shape} "
            f"of {image.dtype}."
        )
    return image


def _flag(preprocessor: Mapping[str, Any], name: str) -> bool:
    return preprocessor.get(name) is not False
