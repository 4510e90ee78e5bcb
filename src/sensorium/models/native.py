"""Registry rows of native families: a configuration, a processor and a model class."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.media.pixels import Normalization, read_normalization
from sensorium.multimodal.processor import Processor


class HasShape(Protocol):
    """Configuration that knows the sizes of its decoder."""

    @property
    def shape(self) -> TextShape:
        """Sizes of the decoder that the engine needs."""
        ...


Config = TypeVar("Config", bound=HasShape)


def native_family(
    read_config: Callable[[LoadedConfig], Config],
    new_processor: Callable[[Config, LoadedConfig], Processor],
    model: str,
    *,
    normalization: Callable[[Mapping[str, Any]], Normalization] | None = read_normalization,
    **row: Any,
) -> Family:
    """Return the registry row of a family whose model is the class ``model``.

    ``model`` is ``package.module:Class``, imported when a model is built. The class is called with
    the configuration, then, unless ``normalization`` is None, its result for the image processor's
    configuration, and the options. ``row``: the other fields of ``Family``.
    """

    def shape(loaded: LoadedConfig) -> TextShape:
        return read_config(loaded).shape

    def build_processor(loaded: LoadedConfig) -> Processor:
        return new_processor(read_config(loaded), loaded)

    def build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
        module, _, name = model.partition(":")
        new: Callable[..., LoadableModel] = getattr(importlib.import_module(module), name)
        pixels = () if normalization is None else (normalization(loaded.preprocessor),)
        return new(read_config(loaded), *pixels, options)

    return Family(shape=shape, build_processor=build_processor, build_model=build_model, **row)
