"""Videos: files, frames and images of a ``data:`` URL become ``Video`` items.

Only sampled frames are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError
from sensorium.multimodal.decode.options import check_names
from sensorium.multimodal.decode.video import animations, frame_sampling, video_file, video_frames
from sensorium.multimodal.decode.video.limits import Limits, check_pixels, check_work
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import FrameChoice, FrameSampler, VideoFacts


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """``media_io_kwargs["video"]``.

    How many frames are sampled (``sampling.ALL_FRAMES`` for -1, all); or how many per second. With
    both the number is the most that the rate may give; with neither the model's own rule decides.
    Of frames whose rate nobody knows, ``fps`` is that rate.
    """

    num_frames: int | None = None
    fps: float | None = None

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], param: str = "media_io_kwargs.video"
    ) -> VideoOptions:
        """Check and build.

        Raises InvalidRequestError for unknown keys and for values out of their range.
        """
        check_names(options, list(cls.__dataclass_fields__), param)
        return cls(
            frame_sampling.read_num_frames(options.get("num_frames"), f"{param}.num_frames"),
            frame_sampling.read_fps(options.get("fps"), f"{param}.fps"),
        )


def decode(
    data: bytes, options: VideoOptions, config: MediaConfig, sampler: FrameSampler | None
) -> Video:
    """The sampled frames of an encoded video, or of the pictures of a ``data:video/jpeg`` URL.

    ``sampler``: the model's rule; evenly when None. Raises MediaUndecodableError,
    MediaTooLargeError and InvalidRequestError.
    """
    choose = _Choose(options, config, sampler)
    if video_frames.is_packed(data):
        return _timed(video_frames.decode_packed(data, choose, _frame_limits(config)), options)
    limits = Limits(config.max_video_frames, config.max_video_pixels, config.max_image_pixels)
    animation = animations.read(data)
    if animation is None:
        return video_file.decode(data, lambda facts: choose(facts, False), limits)

    def check(num_decoded: int, num_sampled: int, height: int, width: int) -> None:
        check_work(num_decoded, height * width, limits)
        check_pixels(num_sampled, height, width, limits)

    return animations.decode(data, animation, lambda facts: choose(facts, False), check)


def decode_object(
    source: Any, options: VideoOptions, config: MediaConfig, sampler: FrameSampler | None
) -> Video:
    """Return the frames of images, an array or a tensor, with or without metadata.

    See ``video_frames.decode_object``.

    They are all used unless ``options`` (or the model's own options) ask for fewer. Raises as
    ``decode``.
    """
    choose = _Choose(options, config, sampler)
    return _timed(video_frames.decode_object(source, choose, _frame_limits(config)), options)


def _frame_limits(config: MediaConfig) -> video_frames.Limits:
    return video_frames.Limits(
        config.max_video_pixels, config.max_image_pixels, config.max_video_frames
    )


def _timed(clip: Video, options: VideoOptions) -> Video:
    if clip.fps is not None or options.fps is None:
        return clip
    return replace(clip, fps=options.fps)


@dataclass(frozen=True, slots=True)
class _Choose:
    """Return the sampling of frames: the model's rule with the caller's options.

    Within the configuration's limit.
    """

    options: VideoOptions
    config: MediaConfig
    sampler: FrameSampler | None

    def __call__(self, facts: VideoFacts, given: bool) -> np.ndarray:
        limit = self.config.max_sampled_frames()
        choice = FrameChoice(
            num_frames=self.options.num_frames,
            fps=self.options.fps,
            at_most=None if given else limit,
            given=given,
        )
        indices = (self.sampler or frame_sampling.uniform)(facts, choice)
        if limit is not None and len(indices) > limit:
            raise MediaTooLargeError(
                f"The video has {len(indices)} frames; at most {limit} are allowed (num_frames of "
                "--limit-mm-per-prompt). Pass fewer, or ask for fewer with media_io_kwargs."
            )
        return indices
