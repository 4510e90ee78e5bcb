"""Precomputed embeddings of MiniCPM-V, of images (with their sizes) and of videos.

There are ``num_queries`` for each view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sensorium.errors import InvalidEmbeddingsError, counted
from sensorium.models.media import precomputed
from sensorium.multimodal.items import Features

_MAX_EDGE = 1 << 20


def images(
    source: Any, param: str, hidden_size: int
) -> list[tuple[np.ndarray, tuple[int, int], str]]:
    """Return embeddings, original (width, height) and place of each image.

    source: ``{"image_embeds": …, "image_sizes": …}``. ``image_embeds``: a tensor (items,
    embeddings, hidden size) or a list of (embeddings, hidden size); ``image_sizes``: (width,
    height) of each. The deprecated name ``image_size_list`` is read, too, with a warning.
    """
    names = ("image_embeds", "image_sizes")
    values = dict(source) if isinstance(source, Mapping) else {}
    if "image_size_list" in values and "image_sizes" not in values:
        values["image_sizes"] = values.pop("image_size_list")
    if set(values) != set(names):
        raise InvalidEmbeddingsError(
            "Embeddings for this model are a mapping with 'image_embeds' (items, embeddings, "
            "hidden size) and 'image_sizes' (width and height of each original image), got "
            f"{_describe(source)}.",
            param=param,
        )
    arrays = precomputed.per_item(values["image_embeds"], f"{param}.image_embeds")
    sizes = _sizes(values["image_sizes"], f"{param}.image_sizes")
    if len(sizes) != len(arrays):
        raise InvalidEmbeddingsError(
            f"image_sizes has {counted(len(sizes), 'entry', 'entries')} for the embeddings of "
            f"{counted(len(arrays), 'image')}.",
            param=f"{param}.image_sizes",
        )
    for array, place in arrays:
        precomputed.check_width(array, hidden_size, place)
    return [(array, size, place) for (array, place), size in zip(arrays, sizes, strict=True)]


def check_count(
    array: np.ndarray, num_views: int, num_queries: int, size: tuple[int, int], param: str
) -> None:
    """Raise InvalidEmbeddingsError unless the number of embeddings fits the image's size."""
    if len(array) != num_views * num_queries:
        raise InvalidEmbeddingsError(
            f"An image of {size[0]} x {size[1]} pixels has {num_views} views of {num_queries} "
            f"embeddings here, together {num_views * num_queries}, got shape {tuple(array.shape)}.",
            param=param,
        )


def videos(source: Any, param: str, num_queries: int, hidden_size: int) -> list[Features]:
    """Return the features of each video.

    source: a tensor (items, frames * num_queries, hidden size), a list of (frames * num_queries,
    hidden size), or ``{"video_embeds": either of them, "num_frames": one number or one per item}``.
    """
    wanted: list[int] | None = None
    place = param
    if isinstance(source, Mapping):
        if set(source) - {"num_frames"} != {"video_embeds"}:
            raise InvalidEmbeddingsError(
                "Embeddings of videos are a tensor (items, frames times embeddings of a frame, "
                "hidden size), or a mapping with 'video_embeds' and optionally 'num_frames', got "
                f"{_describe(source)}.",
                param=param,
            )
        place = f"{param}.video_embeds"
        if source.get("num_frames") is not None:
            wanted = _frames(source["num_frames"], f"{param}.num_frames")
        source = source["video_embeds"]
    arrays = precomputed.per_item(source, place)
    if wanted is not None and len(wanted) != len(arrays):
        raise InvalidEmbeddingsError(
            f"num_frames has {counted(len(wanted), 'value')} for the embeddings of "
            f"{counted(len(arrays), 'video')}.",
            param=f"{param}.num_frames",
        )
    found = []
    for index, (array, item_place) in enumerate(arrays):
        precomputed.check_width(array, hidden_size, item_place)
        num_frames = len(array) // num_queries if wanted is None else wanted[index]
        if num_frames < 1 or len(array) != num_frames * num_queries:
            frames_given = "" if wanted is None else f", and this video {num_frames} frames"
            raise InvalidEmbeddingsError(
                f"A frame has {num_queries} embeddings in this model{frames_given}; got shape "
                f"{tuple(array.shape)}.",
                param=item_place,
            )
        meta = {"grid": (0, 0), "num_frames": num_frames}
        found.append(Features("video", {"embeds": array}, len(array), meta, precomputed=True))
    return found


def _sizes(value: Any, param: str) -> list[tuple[int, int]]:
    sizes = [(width, height) for width, height in precomputed.integers(value, 2, param)]
    for width, height in sizes:
        if not (1 <= width <= _MAX_EDGE and 1 <= height <= _MAX_EDGE):
            raise InvalidEmbeddingsError(
                f"Widths and heights must be from 1 to {_MAX_EDGE} pixels, got {width} x {height}.",
                param=param,
            )
    return sizes


def _frames(value: Any, param: str) -> list[int]:
    """Return one number, or one per video."""
    listed = value.tolist() if precomputed.is_array(value) else value
    rows = [[number] for number in (listed if isinstance(listed, list | tuple) else [listed])]
    return [number for (number,) in precomputed.integers(rows, 1, param)]


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    return precomputed.describe(value)
