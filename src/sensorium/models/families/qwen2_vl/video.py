"""Videos of Qwen2-VL and Qwen2.5-VL: frame sampling, frame sizes and rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError
from sensorium.models.configs import count
from sensorium.models.families.qwen2_vl.sizes import (
    PixelRange,
    narrow,
    read_pixel_range,
    target_size,
)
from sensorium.models.media import precomputed
from sensorium.models.media.pixels import check_video, read_normalization, read_resample, resize
from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import FrameChoice, FrameSampler

FRAME_PIXELS = {"min_pixels": "frame_min_pixels", "max_pixels": "frame_max_pixels"}
OPTIONS = (
    *("fps", "num_frames", "min_frames", "max_frames", "do_sample_frames"),
    *(*FRAME_PIXELS.values(), "total_pixels"),
)
"""Entries of ``mm_processor_kwargs`` besides those of sizes.

``frame_min_pixels`` and ``frame_max_pixels`` are pixels of each frame of a video, before what sizes
say of images and videos alike; ``total_pixels`` those of all frames together, as qwen-vl-utils
counts them: of one of each temporal patch."""

UNKNOWN_FPS = 2.0
"""Rate of frames without metadata: the one at which the families' own tools sample."""

MAX_SECONDS = 1e6
"""Longest temporal patch that comes as embeddings: eleven days."""

MAX_FRAMES = 1 << 20
MOST_TOTAL = 1 << 40
"""Pixels that ``total_pixels`` may ask for; other limits come before."""
PIXELS = PixelRange(128 * 28 * 28, 768 * 28 * 28)
"""Pixels of a frame, where the checkpoint does not say."""


