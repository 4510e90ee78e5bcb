"""Qwen2.5-VL: Qwen2-VL with attention within windows in most of the vision tower's blocks."""

from __future__ import annotations

from sensorium.models.families.qwen2_5_vl.config import read_qwen2_5_vl_config
from sensorium.models.families.qwen2_vl import qwen_vl_family

FAMILIES = (
    qwen_vl_family(
        "Qwen2.5-VL",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        read_qwen2_5_vl_config,
        "sensorium.models.families.qwen2_5_vl.model:Qwen2_5VLModel",
    ),
)
