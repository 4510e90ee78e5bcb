"""Qwen2.5-VL: Qwen2-VL with attention within windows in most of the vision tower's blocks."""

from __future__ import annotations

from sensorium.models.interface import BuildOptions, LoadableModel
from sensorium.models.pixels import Normalization
from sensorium.models.qwen2_5_vl.config import read_qwen2_5_vl_config
from sensorium.models.qwen2_vl import qwen_vl_family
from sensorium.models.qwen2_vl.config import Qwen2VLConfig


def _new_model(
    config: Qwen2VLConfig, normalization: Normalization, options: BuildOptions
) -> LoadableModel:
    from sensorium.models.qwen2_5_vl.model import Qwen2_5VLModel

    return Qwen2_5VLModel(config, normalization, options)


FAMILIES = (
    qwen_vl_family(
        "Qwen2.5-VL",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2_5_VLForConditionalGeneration",
        read_qwen2_5_vl_config,
        _new_model,
        ("image", "video"),
    ),
)