@dataclass(frozen=True, slots=True)
class VideoRules:
    """Video options of a checkpoint.

    ``max_tokens``: upper bound of the embeddings of a whole video, where the checkpoint caps them;
    ``default``: the frames that are sampled of a file unless a request asks for others.
    """

    cell: int
    temporal_patch_size: int
    pixels: PixelRange
    resizes: bool
    resample: int
    max_tokens: int | None
    default: FrameChoice
    min_frames: int
    max_frames: int

    rule: ClassVar[Callable[..., np.ndarray]] = staticmethod(frame_sampling.qwen2_vl)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise InvalidRequestError for values out of their range."""
        try:
            narrow(options, self.pixels)
            narrow(frame_options(options), self.pixels)
        except ConfigError as error:
            raise InvalidRequestError(error.message, param="mm_processor_kwargs") from error
        total_pixels(options)
        self.sampler(options)

    def sampler(self, options: Mapping[str, Any]) -> FrameSampler:
        """Return the rule that samples frames.

        Raises InvalidRequestError for options out of their range.
        """
        asked, default = FrameChoice(_num_frames(options), _fps(options)), self.default
        sample = _flag(options, "do_sample_frames")
        if sample is False:
            asked, default = frame_sampling.NOTHING, frame_sampling.EVENLY
        elif sample and asked == frame_sampling.NOTHING:
            asked = default
        least = _count(options, "min_frames", self.min_frames)
        most = _count(options, "max_frames", self.max_frames)
        if least > most:
            raise InvalidRequestError(
                f"min_frames {least} is more than max_frames {most}.",
                param="mm_processor_kwargs.min_frames",
            )
        return functools.partial(
            self.rule,
            asked=asked,
            default=default,
            min_frames=least,
            max_frames=most,
            **self.rule_options(),
        )

    def rule_options(self) -> dict[str, Any]:
        """Return the further options of the sampling rule."""
        return {"multiple": self.temporal_patch_size}

    def pixels_of(self, clip: Video, options: Mapping[str, Any]) -> np.ndarray:
        """Return resized frames (T, height, width, 3) uint8.

        The last frame is repeated until they fill the temporal patches.
        """
        num, height, width = clip.frames.shape[:3]
        if self.resizes:
            tall, wide = self.target(num, height, width, options)
        elif height % self.cell or width % self.cell:
            raise InvalidRequestError(
                f"This model does not resize videos: edges must be multiples of {self.cell}, got "
                f"{width} x {height}."
            )
        else:
            tall, wide = height, width
        whole = num + -num % self.temporal_patch_size
        check_video(whole, tall * wide)
        pixels = np.empty((whole, tall, wide, 3), np.uint8)
        for index, frame in enumerate(clip.frames):
            pixels[index] = resize(frame, tall, wide, self.resample)
        pixels[num:] = pixels[num - 1]
        return pixels

    def target(
        self, num: int, height: int, width: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Return height and width of each of ``num`` frames."""
        return target_size(height, width, self.cell, self._limits(num, options), "A video")

    def seconds_per_grid(self, clip: Video, options: Mapping[str, Any]) -> float:
        """Return the seconds from one temporal patch to the next.

        Where the source's rate is not known, the option ``fps`` is that of the frames as they are.
        """
        if clip.fps is None:
            fps = _fps(options) or UNKNOWN_FPS
        else:
            fps = len(clip.indices) / clip.num_source_frames * clip.fps
        return self.temporal_patch_size / fps

    def _limits(self, num_frames: int, options: Mapping[str, Any]) -> PixelRange:
        """Return the least and most pixels of a frame in a video of so many frames."""
        limits = narrow({**options, **frame_options(options)}, self.pixels)
        total = total_pixels(options)
        if total is None:
            if self.max_tokens is None:
                return limits
            total = int(self.max_tokens * self.cell**2 * 0.9)
        share = min(limits.most, total * self.temporal_patch_size // num_frames)
        return PixelRange(limits.least, max(share, int(limits.least * 1.05)))


def read_video_rules(
    config: Mapping[str, Any],
    images: Mapping[str, Any],
    cell: int,
    temporal_patch_size: int,
    rules: type[VideoRules] = VideoRules,
    pixels: PixelRange = PIXELS,
) -> VideoRules:
    """Read the video processor's configuration, or the image processor's in its place.

    ``images``: the image processor's, with which it must share its normalisation. ``rules``,
    ``pixels``: the family's class of rules and range of pixels. Raises ConfigError.
    """
    own, theirs = read_normalization(config), read_normalization(images)
    if not np.allclose(
        [own.scale, *own.mean, *own.std], [theirs.scale, *theirs.mean, *theirs.std], rtol=1e-6
    ):
        raise ConfigError(
            "The checkpoint normalises videos otherwise than images (image_mean, image_std, "
            "rescale_factor), which is not supported.",
            param="model",
        )
    fps, num_frames = config.get("fps"), config.get("num_frames")
    default = frame_sampling.EVENLY
    try:
        if _flag(config, "do_sample_frames") and (fps or num_frames):
            default = FrameChoice(_num_frames(config), _fps(config))
    except InvalidRequestError as error:
        raise ConfigError(f"The video processor's configuration: {error}", param="model") from error
    caps = config.get("cap_pixels_per_frame")
    return rules(
        cell=cell,
        temporal_patch_size=temporal_patch_size,
        pixels=read_pixel_range(config, pixels),
        resizes=config.get("do_resize") is not False,
        resample=read_resample(config),
        max_tokens=count(config, "max_video_tokens", 128000) if caps else None,
        default=default,
        min_frames=count(config, "min_frames", 4),
        max_frames=count(config, "max_frames", 768),
    )


def frame_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that bound each frame, under the names of ``sizes``."""
    return {name: options[own] for name, own in FRAME_PIXELS.items() if own in options}


def total_pixels(options: Mapping[str, Any]) -> int | None:
    """Return the bound of all frames together; None without one.

    Raises InvalidRequestError for no positive number.
    """
    value = options.get("total_pixels")
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value <= MOST_TOTAL
    ):
        raise InvalidRequestError(
            f"total_pixels must be a number from 1 to {MOST_TOTAL:g}, got {value!r:.80}.",
            param="mm_processor_kwargs.total_pixels",
        )
    return int(value)


def read_seconds(value: Any, num_items: int, param: str) -> list[float]:
    """Return the seconds of a temporal patch of each item; 1 each for None.

    value: a tensor, an array or a list. Raises InvalidEmbeddingsError for a wrong number of them
    and for values that are not positive numbers.
    """
    if value is None:
        return [1.0] * num_items
    try:
        seconds = precomputed.numbers(value).astype(np.float64).reshape(-1)
    except (ValueError, TypeError):  # no numbers
        seconds = np.empty(0)
    if len(seconds) != num_items or not ((seconds > 0) & (seconds <= MAX_SECONDS)).all():
        raise InvalidEmbeddingsError(
            f"Must be positive numbers up to {MAX_SECONDS:g}, one for each of {num_items} videos.",
            param=param,
        )
    return [float(s) for s in seconds]


def _num_frames(options: Mapping[str, Any]) -> int | None:
    return frame_sampling.read_num_frames(
        options.get("num_frames"), "mm_processor_kwargs.num_frames"
    )


def _fps(options: Mapping[str, Any]) -> float | None:
    """Return the rate; also from a list of one, as the families' own tools give it."""
    value = options.get("fps")
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return frame_sampling.read_fps(value, "mm_processor_kwargs.fps")


def _flag(options: Mapping[str, Any], name: str) -> bool | None:
    value = options.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(
            f"{name} must be true or false, got {value!r:.80}.",
            param=f"mm_processor_kwargs.{name}",
        )
    return value


def _count(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_FRAMES:
        raise InvalidRequestError(
            f"{name} must be an integer from 1 to {MAX_FRAMES}, got {value!r:.80}.",
            param=f"mm_processor_kwargs.{name}",
        )
    return value
