"""Ultravox v0.3 to v0.6: a Whisper encoder, a stacking projector and any text family's decoder."""

from __future__ import annotations

from sensorium.models.families.ultravox.config import AUDIO_PART, TEXT_PART, read_ultravox_config
from sensorium.models.families.ultravox.processing import build
from sensorium.models.interface import PartCheckpoint
from sensorium.models.native import native_family

FAMILIES = (
    native_family(
        read_ultravox_config,
        build,
        "sensorium.models.families.ultravox.model:UltravoxModel",
        normalization=None,
        name="Ultravox",
        checkpoint="fixie-ai/ultravox-v0_5-llama-3_2-1b",
        architectures=("UltravoxModel",),
        model_types=("ultravox",),
        modalities=("audio",),
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
