"""Detection of quantized checkpoints from configuration files, before weights are downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError
from sensorium.models.interface import LoadedConfig
from sensorium.models.loading.weight_files import weight_names

SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files beside config.json in which old versions of these tools wrote their settings."""
_NAMES = (
    (".qweight", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "fp8 or int8"),
    (".biases", "mlx"),
)
"""Ends of names that weights have in quantized files alone, and what wrote them."""


def refuse_quantized(loaded: LoadedConfig) -> None:
    """Raise ConfigError with method, bits and source for a checkpoint that is quantized."""
    found = quantization_of(loaded)
    if found is not None:
        raise ConfigError(
            f"The checkpoint is quantized ({found}), which is not supported: take the unquantized "
            "one.",
            param="model",
        )


def quantization_of(loaded: LoadedConfig) -> str | None:
    """Return how the checkpoint is quantized, such as ``gptq, 4 bits, says config.json``, or None.

    config.json decides. If it has no such settings, files beside it do, unless the names of the
    weights, where these are known, are those of an unquantized model: such files are also left
    behind by merges and conversions.
    """
    for section in (loaded.config, loaded.config.get("text_config")):
        if isinstance(section, Mapping):
            for key in ("quantization_config", "compression_config", "quantization"):
                if section.get(key):
                    return f"{_described(section[key], _default_method(key))}, says config.json"
    names = weight_names(Path(loaded.folder))
    by_names = None if names is None else method_of_names(names)
    if names is not None and by_names is None:
        return None
    for file, method in SIDE_FILES.items():
        path = Path(loaded.folder) / file
        if path.is_file():
            return f"{_described(_read(path), method)}, says {file}"
    return by_names


def method_of_names(names: Iterable[str]) -> str | None:
    """Return the tool that wrote a file with weights of these names, None if no name tells."""
    for name in names:
        for end, method in _NAMES:
            if name.endswith(end):
                return f"{method}, by names such as {name}"
    return None


def _default_method(key: str) -> str:
    if key == "quantization":
        return "mlx"
    return "compressed-tensors" if key == "compression_config" else "unknown method"


def _described(settings: Any, method: str) -> str:
    """Return method and number of bits of a tool's settings; ``method`` where they name none."""
    if not isinstance(settings, Mapping):
        return method
    nested = settings.get("quantization")  # ModelOpt's own file
    if isinstance(nested, Mapping):
        settings = {**nested, **settings}
    named = settings.get("quant_method") or _guessed(settings) or method
    bits = next((settings[key] for key in ("bits", "w_bit", "num_bits") if settings.get(key)), None)
    algorithm = settings.get("quant_algo") or settings.get("format")
    if named == "bitsandbytes":
        bits = 4 if settings.get("load_in_4bit") else 8
    more = f"{bits} bits" if bits is not None else algorithm
    return f"{named}, {more}" if more else str(named)


def _guessed(settings: Mapping[str, Any]) -> str | None:
    """Return the method of settings that do not name it, by the keys that only one tool writes."""
    for method, keys in {
        "gptq": ("desc_act", "damp_percent"),
        "awq": ("w_bit", "zero_point"),
        "modelopt": ("quant_algo",),
        "compressed-tensors": ("config_groups",),
        "bitsandbytes": ("load_in_8bit", "load_in_4bit"),
    }.items():
        if any(key in settings for key in keys):
            return method
    return "mlx" if set(settings) >= {"group_size", "bits"} else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
