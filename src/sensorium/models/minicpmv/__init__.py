"""MiniCPM-V 2.6: views of images and of frames through a SigLIP tower and a resampler, before a Qwen2 decoder."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.minicpmv.config import read_minicpmv_config
from sensorium.models.minicpmv.processing import build, normalization
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_minicpmv_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_minicpmv_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.minicpmv.model import MiniCPMVModel

    config = read_minicpmv_config(loaded.config)
    return MiniCPMVModel(config, normalization(loaded.preprocessor), options)


FAMILIES = (
    Family(
        name="MiniCPM-V 2.6",
        checkpoint="openbmb/MiniCPM-V-2_6",
        architectures=("MiniCPMV",),
        modalities=("image", "video"),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            (r"^llm\.lm_head\.", "lm_head."),
            (r"^llm\.model\.", "language_model."),
        ),
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        template=(__name__, "chat_template.jinja"),
    ),
)
