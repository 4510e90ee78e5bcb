"""Videos that come as frames.

Pictures one by one, arrays and tensors, with or without what is known of their source.

The frames are the caller's choice already, so that all of them are used unless the caller asks for
fewer.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from sensorium.config import suggestion
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    counted,
)
from sensorium.multimodal.decode import image, pixel_values
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import VideoFacts

_USED = ("fps", "duration", "total_num_frames", "frames_indices", "do_sample_frames")
_IGNORED = ("width", "height", "video_backend")
_TOLERANCE = 0.05
"""Part of its length by which the duration of a video may be off."""
_LEAST, _MOST = 1e-9, 1e9
"""Bound of frames per second and of seconds; beyond it products overflow."""
_MOST_FRAMES = 1 << 40
"""Most frames of a source."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of frames: ``indices``, the number of each in its source, ascending.

    ``num_frames`` and ``fps`` of the source. ``choose``: whether the model's rule chooses among the
    frames, as among those of a file.
    """

    indices: tuple[int, ...]
    num_frames: int
    fps: float | None = None
    choose: bool = False


def read_origin(metadata: Any, num_given: int) -> Origin:
    """Interpret the metadata of a video that is passed as frames.

    ``fps``, ``duration`` (seconds), ``total_num_frames`` and ``frames_indices``; each may be
    missing.

    Indices that are not given are spread evenly. ``do_sample_frames`` asks for the model's rule.
    Raises InvalidRequestError for unknown keys, wrong types, and values that contradict each other.
    """
    if not isinstance(metadata, Mapping):
        _bad(f"must be a mapping, got {type(metadata).__name__}")
    for key in metadata:
        if key not in _USED + _IGNORED:
            near = suggestion(str(key), list(_USED))
            _bad(f"has an unknown key {str(key)[:80]!r}; known are {', '.join(_USED)}.{near}")
    for key in _IGNORED:
        if not isinstance(metadata.get(key), str | int | float | None):
            _bad(f"has a {key} that is neither text nor number: {type(metadata[key]).__name__}")
    fps = _positive(metadata, "fps")
    duration = _positive(metadata, "duration")
    total = _whole(metadata, "total_num_frames")
    given = metadata.get("frames_indices")
    indices = None if given is None else _indices(given, num_given)
    if total is None:
        known = round(fps * duration) if fps and duration and indices is not None else 0
        total = max(known, num_given if indices is None else indices[-1] + 1)
    if total < num_given:
        _bad(f"says total_num_frames={total}, but has {counted(num_given, 'frame')}")
    if indices is not None and indices[-1] >= total:
        _bad(f"has frame {indices[-1]} among its frames_indices, but total_num_frames={total}")
    if fps is None and duration is not None:
        fps = total / duration
    if fps is not None and duration is not None:
        length = total / fps
        if abs(length - duration) > _TOLERANCE * duration + 1 / fps:
            _bad(
                f"says fps={fps:g} and duration={duration:g}, but {total} frames at that rate last "
                f"{length:g} s; give those of the source that the frames were taken from"
            )
    choose = metadata.get("do_sample_frames") or False
    if not isinstance(choose, bool):
        _bad(f"has do_sample_frames={choose!r:.80}; it must be true or false")
    spread = tuple(i * total // num_given for i in range(num_given))
    return Origin(spread if indices is None else indices, total, fps, choose)


def _indices(value: Any, num_given: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | range | np.ndarray) and not hasattr(value, "detach"):
        _bad(f"has frames_indices that are no list of integers, got {type(value).__name__}")
    try:
        indices = tuple(operator.index(i) for i in value)
    except TypeError:
        _bad(f"has frames_indices that are no list of integers, got {type(value).__name__}")
    if len(indices) != num_given:
        _bad(
            f"has {counted(len(indices), 'entry', 'entries')} in frames_indices for "
            f"{counted(num_given, 'frame')}"
        )
    if indices[-1] >= _MOST_FRAMES:
        _bad(
            f"has frame {indices[-1]!r:.80} among its frames_indices; at most {_MOST_FRAMES} make "
            "a video"
        )
    if indices[0] < 0 or any(b < a for a, b in itertools.pairwise(indices)):
        _bad("has frames_indices that are negative or do not ascend")
    return indices


def _positive(metadata: Mapping[Any, Any], name: str) -> float | None:
    value = metadata.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        _bad(f"has {name}={value!r:.80}; it must be a number")
    if not _LEAST <= value <= _MOST:
        _bad(f"has {name}={value!r:.80}; it must be positive, from {_LEAST:g} to {_MOST:g}")
    return float(value)


def _whole(metadata: Mapping[Any, Any], name: str) -> int | None:
    value = metadata.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= _MOST_FRAMES:
        _bad(f"has {name}={value!r:.80}; it must be a number from 1 to {_MOST_FRAMES}")
    whole: int = round(value)  # qwen-vl-utils computes seconds times a rate, and leaves a float
    return whole


def _bad(what: str) -> NoReturn:
    end = "" if what.endswith((".", "?")) else "."
    raise InvalidRequestError(f"The metadata of the video {what}{end}")


# --- frames of the caller's -----------------------------------------------------------------------

Choose = Callable[[VideoFacts, bool], np.ndarray]
"""Rule that picks the frames to use, given what is known of them and whether they are all used
unless asked."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most pixels of all used frames, and of each; most encoded images that are decoded."""

    max_pixels: int
    max_frame_pixels: int
    max_frames: int


