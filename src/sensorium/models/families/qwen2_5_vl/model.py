"""Qwen2.5-VL: the vision tower in front of the decoder."""

from __future__ import annotations

from sensorium.models.families.qwen2_5_vl.vision import WindowedTower
from sensorium.models.families.qwen2_vl.model import Qwen2VLModel


class Qwen2_5VLModel(Qwen2VLModel):
    """Qwen2-VL with window attention in the vision tower."""

    tower_class = WindowedTower
