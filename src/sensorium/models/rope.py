"""Rotary scaling of a configuration: its type, and the context lengths that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from sensorium.errors import ConfigError

KEYS = ("rope_parameters", "rope_scaling")
"""The current and the deprecated name of the mapping in config.json."""

OF_DECODERS = (
    *KEYS,
    "rope_theta",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
)
"""Fields of config.json about a decoder's positions, inside ``text_config`` for multimodal
models."""

LENGTHENING = ("yarn", "linear", "dynamic")
"""Kinds that make the context ``factor`` times as long, whatever ``max_position_embeddings``
says."""


def read_rope(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the rotary scaling of ``rope_scaling`` (deprecated) or ``rope_parameters``.

    It is one mapping. ``rope_type`` is always set; Phi-3's other names of longrope ("su", "yarn")
    are resolved, and ``original_max_position_embeddings`` is where the rotary layer reads it.
    Raises ConfigError for anything else than a mapping of plain values.
    """
    rope: dict[str, Any] = {}
    for key in KEYS:
        source = values.get(key) or {}
        if not isinstance(source, Mapping) or any(isinstance(v, Mapping) for v in source.values()):
            _bad(key, f"must be one mapping of plain values, got {source!r}")
        rope |= source
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su" or (model_type == "phi3" and kind == "yarn"):
        kind = "longrope"
    rope["rope_type"] = "default" if kind == "mrope" else kind
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        outside = values.get("original_max_position_embeddings")
        inside = rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = (
            outside or inside or values["max_position_embeddings"]
        )
    return rope


def context_length(rope: Mapping[str, Any], declared: int) -> int:
    """Return the tokens of the longest context.

    declared: ``max_position_embeddings``, which does not include the factor of the kinds of scaling
    that lengthen the context. Raises ConfigError for a factor that is no number of at least 1.
    """
    factor = rope.get("factor")
    if rope.get("rope_type") not in LENGTHENING or factor is None:
        return declared
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        _bad("rope_scaling.factor", f"must be a number of at least 1, got {factor!r}")
    original = rope.get("original_max_position_embeddings") or declared
    if isinstance(original, bool) or not isinstance(original, int | float) or original < 1:
        _bad(
            "rope_scaling.original_max_position_embeddings",
            f"must be a positive integer, got {original!r}",
        )
    return max(declared, int(factor * original))


def short_context(rope: Mapping[str, Any], declared: int) -> int | None:
    """Return the length in tokens beyond which the rotary factors of a sequence change, or None."""
    if rope.get("rope_type") == "dynamic":
        return declared
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or declared)
    return None


def placed_alike(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Move overrides of the decoder to where the file has its fields, in the file's spelling.

    Model cards and flags name ``rope_scaling`` alone, also for models whose decoder has a
    ``text_config``.
    """
    text, own = config.get("text_config"), overrides.get("text_config", {})
    meant = {key: value for key, value in overrides.items() if key in OF_DECODERS}
    if meant and isinstance(text, Mapping) and isinstance(own, Mapping):
        # Some files repeat at the top what counts in the text part.
        kept = {k: v for k, v in overrides.items() if k not in meant or config.get(k) is not None}
        overrides = {**kept, "text_config": {**meant, **own}}
    return spelled_alike(config, overrides)


def spelled_alike(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Rename overrides of rotary scaling as the file spells them, so that they take effect."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        name, old = key, config.get(key)
        if key in KEYS and not old:
            name = next((other for other in KEYS if config.get(other)), key)
            old = config.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if name in KEYS:
                # The deprecated name of the type, given alone, would be hidden by the current one
                # in the file.
                kind = value.get("rope_type") or value.get("type")
                value = {**value, "rope_type": kind} if kind else value
            else:
                value = spelled_alike(old, value)
        found[name] = value
    return found


def _bad(name: str, reason: str) -> NoReturn:
    raise ConfigError(f"config.json: {name} {reason}.", param="model")
