"""LLaVA-OneVision: a SigLIP tower, a projector and a Qwen2 decoder; one image in tiles, several, and videos."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.llava_onevision.config import read_llava_onevision_config
from sensorium.models.llava_onevision.processing import build
from sensorium.models.pixels import read_normalization
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_llava_onevision_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_llava_onevision_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.llava_onevision.model import LlavaOnevisionModel

    config = read_llava_onevision_config(loaded.config)
    return LlavaOnevisionModel(config, read_normalization(loaded.preprocessor), options)


FAMILIES = (
    Family(
        name="LLaVA-OneVision",
        checkpoint="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        architectures=("LlavaOnevisionForConditionalGeneration",),
        modalities=("image", "video"),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(model\.)?language_model\.(model\.)?", "language_model."),
            (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
            (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
            (r"^model\.image_newline$", "image_newline"),
        ),
        template=(__name__, "chat_template.jinja"),
    ),
)
