"""Qwen2-VL: a vision tower of any resolution and a Qwen2 decoder with M-RoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sensorium.models.families.qwen2_vl.config import Qwen2VLConfig, read_qwen2_vl_config
from sensorium.models.families.qwen2_vl.processing import build
from sensorium.models.interface import Family, LoadedConfig
from sensorium.models.native import native_family
from sensorium.multimodal.processor import Processor


def qwen_vl_family(
    name: str,
    checkpoint: str,
    architecture: str,
    model_type: str,
    read_config: Callable[[Mapping[str, Any]], Qwen2VLConfig],
    model: str,
    new_processor: Callable[[Qwen2VLConfig, LoadedConfig], Processor] = build,
) -> Family:
    """Return the registry row of a family that resembles Qwen2-VL; see ``native_family``."""
    return native_family(
        lambda loaded: read_config(loaded.config),
        new_processor,
        model,
        name=name,
        checkpoint=checkpoint,
        architectures=(architecture,),
        embedders=(architecture.removesuffix("ForConditionalGeneration") + "Model",),
        model_types=(model_type,),
        modalities=("image", "video"),
        renames=(
            (r"^((model\.)?visual|vision_tower)\.", "visual."),
            # mlx-vlm's names of what stands beside the tower.
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "language_model."),
            (r"^model\.(language_model\.)?", "language_model."),
        ),
        template=(__name__, "chat_template.jinja"),
    )


FAMILIES = (
    qwen_vl_family(
        "Qwen2-VL",
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        read_qwen2_vl_config,
        "sensorium.models.families.qwen2_vl.model:Qwen2VLModel",
    ),
)
