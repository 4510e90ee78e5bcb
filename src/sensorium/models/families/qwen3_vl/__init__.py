"""Qwen3-VL: vision features of several depths, added to the first layers of a Qwen3 decoder."""

from __future__ import annotations

from sensorium.models.families.qwen2_vl import qwen_vl_family
from sensorium.models.families.qwen3_vl.config import read_qwen3_vl_config
from sensorium.models.families.qwen3_vl.processing import build

FAMILIES = (
    qwen_vl_family(
        "Qwen3-VL",
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        read_qwen3_vl_config,
        "sensorium.models.families.qwen3_vl.model:Qwen3VLModel",
        build,
    ),
)
