"""Qwen2.5-VL: Qwen2-VL with attention within windows in most of the vision tower's blocks."""

from __future__ import annotations

import dataclasses

from sensorium.models import qwen2_vl
from sensorium.models.interface import (
    BuildOptions,
    LoadableModel,
    LoadedConfig,
    TextShape,
)
from sensorium.models.pixels import read_normalization
from sensorium.models.qwen2_5_vl.config import read_qwen2_5_vl_config
from sensorium.models.qwen2_vl.processing import build
from sensorium.multimodal.processor import Processor


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_qwen2_5_vl_config(loaded.config).text.shape


def _build_processor(loaded: LoadedConfig) -> Processor:
    return build(read_qwen2_5_vl_config(loaded.config), loaded)


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.qwen2_5_vl.model import Qwen2_5VLModel

    config = read_qwen2_5_vl_config(loaded.config)
    return Qwen2_5VLModel(config, read_normalization(loaded.preprocessor), options)


FAMILIES = (
    dataclasses.replace(
        qwen2_vl.FAMILIES[0],
        name="Qwen2.5-VL",
        checkpoint="Qwen/Qwen2.5-VL-3B-Instruct",
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        shape=_shape,
        build_processor=_build_processor,
        build_model=_build_model,
    ),
)
