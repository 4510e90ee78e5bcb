"""LLaVA-OneVision: SigLIP features of tiles and frames before a Qwen2 decoder."""

from __future__ import annotations

from sensorium.models.families.llava_onevision.config import read_llava_onevision_config
from sensorium.models.families.llava_onevision.processing import build
from sensorium.models.native import native_family

FAMILIES = (
    native_family(
        lambda loaded: read_llava_onevision_config(loaded.config),
        build,
        "sensorium.models.families.llava_onevision.model:LlavaOnevisionModel",
        name="LLaVA-OneVision",
        checkpoint="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        architectures=("LlavaOnevisionForConditionalGeneration",),
        embedders=("LlavaOnevisionModel",),
        model_types=("llava_onevision",),
        modalities=("image", "video"),
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
