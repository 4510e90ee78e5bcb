"""Limits on the frames of a video, checked before and while it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.errors import MediaTooLargeError

if TYPE_CHECKING:
    import av

FULL_HD = 1920 * 1088
"""Pixels of a frame that counts as one against the limit on decoded frames; larger ones count as
several."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_frames``: that are decoded, at most ``FULL_HD`` each, or fewer larger ones.

    ``max_pixels``: of all sampled frames together. ``max_frame_pixels``: of each frame.
    """

    max_frames: int
    max_pixels: int
    max_frame_pixels: int

    def for_decoder(self) -> dict[str, str]:
        """Return FFmpeg's option that bounds the pixels of a frame.

        Nothing much larger is then allocated, even if the header or a later frame says so.

        It counts columns that it adds to make rows of whole vectors, too.
        """
        most = 2 * min(self.max_pixels, self.max_frame_pixels) + (1 << 20)
        return {"max_pixels": str(min(most, (1 << 31) - 1))}


def check_work(num_frames: int, num_pixels: int, limits: Limits) -> None:
    """Raise MediaTooLargeError for more frames of ``num_pixels`` each than may be decoded."""
    most = int(limits.max_frames * min(1.0, FULL_HD / max(num_pixels, 1)))
    if num_frames > most:
        size = " of this size" if most < limits.max_frames else ""
        raise MediaTooLargeError(
            f"{num_frames} frames of the video must be decoded to get at those that are wanted; at "
            f"most {most}{size} are allowed (--max-video-frames). Send a shorter video, or one "
            "with more key frames."
        )


class DecodedFrames:
    """Counts what comes out of a decoder: frames may be more, and larger, than the header says."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_frames = 0
        self._num_pixels = 0

    def add(self, frame: av.VideoFrame) -> None:
        """Count a frame. Raises MediaTooLargeError when they are too many."""
        self._num_frames += 1
        self._num_pixels += max(frame.height * frame.width, FULL_HD)
        check_work(self._num_frames, self._num_pixels // self._num_frames, self._limits)


def check_pixels(num_frames: int, height: int, width: int, limits: Limits) -> None:
    """Raise MediaTooLargeError for frames that are too large, one by one or together."""
    if height * width > limits.max_frame_pixels:
        raise MediaTooLargeError(
            f"A frame of the video has {width} x {height} pixels; at most "
            f"{limits.max_frame_pixels} are allowed (--max-image-pixels). Send a smaller video."
        )
    if num_frames * height * width > limits.max_pixels:
        raise MediaTooLargeError(
            f"{num_frames} frames of {width} x {height} pixels are sampled of the video; at most "
            f"{limits.max_pixels} pixels together are allowed (--max-video-pixels). Sample fewer "
            "frames or send a smaller video."
        )
