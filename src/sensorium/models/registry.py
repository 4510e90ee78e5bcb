"""The model families, and which of them reads a given configuration. A new family is a folder and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from sensorium.errors import UnsupportedModelError
from sensorium.models import (
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


def resolve(config: Mapping[str, Any]) -> Family:
    """The family of the first of the configuration's ``architectures`` that is known; transformers' own where none is.

    Raises UnsupportedModelError that lists the nearest names, or says why transformers' model cannot run here.
    """
    architectures = config.get("architectures") or []
    names = [architectures] if isinstance(architectures, str) else [str(a) for a in architectures]
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    known = sorted(_BY_ARCHITECTURE)
    other = hf.find(names)
    if other is not None:
        return other
    if not names:
        raise UnsupportedModelError(
            f"config.json names no architectures. Known are {', '.join(known)}.", param="model"
        )
    near = difflib.get_close_matches(names[0], [*known, *hf.names()], n=3, cutoff=0.4) or known
    raise UnsupportedModelError(
        f"Architecture {names[0]!r} is not supported. The nearest are {', '.join(near)}; "
        "`sensorium models` lists all.",
        param="model",
    )