def decode_object(source: Any, choose: Choose, limits: Limits) -> Video:
    """Return the frames of a video that is passed as images or as an array.

    A list of images, a numpy array (T, H, W, 3), a torch tensor (T, 3, H, W), or one of these with
    metadata.

    Raises InvalidRequestError for frames of different sizes, types that are none of these, and
    metadata that contradict them; MediaTooLargeError for more pixels than ``limits`` allow.
    """
    metadata: Any = None
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
        source, metadata = source
    if not isinstance(source, list | tuple) and getattr(source, "ndim", 0) != 4:
        raise InvalidRequestError(
            "A video must be a list of frames or an array of four dimensions, got "
            f"{type(source).__name__}."
        )
    if not len(source):
        raise InvalidRequestError("A video must have at least one frame.")
    origin = read_origin(metadata or {}, len(source))
    arrays = source if isinstance(source, list | tuple) else (source,)
    scale = pixel_values.scale_of(arrays, "video")  # one of all frames, however dark some are

    def picture(index: int) -> np.ndarray:
        return image.decode_object(
            source[index],
            image.ImageOptions(),
            max_pixels=limits.max_frame_pixels,
            scale=scale,
        )

    return _clip(picture, origin, choose, limits.max_pixels)


def _clip(
    picture: Callable[[int], np.ndarray], origin: Origin, choose: Choose, max_pixels: int
) -> Video:
    """Take the chosen frames, each of which ``picture(index)`` gives as (H, W, 3)."""
    num_given = len(origin.indices)
    rate = None if origin.fps is None else origin.fps * num_given / origin.num_frames
    chosen = [int(i) for i in choose(VideoFacts(num_given, rate), not origin.choose)]
    first = picture(chosen[0])
    height, width = first.shape[:2]
    if len(chosen) * height * width > max_pixels:
        raise MediaTooLargeError(
            f"The video has {len(chosen)} frames of {width} x {height} pixels; at most "
            f"{max_pixels} pixels together are allowed (--max-video-pixels)."
        )
    frames = np.empty((len(chosen), height, width, 3), np.uint8)
    frames[0] = first
    for row, index in enumerate(chosen[1:], start=1):
        own = picture(index)
        if own.shape != first.shape:
            raise InvalidRequestError(
                f"All frames of a video must have one size; frame {chosen[0]} has {width} x "
                f"{height} pixels, frame {index} has {own.shape[1]} x {own.shape[0]}."
            )
        frames[row] = own
    indices = tuple(origin.indices[i] for i in chosen)
    return Video(frames, indices, origin.num_frames, origin.fps)


# --- pictures of a data: URL ----------------------------------------------------------------------

MAX_PICTURES = 1 << 14
"""Most images of a ``video/jpeg`` URL, or of a file that looks like one unpacked."""

_MAGIC = b"\0pictures\0"
_LENGTH = 8


def pack(pictures: Sequence[bytes]) -> bytes:
    """Encoded pictures as one file.

    What ``data:video/jpeg`` URLs become, whose pictures are apart only in the URL.
    """
    parts = [_MAGIC]
    for picture in pictures:
        parts += [len(picture).to_bytes(_LENGTH, "little"), picture]
    return b"".join(parts)


def is_packed(data: bytes) -> bool:
    """Return whether ``pack`` made these bytes."""
    return data.startswith(_MAGIC)


def decode_packed(data: bytes, choose: Choose, limits: Limits) -> Video:
    """The frames of what ``pack`` made.

    Raises MediaUndecodableError, MediaTooLargeError and InvalidRequestError.
    """
    bounds: list[tuple[int, int]] = []
    at = len(_MAGIC)
    while at < len(data):
        if len(bounds) == MAX_PICTURES:
            raise MediaTooLargeError(
                f"The video has more than {MAX_PICTURES} pictures. Send fewer, or a video file."
            )
        start = at + _LENGTH
        at = start + int.from_bytes(data[at:start], "little")
        bounds.append((start, at))
    if not bounds or at != len(data):
        raise MediaUndecodableError("The video has no frames, or its last one is cut off.")

    def picture(index: int) -> np.ndarray:
        start, end = bounds[index]
        return image.decode(
            data[start:end], image.ImageOptions(), max_pixels=limits.max_frame_pixels
        )

    def chosen(facts: VideoFacts, given: bool) -> np.ndarray:
        indices = choose(facts, given)
        if len(indices) > limits.max_frames:
            raise MediaTooLargeError(
                f"{len(indices)} frames of the video would have to be decoded; at most "
                f"{limits.max_frames} are allowed (--max-video-frames). Ask for fewer, or send "
                "fewer."
            )
        return indices

    origin = Origin(tuple(range(len(bounds))), len(bounds))
    return _clip(picture, origin, chosen, limits.max_pixels)
