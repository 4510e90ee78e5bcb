"""Ultravox v0.3 to v0.6: a Whisper encoder, a stacking projector and a decoder of any text family here."""

from __future__ import annotations

from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    PartCheckpoint,
    TextShape,
)
from sensorium.models.ultravox.config import AUDIO_PART, TEXT_PART, read_ultravox_config
from sensorium.models.ultravox.processing import build
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_ultravox_config(loaded).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_ultravox_config(loaded), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.ultravox.model import UltravoxModel

    return UltravoxModel(read_ultravox_config(loaded), options)


FAMILIES = (
    Family(
        name="Ultravox",
        checkpoint="fixie-ai/ultravox-v0_5-llama-3_2-1b",
        architectures=("UltravoxModel",),
        modalities=("audio",),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.(model\.)?", "language_model."),
            (r"^(audio_tower\.)?model\.encoder\.", "audio_tower."),
        ),
        parts=(
            PartCheckpoint(TEXT_PART, renames=((r"^model\.", "language_model."),)),
            PartCheckpoint(
                AUDIO_PART,
                renames=(
                    (r"^(model\.)?encoder\.", "audio_tower."),
                    (r"^(?=(conv1|conv2|embed_positions|layers|layer_norm)\.)", "audio_tower."),
                ),
                modality="audio",
            ),
        ),
        # Llama 3's and Qwen's ends of a turn, which not all generation_config.json name.
        stop_tokens=("<|eot_id|>", "<|im_end|>"),
        template=(__name__, "chat_template.jinja"),
    ),
)
