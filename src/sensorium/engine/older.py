"""Older spellings that described a model's images by hand: checked against the model, then unused."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from sensorium.config import OlderConfig
from sensorium.errors import ConfigError, RequestError
from sensorium.multimodal.processor import Processor

CHANNELS = 3


def check_older(older: OlderConfig, processor: Processor | None) -> None:
    """Raise ConfigError, naming the argument, where it contradicts the model."""
    given = older.given()
    if not given:
        return
    if processor is None or "image" not in processor.modalities:
        _contradicts(given[0], "this model takes no images")
    placeholder = processor.placeholder("image")
    if older.image_token_id is not None and placeholder != (older.image_token_id,):
        known = f"{placeholder[0]}" if len(placeholder) == 1 else "no single token"
        _contradicts("image_token_id", f"is {older.image_token_id}, but the model's is {known}")
    if older.image_input_shape is not None:
        _check_shape(older, older.shape(), processor)


def _check_shape(older: OlderConfig, shape: tuple[int, ...], processor: Processor) -> None:
    size = older.image_feature_size
    if older.image_input_type == "image_features" or len(shape) == CHANNELS:
        if size is not None and size != shape[-2]:
            _contradicts("image_feature_size", f"is {size}, but image_input_shape says {shape[-2]}")
        return
    if len(shape) != CHANNELS + 1 or shape[1] != CHANNELS:
        _contradicts("image_input_shape", f"must be 1,3,height,width, got {shape}")
    blank = np.zeros((shape[2], shape[3], CHANNELS), np.uint8)
    try:
        num = processor.process("image", blank, {}).num_embeds
    except RequestError as error:
        _contradicts("image_input_shape", f"is refused by the model: {error.message}")
    if size is not None and size != num:
        _contradicts(
            "image_feature_size",
            f"is {size}, but an image of {shape[3]} x {shape[2]} pixels has {num} embeddings in this model",
        )


def _contradicts(name: str, what: str) -> NoReturn:
    raise ConfigError(f"{name}: {what}. It is not needed: leave it out.", param=name)
