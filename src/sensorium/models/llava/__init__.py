"""LLaVA-1.5: a CLIP tower, a projector and a Llama decoder."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.llava.config import read_llava_config
from sensorium.models.llava.processing import build
from sensorium.models.pixels import read_normalization
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_llava_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_llava_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.llava.model import LlavaModel

    config = read_llava_config(loaded.config)
    return LlavaModel(config, read_normalization(loaded.preprocessor), options)


FAMILIES = (
    Family(
        name="LLaVA-1.5",
        checkpoint="llava-hf/llava-1.5-7b-hf",
        architectures=("LlavaForConditionalGeneration",),
        modalities=("image",),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(model\.)?language_model\.(model\.)?", "language_model."),
            (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
            (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
        ),
        template=(__name__, "chat_template.jinja"),
    ),
)
