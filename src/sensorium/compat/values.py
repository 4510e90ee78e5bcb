"""Values of options that vLLM and Sensorium share by name, where vLLM knows further ones."""

from __future__ import annotations

import re
from typing import Any

from sensorium.errors import ConfigError

SAME_VALUES: dict[str, dict[str, Any]] = {
    "load_format": {
        "hf": "auto",
        "fastsafetensors": "safetensors",
        "instanttensor": "safetensors",
        "runai_streamer": "safetensors",
    },
    "max_model_len": {"auto": None, "-1": None},
    "task": {"auto": None},
}
"""By option: vLLM's values and ours; None leaves the option at its default."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "load_format": dict.fromkeys(
        "pt npcache mistral tensorizer sharded_state runai_streamer_sharded ipc_cache modelexpress gguf "
        "bitsandbytes".split(),
        "safetensors files are read; convert the checkpoint, or use load_format dummy",
    ),
    "task": dict.fromkeys(
        ("classify", "score", "reward", "transcription", "draft"),
        "models generate text or make embeddings: generate or embed",
    ),
    "convert": dict.fromkeys(
        ("classify", "reward"), "models are adapted for embeddings only: embed"
    ),
    "runner": {"draft": "there is no speculative decoding"},
}
"""By option: vLLM's values that are not supported, and why."""

_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")


def shared_value(option: str, value: Any) -> Any:
    """Return our value for one of vLLM's. Raises ConfigError for one that is not supported."""
    key = str(value)
    why = REFUSED_VALUES.get(option, {}).get(key)
    if why is not None:
        raise ConfigError(f"{option} {key!r} is not supported here: {why}.", param=option)
    return SAME_VALUES.get(option, {}).get(key, value)


def whole_number(text: str) -> int:
    """Read ``8192``, ``8k`` (8000), ``8K`` (8192), ``1.5m`` or ``2G``. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return int(text)
    number, unit = found.groups()
    if unit in _BINARY_SIZES:
        return int(number) * _BINARY_SIZES[unit]
    return round(float(number) * _SIZES[unit])
