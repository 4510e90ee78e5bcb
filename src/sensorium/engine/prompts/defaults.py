"""Default sampling parameters: the model's generation_config.json, or the operator's choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.config import ModelConfig, suggestion
from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.params import SamplingParams

logger = logging.getLogger(__name__)

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of generation_config.json that are sampling parameters under the same name."""
_COUNTS = ("top_k", "max_new_tokens")
_FILE = "generation_config.json"
_OVERRIDABLE = (*SAMPLED, "max_new_tokens", "do_sample")


def generation_values(own: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the effective generation_config.json: the model's ``own``, none, or that of a folder.

    Overrides of the configuration are applied. An invalid value of the file is left out with a
    warning, since requests could not do anything about it. Raises ConfigError for a folder's file
    that cannot be read, and for invalid overrides.
    """
    if model.generation_config == "auto":
        values = dict(own)
    elif model.generation_config == "vllm":
        values = {}
    else:
        values = _of_folder(model.generation_config)
    over = model.override_generation_config
    _check(over)
    if over.get("temperature") is not None:
        values.pop("do_sample", None)
    return {**_usable(values), **over}


def _usable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values of a file; log a warning for each of the others."""
    found = dict(values)
    for name in (*SAMPLED, "max_new_tokens"):
        value = found.get(name)
        if isinstance(value, float) and name in _COUNTS and value.is_integer():
            found[name] = int(value)
        try:
            SamplingParams(**sampling_defaults({name: found.get(name)}))
        except InvalidRequestError as error:
            found.pop(name)
            reason = error.message.replace("max_tokens", name)
            logger.warning("%s of the model: %s The value is ignored.", _FILE, reason)
    return found


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that generation_config.json sets.

    ``do_sample: false`` means greedy.
    """
    found = {k: generation[k] for k in SAMPLED if generation.get(k) is not None}
    if generation.get("do_sample") is False:
        found = {k: v for k, v in found.items() if k == "repetition_penalty"}
        found["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        found["max_tokens"] = generation["max_new_tokens"]
    return found


def _of_folder(name: str) -> dict[str, Any]:
    path = Path(name).expanduser() / _FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"generation_config must be auto, vllm or a folder with {_FILE}; {name!r} cannot be "
            f"read: {type(error).__name__}.",
            param="generation_config",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{_FILE} in {name!r} is no JSON object.", param="generation_config")
    return values


def _check(over: Mapping[str, Any]) -> None:
    for name in over:
        if name not in _OVERRIDABLE:
            raise ConfigError(
                f"override_generation_config has an unknown field {name!r}; known are "
                f"{', '.join(_OVERRIDABLE)}.{suggestion(name, list(_OVERRIDABLE))}",
                param="override_generation_config",
            )
    try:
        SamplingParams(**sampling_defaults(over))
    except InvalidRequestError as error:
        raise ConfigError(
            f"override_generation_config: {error.message}", param="override_generation_config"
        ) from error
