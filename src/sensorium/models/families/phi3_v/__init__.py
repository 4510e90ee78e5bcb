"""Phi-3.5-Vision: a CLIP tower over tiles of an image, a projector and a Phi-3 decoder."""

from __future__ import annotations

from sensorium.models.families.phi3_v.config import read_phi3_v_config
from sensorium.models.families.phi3_v.processing import build
from sensorium.models.native import native_family

FAMILIES = (
    native_family(
        lambda loaded: read_phi3_v_config(loaded.config),
        build,
        "sensorium.models.families.phi3_v.model:Phi3VModel",
        name="Phi-3.5-Vision",
        checkpoint="microsoft/Phi-3.5-vision-instruct",
        architectures=("Phi3VForCausalLM",),
        embedders=("Phi3VModel",),
        model_types=("phi3_v",),
        modalities=("image",),
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
