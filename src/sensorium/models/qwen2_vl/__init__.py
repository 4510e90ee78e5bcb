"""Qwen2-VL: a vision tower of any resolution and a Qwen2 decoder with multi-axis rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.pixels import Normalization, read_normalization
from sensorium.models.qwen2_vl.config import Qwen2VLConfig, read_qwen2_vl_config
from sensorium.models.qwen2_vl.processing import build
from sensorium.multimodal.items import Modality
from sensorium.multimodal.processor import Processor


def qwen_vl_family(
    name: str,
    checkpoint: str,
    architecture: str,
    read_config: Callable[[Mapping[str, Any]], Qwen2VLConfig],
    new_model: Callable[[Qwen2VLConfig, Normalization, BuildOptions], LoadableModel],
    modalities: tuple[Modality, ...] = ("image",),
    new_processor: Callable[[Qwen2VLConfig, LoadedConfig, bool], Processor] = build,
) -> Family:
    """The row of a family that differs from Qwen2-VL in its configuration and its vision tower alone."""

    def shape(loaded: LoadedConfig) -> TextShape:
        return read_config(loaded.config).shape

    def build_processor(loaded: LoadedConfig) -> Processor:
        return new_processor(read_config(loaded.config), loaded, "video" in modalities)

    def build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
        normalization = read_normalization(loaded.preprocessor)
        return new_model(read_config(loaded.config), normalization, options)

    return Family(
        name=name,
        checkpoint=checkpoint,
        architectures=(architecture,),
        modalities=modalities,
        shape=shape,
        build_processor=build_processor,
        build_model=build_model,
        renames=(
            (r"^(model\.)?visual\.", "visual."),
            (r"^model\.(language_model\.)?", "language_model."),
        ),
        template=(__name__, "chat_template.jinja"),
    )


def _new_model(
    config: Qwen2VLConfig, normalization: Normalization, options: BuildOptions
) -> LoadableModel:
    from sensorium.models.qwen2_vl.model import Qwen2VLModel

    return Qwen2VLModel(config, normalization, options)


FAMILIES = (
    qwen_vl_family(
        "Qwen2-VL",
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen2VLForConditionalGeneration",
        read_qwen2_vl_config,
        _new_model,
        ("image", "video"),
    ),
)
