"""The values of ``multi_modal_data``, split into one source per item.

The modalities differ in what one item looks like (a video may be a list of frames, so that a list
is not always several items) and in how an item is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from sensorium.config.notices import warn_caller
from sensorium.errors import InvalidRequestError, located
from sensorium.multimodal.decode.audio import MOST_RATE, read_samples
from sensorium.multimodal.decode.image import check_picture
from sensorium.multimodal.decode.video.video_frames import read_origin
from sensorium.multimodal.items import MediaRef, Modality, SourceKind, is_tensor


@dataclass(frozen=True, slots=True)
class Source:
    """One item of ``multi_modal_data``, without its id."""

    kind: SourceKind
    content: Any
    param: str

    def ref(self, modality: Modality, uuid: str | None = None) -> MediaRef:
        """Return the reference to the item, with the caller's id."""
        return MediaRef(modality, self.kind, self.content, uuid, self.param)


@dataclass(frozen=True, slots=True)
class Kind:
    """Rules for items of a modality that are objects.

    Attributes:
        is_one: ``is_one(value)`` returns whether a value other than a tensor of embeddings is one
            item and not a list of items.
        is_raw: ``is_raw(tensor, enable_mm_embeds)`` returns whether a tensor of several dimensions
            is an item and not embeddings of items.
        check: ``check(value)`` raises InvalidRequestError for a value that is no item, as far as
            that shows without reading all of it.
    """

    is_one: Callable[[Any], bool]
    is_raw: Callable[[Any, bool], bool]
    check: Callable[[Any], None]


def split(value: object, param: str, enable_mm_embeds: bool, kind: Kind) -> list[Source]:
    """Return one source per item, or one for the embeddings of all items given as a whole.

    A mapping, and a tensor that is no raw item, are embeddings; a tensor of two dimensions holds
    those of one item. None is a cached item. A list may mix raw items and embeddings. Raises
    InvalidRequestError for other values.
    """
    _refuse_nested(value, param)
    if isinstance(value, Mapping) or (
        is_tensor(value) and not kind.is_raw(value, enable_mm_embeds)
    ):
        return [_embeds(value, param)]
    if not isinstance(value, list | tuple) or kind.is_one(value):
        return [_source(value, param, enable_mm_embeds, kind)]
    return [
        _source(entry, f"{param}[{i}]", enable_mm_embeds, kind) for i, entry in enumerate(value)
    ]


def _source(value: Any, param: str, enable_mm_embeds: bool, kind: Kind) -> Source:
    if value is None:
        return Source("cached", None, param)
    _refuse_nested(value, param)
    if isinstance(value, Mapping) or (is_tensor(value) and _is_of_one(value, enable_mm_embeds)):
        return _embeds(value, param)
    with located(param):
        kind.check(value)
    return Source("object", value, param)


def warn_of_deprecated_names(embeds: object) -> None:
    """Warn of deprecated names in a mapping of tensors, while the caller's line is known."""
    if isinstance(embeds, Mapping) and "image_size_list" in embeds:
        warn_caller("image_size_list is deprecated: use {'image_embeds': …, 'image_sizes': …}")


def _embeds(value: Any, param: str) -> Source:
    warn_of_deprecated_names(value)
    return Source("embeds", value, param)


def _is_of_one(tensor: Any, enable_mm_embeds: bool) -> bool:
    """Return whether a tensor holds the embeddings of one item, ([1, ]num_embeds, hidden_size).

    A tensor with one channel is never an image.
    """
    if tensor.ndim == 3 and enable_mm_embeds:
        return bool(tensor.shape[0] == 1 and tensor.is_floating_point())
    return bool(tensor.ndim == 2)


def has_image_shape(embeds: Any) -> bool:
    """Return whether a tensor that was read as embeddings has the shape of an image, (3, H, W)."""
    return is_tensor(embeds) and embeds.ndim == 3 and embeds.shape[0] == 3


def _refuse_nested(value: Any, param: str) -> None:
    """Raise InvalidRequestError for a nested tensor, whose shape cannot be checked."""
    if is_tensor(value) and value.is_nested:
        refuse("must be an ordinary dense tensor, not a nested one", param)


def are_numbers(value: object) -> bool:
    """Return whether a value holds numbers, in at most two levels of lists, as sizes do."""
    rows = value if isinstance(value, list | tuple) else [value]
    members = [m for row in rows for m in (row if isinstance(row, list | tuple) else [row])]
    return bool(members) and all(type(member) in (int, float) for member in members)


