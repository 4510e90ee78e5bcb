"""Options in a part of a chat message, for its item alone: sizes of images and videos, frames.

The names are those of qwen-vl-utils. Options that a model does not know are refused when the item
is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import MediaRef, Modality

_PROCESSING: dict[Modality, dict[str, str]] = {
    "image": {"min_pixels": "min_pixels", "max_pixels": "max_pixels"},
    "video": {
        "min_pixels": "frame_min_pixels",
        "max_pixels": "frame_max_pixels",
        "total_pixels": "total_pixels",
        "min_frames": "min_frames",
        "max_frames": "max_frames",
    },
    "audio": {},
}
"""Options of the model's processor, and their names in ``mm_processor_kwargs``.

Of a video in a message, pixels are those of each frame, whatever the processor's own options mean.
"""

_LOADING: dict[Modality, dict[str, str]] = {
    "image": {},
    "video": {"fps": "fps", "nframes": "num_frames", "num_frames": "num_frames"},
    "audio": {},
}
"""Options of loading, and their names in ``media_io_kwargs``."""

DETAIL_PIXELS: dict[str, int | None] = {
    "low": 512 * 512,
    "high": 2048 * 2048,
    "auto": None,
    "original": None,
}
"""Bounds of pixels by the ``detail`` of an image; None leaves it to the model's processor."""

_NO_OPTIONS = ("cache_control", "detail", "id", "index", "prompt_cache_breakpoint")
"""Keys that are no options of loading or processing. All but ``detail`` are for other servers."""


def names(modality: Modality) -> tuple[str, ...]:
    """Return the options that a part of this modality may have."""
    return (*_PROCESSING[modality], *_LOADING[modality])


def select(
    part: Mapping[str, Any], keys: Sequence[str], known: Sequence[str], param: str
) -> dict[str, Any]:
    """Return the options among the entries of a part that are not None.

    Raises InvalidRequestError for entries that are neither ``known`` options nor the part's
    ``keys``.
    """
    found: dict[str, Any] = {}
    for key, value in part.items():
        if key in keys or key in _NO_OPTIONS or value is None:
            continue
        if key not in known:
            near = suggestion(str(key), [*keys, *known])
            has = f"; its options are {', '.join(known)}" if known else ""
            raise InvalidRequestError(
                f"Unknown key {str(key)[:80]!r} in the part{has}.{near}",
                param=f"{param}.{str(key)[:80]}",
            )
        found[key] = value
    return found


def by_use(
    modality: Modality, options: Mapping[str, Any], param: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into the processor's and those of loading.

    Raises InvalidRequestError for one that is given under two names.
    """
    processing = {new: options[old] for old, new in _PROCESSING[modality].items() if old in options}
    loading: dict[str, Any] = {}
    for old, new in _LOADING[modality].items():
        if old not in options:
            continue
        if new in loading:
            raise InvalidRequestError(
                "nframes and num_frames are two names of one option; give one of them.",
                param=f"{param}.{old}",
            )
        loading[new] = options[old]
    return processing, loading


def bound_of_detail(detail: object, param: str) -> dict[str, int]:
    """Return the option of loading that the ``detail`` of an image means.

    Raises InvalidRequestError, at ``param``, for an unknown one.
    """
    if detail is None:
        return {}
    if not isinstance(detail, str) or detail not in DETAIL_PIXELS:
        raise InvalidRequestError(
            f"detail must be one of {', '.join(DETAIL_PIXELS)}, got {detail!r:.80}.", param=param
        )
    most = DETAIL_PIXELS[detail]
    return {} if most is None else {"max_pixels": most}


def as_written(modality: Modality, message: str) -> str:
    """Return a message about processing or loading with the names that options have in a part."""
    for old, new in _PROCESSING[modality].items():
        message = message.replace(new, old)
    return message.replace("num_frames", "nframes (or num_frames)")


def with_rates(
    refs: Sequence[MediaRef], options: Mapping[str, Any] | None
) -> tuple[Sequence[MediaRef], Mapping[str, Any] | None]:
    """Turn ``fps`` of ``mm_processor_kwargs`` into an option of each video, if it is a list.

    qwen-vl-utils gives one rate for each video. Otherwise both are returned as they are.
    """
    rates = options.get("fps") if isinstance(options, Mapping) else None
    videos = [i for i, ref in enumerate(refs) if ref.modality == "video"]
    if options is None or not isinstance(rates, list | tuple) or len(rates) != len(videos):
        return refs, options
    own = dict(zip(videos, rates, strict=True))
    timed = [
        dataclasses.replace(ref, processing={"fps": own[i], **ref.processing}) if i in own else ref
        for i, ref in enumerate(refs)
    ]
    return timed, {name: value for name, value in options.items() if name != "fps"}
