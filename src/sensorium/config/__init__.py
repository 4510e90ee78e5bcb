"""Configuration: small frozen classes that check their values.

Every field is at once a keyword of ``LLM``, a flag of ``sensorium serve`` (``max_model_len`` is
``--max-model-len``), a line of its help and a row of the documentation.
``engine_config(**keywords)`` distributes flat keywords over the classes and refuses unknown ones
with a suggestion.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.compat.apply import adopt
from sensorium.compat.engine_flags import ENGINE_RULES
from sensorium.compat.server_flags import SERVER_RULES
from sensorium.compat.values import shared_value
from sensorium.config.engine import (
    CacheConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from sensorium.config.fields import GIB, MIB, suggestion
from sensorium.config.lora import LoraConfig
from sensorium.config.media import LIMITED, MediaConfig, parse_limits
from sensorium.config.model import DeprecatedConfig, ModelConfig
from sensorium.config.notices import warn_caller
from sensorium.config.served import PER_MODEL, ServedConfig, check_models, server_only_options
from sensorium.config.server import ServerConfig
from sensorium.environment import media_environment
from sensorium.errors import ConfigError

__all__ = [
    "ENGINE_SECTIONS",
    "GIB",
    "LIMITED",
    "MIB",
    "PER_MODEL",
    "CacheConfig",
    "DeprecatedConfig",
    "EngineConfig",
    "LoraConfig",
    "MediaConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "ServedConfig",
    "ServerConfig",
    "SpeculationConfig",
    "check_models",
    "engine_config",
    "engine_option_names",
    "parse_limits",
    "server_only_options",
    "suggestion",
]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All options of an engine; built by ``engine_config``, immutable."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    deprecated: DeprecatedConfig = field(default_factory=DeprecatedConfig)


ENGINE_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "speculation": SpeculationConfig,
    "media": MediaConfig,
    "lora": LoraConfig,
    "parallel": ParallelConfig,
    "observability": ObservabilityConfig,
    "deprecated": DeprecatedConfig,
}


def engine_config(**keywords: Any) -> EngineConfig:
    """Build an ``EngineConfig`` from flat keywords and the environment.

    vLLM's keywords are translated as ``docs/from_vllm.md`` says, with a warning for those that have
    no effect. None leaves an option at its default.

    Raises:
        ConfigError: a keyword is unknown (the nearest known one is named) or not available, or a
            value is out of its range.
    """
    keywords = {**media_environment(), **_in_our_words(keywords)}
    sections: dict[str, Any] = {}
    for section, cls in ENGINE_SECTIONS.items():
        names = {f.name for f in dataclasses.fields(cls)}
        sections[section] = cls(**{k: keywords.pop(k) for k in list(keywords) if k in names})
    if keywords:
        name = next(iter(keywords))
        hint = suggestion(name, engine_option_names())
        if name in SERVER_RULES or name in {f.name for f in dataclasses.fields(ServerConfig)}:
            hint = " It is an option of the server: sensorium serve."
        raise ConfigError(f"Unknown keyword {name!r}.{hint}", param=name)
    config = EngineConfig(**sections)
    # Not in the classes: other processes build them, too, and should not warn again.
    for message in (*config.model.deprecations(), *config.deprecated.deprecations()):
        warn_caller(message)
    return config


def _in_our_words(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with vLLM's translated into ours. Raises ConfigError."""
    ours = set(engine_option_names())
    foreign = {k: v for k, v in keywords.items() if k in ENGINE_RULES and k not in ours}
    adopted = adopt(foreign, ENGINE_RULES)
    for note in adopted.notes:
        warn_caller(note, UserWarning)
    given = dict(adopted.options)
    for name in keywords.keys() - foreign.keys():
        value = _plain_path(shared_value(name, keywords[name]))
        if value is not None or name == "model" or name not in ours:
            given[name] = _merged(value, given.get(name))
    return given


def _merged(value: Any, before: Any) -> Any:
    """Return ``value``, merged over ``before`` if both are mappings."""
    return {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value


def _plain_path(value: Any) -> Any:
    """Return the string of a path object, other values unchanged."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def engine_option_names() -> list[str]:
    """Return the names of all engine options."""
    return [f.name for cls in ENGINE_SECTIONS.values() for f in dataclasses.fields(cls)]