def refuse(message: str, param: str) -> NoReturn:
    """Raise InvalidRequestError; ``param`` is put before a message that begins in lower case."""
    if message[0].islower():
        message = f"{param} {message}"
    raise InvalidRequestError(
        message if message.endswith((".", "?")) else f"{message}.", param=param
    )


def _check_image(value: Any) -> None:
    if not (isinstance(value, Image.Image | np.ndarray) or is_tensor(value)):
        hint = "; for a URL or a path use a chat message" if isinstance(value, str | bytes) else ""
        raise InvalidRequestError(
            "An image must be a PIL.Image, a numpy HWC uint8 array, a torch CHW tensor, or "
            f"embeddings, got {type(value).__name__}{hint}."
        )
    check_picture(value)


def _is_raw_image(tensor: Any, enable_mm_embeds: bool) -> bool:
    """Return whether a tensor is read as an image.

    Three dimensions are a CHW image, or embeddings if these are enabled; four are refused as an
    image.
    """
    if tensor.ndim != 3:
        return bool(tensor.ndim == 4)
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return not (is_float and (enable_mm_embeds or tensor.shape[0] != 3))


IMAGES = Kind(is_one=lambda value: False, is_raw=_is_raw_image, check=_check_image)


def _is_frame(value: Any) -> bool:
    """Return whether a value can be one frame of a video."""
    return isinstance(value, Image.Image) or (
        (isinstance(value, np.ndarray) or is_tensor(value)) and value.ndim == 3
    )


def _is_one_video(value: Any) -> bool:
    """Return whether a value is a list of frames, or frames with metadata."""
    return _has_metadata(value) or (bool(value) and _is_frame(value[0]))


def _has_metadata(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def _check_video(value: Any) -> None:
    frames, metadata = value if _has_metadata(value) else (value, {})
    _check_frames(frames)
    read_origin(metadata, len(frames))


def _check_frames(frames: Any) -> None:
    if isinstance(frames, list | tuple):
        if not frames:
            raise InvalidRequestError("A video must have at least one frame.")
        for frame in frames:
            check_picture(frame)
        return
    if not (isinstance(frames, np.ndarray) or is_tensor(frames)):
        hint = "; for a URL or a path use a chat message" if isinstance(frames, str | bytes) else ""
        raise InvalidRequestError(
            "A video must be a list of frames (PIL.Image or numpy HWC), a numpy array "
            "(T, H, W, 3), a torch tensor (T, 3, H, W), one of these with metadata in a tuple, or "
            f"embeddings, got {type(frames).__name__}{hint}."
        )
    if frames.ndim != 4 or not len(frames):
        layout = "(T, 3, H, W)" if is_tensor(frames) else "(T, H, W, 3)"
        raise InvalidRequestError(
            f"A video as an array must have shape {layout} with at least one frame, got "
            f"{tuple(frames.shape)}."
        )
    check_picture(frames[0])


def _is_raw_video(tensor: Any, enable_mm_embeds: bool) -> bool:
    """Return whether a tensor is read as frames; more than four dimensions are refused later."""
    return bool(tensor.ndim >= 4)


VIDEOS = Kind(is_one=_is_one_video, is_raw=_is_raw_video, check=_check_video)


def _is_one_audio(value: Any) -> bool:
    """Return whether a value is a pair of samples and sampling rate."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[1], int | float | np.integer | np.floating)
    )


def _check_audio(value: Any) -> None:
    if not _is_one_audio(value):
        hint = "; for a URL or a path use a chat message" if isinstance(value, str | bytes) else ""
        raise InvalidRequestError(
            "Audio must be a tuple of samples and sampling rate, or embeddings, got "
            f"{type(value).__name__}{hint}."
        )
    samples, rate = value
    if not (isinstance(samples, np.ndarray | list) or is_tensor(samples)):
        raise InvalidRequestError(
            "The samples of audio must be a numpy array, a torch tensor or a list, got "
            f"{type(samples).__name__}."
        )
    if isinstance(rate, bool) or not 1 <= rate <= MOST_RATE or not float(rate).is_integer():
        raise InvalidRequestError(
            f"The sampling rate of audio must be a whole number from 1 to {MOST_RATE} per second, "
            f"got {rate!r:.80}."
        )
    read_samples(samples)  # raises for types that cannot be hashed or read


AUDIO = Kind(is_one=_is_one_audio, is_raw=lambda tensor, enable: False, check=_check_audio)
