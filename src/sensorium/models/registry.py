"""The model families, and the choice of one for a configuration.

A new family is a folder and a line here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from sensorium.errors import UnsupportedModelError
from sensorium.models.families import (
    hf,
    llava,
    llava_onevision,
    minicpmv,
    phi3_v,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    text,
    ultravox,
)
from sensorium.models.interface import Family

FAMILIES: tuple[Family, ...] = (
    *llava.FAMILIES,
    *qwen2_vl.FAMILIES,
    *qwen2_5_vl.FAMILIES,
    *qwen3_vl.FAMILIES,
    *phi3_v.FAMILIES,
    *llava_onevision.FAMILIES,
    *minicpmv.FAMILIES,
    *ultravox.FAMILIES,
    *text.FAMILIES,
)

_BY_ARCHITECTURE = {
    name: family for family in FAMILIES for name in (*family.architectures, *family.embedders)
}


_BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def resolve(config: Mapping[str, Any]) -> Family:
    """Return the family of the first known architecture of a configuration.

    Where none of ``architectures`` is known, this is transformers' own model; without any,
    ``model_type`` decides. Raises UnsupportedModelError that lists the nearest names, or the reason
    why transformers' model cannot run here.
    """
    names = _architectures(config)
    if not names:
        return _by_model_type(config.get("model_type"))
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    known = sorted(_BY_ARCHITECTURE)
    other = hf.find(names)
    if other is not None:
        return other
    every = sorted({*known, *hf.names()})  # transformers has most of ours, too
    near = difflib.get_close_matches(names[0], every, n=3, cutoff=0.4) or known
    raise UnsupportedModelError(
        f"Architecture {names[0]!r} is not supported. The nearest are {', '.join(near)}; "
        "`sensorium models` lists all.",
        param="model",
    )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    value = config.get("architectures")
    values = value if isinstance(value, list) else [value]
    return [name for name in values if isinstance(name, str) and name]


def _by_model_type(model_type: object) -> Family:
    """Return the family of a checkpoint that names no architectures, as some saved by hand."""
    if isinstance(model_type, str):
        if model_type in _BY_MODEL_TYPE:
            return _BY_MODEL_TYPE[model_type]
        other = hf.find_by_model_type(model_type)
        if other is not None:
            return other
    known = ", ".join(sorted(_BY_MODEL_TYPE))
    raise UnsupportedModelError(
        f"config.json names no architectures, and its model_type {model_type!r:.80} is none that "
        f"runs here. Known are {known}, and those of models of transformers that generate text.",
        param="model",
    )
