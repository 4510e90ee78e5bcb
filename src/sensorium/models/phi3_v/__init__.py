"""Phi-3.5-Vision: a CLIP tower over tiles of an image, separators, a projector and a Phi-3 decoder."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.phi3_v.config import read_phi3_v_config
from sensorium.models.phi3_v.processing import build
from sensorium.models.pixels import read_normalization
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_phi3_v_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_phi3_v_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.phi3_v.model import Phi3VModel

    config = read_phi3_v_config(loaded.config)
    return Phi3VModel(config, read_normalization(loaded.preprocessor), options)


FAMILIES = (
    Family(
        name="Phi-3.5-Vision",
        checkpoint="microsoft/Phi-3.5-vision-instruct",
        architectures=("Phi3VForCausalLM",),
        modalities=("image",),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            # A second name of the decoder's table, which some files hold, some not.
            (r"^model\.vision_embed_tokens\.wte\.", "embed_tokens."),
            (r"^model\.vision_embed_tokens\.img_processor\.(vision_model\.)?", "vision_tower."),
            (r"^model\.vision_embed_tokens\.img_projection\.", "projector."),
            (r"^model\.vision_embed_tokens\.", "separators."),
            (r"^model\.", ""),
        ),
        # generation_config.json names none of them.
        stop_tokens=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        template=(__name__, "chat_template.jinja"),
    ),
)
