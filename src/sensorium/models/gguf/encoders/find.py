"""The kind of encoder that a GGUF file has. No torch."""

from __future__ import annotations

from typing import Any

from sensorium.errors import UnsupportedModelError
from sensorium.models.gguf.encoders import idefics3, llava, qwen2_vl
from sensorium.models.gguf.encoders.stored import Configured, Encoder, bad
from sensorium.models.gguf.reader import GgufFile

ENCODERS = {own.projector: own for own in (qwen2_vl.ENCODER, llava.ENCODER, idefics3.ENCODER)}
"""Kinds of encoders by ``clip.projector_type``."""


def encoder_kind(encoder: GgufFile) -> Encoder:
    """Return the kind of a file's encoder. Raises UnsupportedModelError for one that is not read.

    Early files of LLaVA do not name their projector.
    """
    kind = encoder.own("projector_type")
    if kind is None and encoder.own("has_llava_projector") is True:
        kind = llava.ENCODER.projector
    if encoder.architecture != "clip" or not isinstance(kind, str):
        bad(encoder, "is no encoder of images (mmproj)")
    found = ENCODERS.get(kind)
    if found is None:
        raise UnsupportedModelError(
            f"{encoder.path.name} is an encoder with the projector {kind!r:.40}. {_known()}",
            param="mmproj",
        )
    return found


def with_vision(file: GgufFile, encoder: GgufFile, config: dict[str, Any]) -> Configured:
    """Return the configuration of a model with its encoder, and the files of its processor.

    config: as ``config_of`` returns it. Raises UnsupportedModelError for encoders that are not
    read, and ConfigError for files that do not belong together.
    """
    kind = encoder_kind(encoder)
    if file.architecture not in kind.architectures:
        raise UnsupportedModelError(
            f"{encoder.path.name} is an encoder with the projector {kind.projector!r}, and "
            f"{file.path.name} of the architecture {file.architecture!r:.40}. {_known()}",
            param="mmproj",
        )
    return kind.configure(file, encoder, config)


def _known() -> str:
    known = [f"{own.models} ({own.projector})" for own in ENCODERS.values()]
    return (
        f"GGUF files of {', '.join(known[:-1])} and {known[-1]} run with theirs; take the "
        "safetensors checkpoint of other models."
    )
