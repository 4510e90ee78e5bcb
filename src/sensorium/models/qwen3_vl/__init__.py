"""Qwen3-VL: features of several depths of the vision tower, added to the first layers of a Qwen3 decoder."""

from __future__ import annotations

from sensorium.models.interface import BuildOptions, LoadableModel
from sensorium.models.pixels import Normalization
from sensorium.models.qwen2_vl import qwen_vl_family
from sensorium.models.qwen2_vl.config import Qwen2VLConfig
from sensorium.models.qwen3_vl.config import read_qwen3_vl_config
from sensorium.models.qwen3_vl.processing import build


def _new_model(
    config: Qwen2VLConfig, normalization: Normalization, options: BuildOptions
) -> LoadableModel:
    from sensorium.models.qwen3_vl.model import Qwen3VLModel

    return Qwen3VLModel(config, normalization, options)


FAMILIES = (
    qwen_vl_family(
        "Qwen3-VL",
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen3VLForConditionalGeneration",
        read_qwen3_vl_config,
        _new_model,
        ("image", "video"),
        build,
    ),
)
