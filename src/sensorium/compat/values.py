"""vLLM's further values of options that both have."""

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
        "gguf": "auto",
    },
    "max_model_len": {"auto": None, "-1": None},
    "task": {"auto": None},
    "kv_cache_dtype": {"int8_per_token_head": "int8"},
}
"""By option: vLLM's values and Sensorium's; None leaves the option at its default."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "load_format": dict.fromkeys(
        "pt npcache mistral tensorizer sharded_state runai_streamer_sharded ipc_cache modelexpress "
        "bitsandbytes".split(),
        "only safetensors and GGUF files are supported; convert the checkpoint, or use load_format dummy",
    ),
    "task": dict.fromkeys(
        ("classify", "score", "reward", "transcription", "draft"),
        "models generate text or compute embeddings: use generate or embed",
    ),
    "convert": dict.fromkeys(
        ("classify", "reward"), "models can be converted for embeddings only: use embed"
    ),
    "runner": {"draft": "speculative decoding takes no draft model"},
    "kv_cache_dtype": dict.fromkeys(
        "fp8 fp8_e4m3 fp8_e5m2 fp8_inc fp8_per_token_head fp8_ds_mla nvfp4 int4_per_token_head".split(),
        "the KV cache has the data type of the model, or int8",
    ),
}
"""By option: vLLM's values that are not available, and why."""

_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")


def shared_value(option: str, value: Any) -> Any:
    """Return Sensorium's value for one of vLLM's. Raises ConfigError where there is none."""
    key = str(value)
    why = REFUSED_VALUES.get(option, {}).get(key)
    if why is not None:
        raise ConfigError(f"{option} {key!r} is not supported: {why}.", param=option)
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
