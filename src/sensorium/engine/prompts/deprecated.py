"""Deprecated arguments that described a model's images: checked against the model, then unused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from sensorium.config import DeprecatedConfig, MediaConfig
from sensorium.errors import ConfigError, RequestError
from sensorium.multimodal.processor import Processor

CHANNELS = 3
EDGE = 56
"""Height and width of a blank image that every model takes, in pixels."""
FAR_APART = ((EDGE, EDGE), (8 * EDGE, 24 * EDGE))
"""Heights and widths of which a model makes different numbers of embeddings unless it makes one
of all."""


def check_deprecated(
    deprecated: DeprecatedConfig, processor: Processor | None, media: MediaConfig
) -> None:
    """Raise ConfigError for an argument that contradicts the model as configured."""
    given = deprecated.given()
    if not given:
        return
    if processor is None or "image" not in processor.modalities:
        _contradicts(given[0], "this model takes no images")
    tokens = _image_tokens(processor)
    if deprecated.image_token_id is not None and tokens != {deprecated.image_token_id}:
        known = f"{min(tokens)}" if len(tokens) == 1 else "no single token"
        _contradicts(
            "image_token_id", f"is {deprecated.image_token_id}, but the model's is {known}"
        )
    options, shape = media.mm_processor_kwargs, None
    if deprecated.image_input_shape is not None:
        shape = deprecated.shape()
    if shape is not None and len(shape) == CHANNELS + 1 and not _are_features(deprecated):
        _check_pixels(deprecated.image_feature_size, shape, processor, media)
    else:
        _check_features(deprecated.image_feature_size, shape, processor, options)


def _are_features(deprecated: DeprecatedConfig) -> bool:
    return (deprecated.image_input_type or "").lower() == "image_features"


def _image_tokens(processor: Processor) -> set[int]:
    """Return the ids of a placeholder, or those that an image fills where it is no single token."""
    if processor.markup is None or "image" not in processor.markup.patterns:
        return set(processor.placeholder("image"))
    blank = np.zeros((EDGE, EDGE, CHANNELS), np.uint8)
    replacement = processor.replacement(processor.process("image", blank, {}))
    ids = replacement.token_ids
    return {i for start, num in replacement.runs for i in ids[start : start + num]}


def _check_pixels(
    size: int | None, shape: tuple[int, ...], processor: Processor, media: MediaConfig
) -> None:
    """Check ``shape`` (1, channels, height, width), of which ``size`` embeddings are made."""
    _, channels, height, width = shape
    if channels != CHANNELS:
        _contradicts("image_input_shape", f"must be 1,3,height,width, got {shape}")
    if height * width > media.max_image_pixels:
        _contradicts(
            "image_input_shape", f"has more than {media.max_image_pixels} pixels (max_image_pixels)"
        )
    try:
        num = _num_embeds(processor, height, width, media.mm_processor_kwargs)
    except RequestError as error:
        _contradicts("image_input_shape", f"is refused by the model: {error.message}")
    only = _only_size(processor, media.mm_processor_kwargs)
    if only is not None and only != (height, width):
        _contradicts(
            "image_input_shape",
            f"says {width} x {height} pixels, but this model makes {only[1]} x {only[0]} of every "
            "image",
        )
    if size is not None and size != num:
        _contradicts(
            "image_feature_size",
            f"is {size}, but an image of {width} x {height} pixels has {num} embeddings in this "
            "model",
        )


def _only_size(processor: Processor, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the height and width of all preprocessed images; None if they depend on the image."""
    sizes = set()
    for height, width in FAR_APART:
        blank = np.zeros((height, width, CHANNELS), np.uint8)
        pixels = processor.process("image", blank, options).arrays.get("pixels")
        if pixels is None or pixels.ndim != CHANNELS:
            return None
        sizes.add((int(pixels.shape[0]), int(pixels.shape[1])))
    return sizes.pop() if len(sizes) == 1 else None


def _check_features(
    size: int | None,
    shape: tuple[int, ...] | None,
    processor: Processor,
    options: Mapping[str, Any],
) -> None:
    """Check ``size`` and ``shape[-2]``: the number of embeddings of an image, if it is constant."""
    said = None if shape is None else shape[-2]
    if size is not None and said is not None and size != said:
        _contradicts("image_feature_size", f"is {size}, but image_input_shape says {said}")
    try:
        known = {_num_embeds(processor, *edges, options) for edges in FAR_APART}
    except RequestError:
        return
    for name, num in (("image_feature_size", size), ("image_input_shape", said)):
        if len(known) == 1 and num is not None and num not in known:
            _contradicts(
                name, f"says {num}, but an image has {min(known)} embeddings in this model"
            )


def _num_embeds(processor: Processor, height: int, width: int, options: Mapping[str, Any]) -> int:
    blank = np.zeros((height, width, CHANNELS), np.uint8)
    return processor.process("image", blank, options).num_embeds


def _contradicts(name: str, what: str) -> NoReturn:
    raise ConfigError(f"{name}: {what}. It is not needed: leave it out.", param=name)
