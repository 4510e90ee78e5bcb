"""LLaVA-1.5: a CLIP tower, a projector and a Llama decoder."""

from __future__ import annotations

from sensorium.models.families.llava.config import read_llava_config
from sensorium.models.families.llava.processing import build
from sensorium.models.native import native_family

FAMILIES = (
    native_family(
        lambda loaded: read_llava_config(loaded.config),
        build,
        "sensorium.models.families.llava.model:LlavaModel",
        name="LLaVA-1.5",
        checkpoint="llava-hf/llava-1.5-7b-hf",
        architectures=("LlavaForConditionalGeneration",),
        embedders=("LlavaModel",),
        model_types=("llava",),
        modalities=("image",),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(model\.)?language_model\.(model\.)?", "language_model."),
            (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
            (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
        ),
        template=(__name__, "chat_template.jinja"),
    ),
)
