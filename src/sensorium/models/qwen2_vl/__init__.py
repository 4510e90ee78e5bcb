"""Qwen2-VL: a vision tower of any resolution and a Qwen2 decoder with multi-axis rotary positions."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.pixels import read_normalization
from sensorium.models.qwen2_vl.config import read_qwen2_vl_config
from sensorium.models.qwen2_vl.processing import build
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_qwen2_vl_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_qwen2_vl_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.qwen2_vl.model import Qwen2VLModel

    config = read_qwen2_vl_config(loaded.config)
    return Qwen2VLModel(config, read_normalization(loaded.preprocessor), options)


FAMILIES = (
    Family(
        name="Qwen2-VL",
        checkpoint="Qwen/Qwen2-VL-2B-Instruct",
        architectures=("Qwen2VLForConditionalGeneration",),
        modalities=("image",),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            (r"^(model\.)?visual\.", "visual."),
            (r"^model\.(language_model\.)?", "language_model."),
        ),
        template=(__name__, "chat_template.jinja"),
    ),
)
